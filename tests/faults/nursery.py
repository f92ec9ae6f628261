"""A process that has imported all that a worker needs and forks workers: one that was killed is back at once.

It starts no thread, so a fork of it is as good as a new process. It takes an order per line and answers with the
worker's process id; when its input ends, or it is told to end, all its workers are killed. It does not wait for them,
so that no id is used twice.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import traceback
from pathlib import Path

from tests.e2e.processes import ROOT
from tests.faults import worker


class Forked:
    """A worker of the nursery, as another process sees it."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._descriptor = os.pidfd_open(pid)

    def send_signal(self, number: int, /) -> None:
        os.kill(self._pid, number)

    def poll(self) -> int | None:
        return 0 if self._ended(0.0) else None

    def wait(self, timeout: float | None = None) -> int:
        if not self._ended(timeout):
            raise subprocess.TimeoutExpired(str(self._pid), timeout or 0.0)
        return 0

    def close(self) -> None:
        os.close(self._descriptor)

    def _ended(self, timeout: float | None) -> bool:
        poll = select.poll()
        poll.register(self._descriptor, select.POLLIN)
        return bool(poll.poll(None if timeout is None else timeout * 1000))


class Nursery:
    """The process, as its parent sees it."""

    def __init__(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.nursery"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self._children: list[Forked] = []

    def fork(self, role: str, arguments: list[str], kv_address: str, log: Path) -> Forked:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        order = {"role": role, "arguments": arguments, "kv_address": kv_address, "log": str(log)}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self._children.append(Forked(int(self._process.stdout.readline())))
        return self._children[-1]

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def close(self) -> None:
        self._process.communicate()
        for child in self._children:
            child.close()


def main() -> None:
    children: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        for line in iter(sys.stdin.readline, ""):
            pid = os.fork()
            if pid == 0:
                _become(json.loads(line))
            children.append(pid)
            print(pid, flush=True)
    finally:
        for pid in children:
            os.kill(pid, signal.SIGKILL)


def _become(order: dict[str, object]) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(str(order["log"]), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for descriptor, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, target)
    arguments = order["arguments"]
    assert isinstance(arguments, list)
    try:
        worker.run(str(order["role"]), arguments, str(order["kv_address"]))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)  # never back into the nursery's loop


if __name__ == "__main__":
    main()
