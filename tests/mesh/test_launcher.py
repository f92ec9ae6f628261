"""`kvmesh up` with programs that only speak its protocol: start, watch, restart, drain, kill."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAKE = Path(__file__).with_name("fake_mesh.py")
PATIENCE_S = 30.0


class Mesh:
    """A running launcher; its output is read line by line, which is also how a test waits."""

    def __init__(self, model: Path, temporary: Path, *flags: str) -> None:
        environ = {k: v for k, v in os.environ.items() if not k.startswith("KVMESH_")}
        command = [sys.executable, str(FAKE), "up", str(model), "--port", "0", "--store", "memory", *flags]
        self.process = subprocess.Popen(
            command,
            env={**environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(temporary)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.model = model
        self.temporary = temporary

    def screen(self) -> str:
        """The start screen, once it is printed."""
        assert self.process.stdout is not None
        lines: list[str] = []
        for line in self.process.stdout:
            lines.append(line)
            if line.startswith("  stop"):
                return "".join(lines)
        raise AssertionError(self.errors())

    def until(self, text: str) -> str:
        """The log line that holds `text`, once it is printed."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            if text in line:
                return line
        raise AssertionError(f"{text!r} was never logged")

    def errors(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read()

    def pid(self, name: str) -> int:
        return int((self.model / f"{name}.pid").read_text())

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


Start = Callable[..., Mesh]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a mesh whose members behave as told."""
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as short:
        yield from started(tmp_path, Path(short))


def started(tmp_path: Path, temporary: Path) -> Iterator[Start]:
    model = tmp_path / "tiny"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    running: list[Mesh] = []

    def begin(*flags: str, **behaviour: str) -> Mesh:
        (model / "behaviour.json").write_text(json.dumps({k.replace("_", "-"): v for k, v in behaviour.items()}))
        running.append(Mesh(model, temporary, *flags))
        return running[-1]

    yield begin
    for mesh in running:
        mesh.close()


def await_end(pid: int) -> None:
    """Until the process has ended, reaped or not."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([handle], [], [], PATIENCE_S)[0], f"process {pid} is still there"
    finally:
        os.close(handle)


def runtime_dirs(mesh: Mesh) -> list[Path]:
    return list(mesh.temporary.glob("kvmesh-*"))


def test_one_screen_says_what_runs(start: Start) -> None:
    mesh = start("--prefill", "2", "--decode", "1")
    screen = mesh.screen()
    for name in ("prefill-0", "prefill-1", "decode-0", "proxy"):
        assert f"pid {mesh.pid(name)}" in screen
    assert "7 KV blocks of 16 tokens" in screen
    assert "curl -N http://127.0.0.1:" in screen
    assert "kvmesh chat" in screen
    assert "tiny" in screen
    assert "memory" in screen
    (runtime,) = runtime_dirs(mesh)
    assert runtime.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_drains_and_leaves_nothing(start: Start, number: signal.Signals) -> None:
    mesh = start()
    mesh.screen()
    pids = [mesh.pid(name) for name in ("prefill-0", "decode-0", "proxy")]
    assert mesh.stop(number) == 0
    log = mesh.errors()
    assert log.count('"drained"') == 3
    for pid in pids:
        await_end(pid)
    assert runtime_dirs(mesh) == []


def test_a_dead_worker_comes_back(start: Start) -> None:
    mesh = start()
    mesh.screen()
    first = mesh.pid("decode-0")
    os.kill(first, signal.SIGKILL)
    mesh.until("decode-0 ended, by SIGKILL")
    mesh.until("decode-0 is back")
    assert mesh.pid("decode-0") != first
    assert mesh.stop() == 0


def test_a_dead_proxy_comes_back(start: Start) -> None:
    mesh = start()
    mesh.screen()
    os.kill(mesh.pid("proxy"), signal.SIGKILL)
    mesh.until("proxy is back")
    assert mesh.stop() == 0


def test_a_worker_that_cannot_start_ends_everything_with_one_line(start: Start) -> None:
    mesh = start(decode_0="refuse")
    assert mesh.process.wait(PATIENCE_S) == 3
    *log, last = mesh.errors().splitlines()
    assert last == "kvmesh: architecture Mamba is not supported"
    assert not any("Mamba" in line for line in log)
    if (mesh.model / "prefill-0.pid").exists():
        await_end(mesh.pid("prefill-0"))


def test_a_worker_that_always_crashes_is_given_up(start: Start) -> None:
    mesh = start(prefill_0="crash")
    assert mesh.process.wait(PATIENCE_S) == 7
    last = mesh.errors().splitlines()[-1]
    assert last == "kvmesh: prefill-0 ended 5 times before it was ready, exit code 1: a traceback"


def test_a_second_stop_kills(start: Start) -> None:
    mesh = start(decode_0="stubborn", proxy="stubborn")
    mesh.screen()
    pids = [mesh.pid(name) for name in ("prefill-0", "decode-0", "proxy")]
    mesh.process.send_signal(signal.SIGINT)
    mesh.until("ignored")
    assert mesh.stop() == 130
    for pid in pids:
        await_end(pid)


def test_a_proxy_that_does_not_drain_in_time_is_told_again(start: Start) -> None:
    mesh = start("--drain-timeout", "0", proxy="slow")
    mesh.screen()
    assert mesh.stop() == 0
    log = mesh.errors()
    assert "proxy did not finish in time" in log
    assert log.count('"drained"') == 3


def test_children_die_with_the_launcher(start: Start) -> None:
    mesh = start()
    mesh.screen()
    pids = [mesh.pid(name) for name in ("prefill-0", "decode-0", "proxy")]
    mesh.process.kill()
    for pid in pids:
        await_end(pid)


def test_what_processes_print_is_json_when_nobody_watches(start: Start) -> None:
    mesh = start()
    mesh.screen()
    line = json.loads(mesh.until("a plain line"))
    assert line["msg"] == "a plain line"
    assert line["worker"] in ("proxy", "prefill-0", "decode-0")


def test_a_port_in_use_is_seen_before_anything_starts(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        mesh = start("--port", str(port))
        assert mesh.process.wait(PATIENCE_S) == 4
    assert mesh.errors().startswith(f"kvmesh: port {port} of 127.0.0.1 is in use")
    assert not (mesh.model / "proxy.pid").exists()


@pytest.mark.parametrize(
    ("flags", "code", "text"),
    [
        (("--store", "redis://127.0.0.1:1/0"), 6, "the store redis://127.0.0.1:1/0 does not answer"),
        (("--decode", "0"), 2, "nobody would decode"),
        (("--prefil", "1"), 2, "did you mean --prefill?"),
        (("--role", "both"), 2, "unknown flag --role"),
    ],
)
def test_what_cannot_work_is_one_line_and_a_code(start: Start, flags: tuple[str, ...], code: int, text: str) -> None:
    mesh = start(*flags)
    assert mesh.process.wait(PATIENCE_S) == code
    (line,) = mesh.errors().splitlines()
    assert text in line
