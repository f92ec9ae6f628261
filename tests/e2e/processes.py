"""A real deployment for tests: one proxy and its workers as processes on this host, each killable by name."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from openai import OpenAI

ROOT = Path(__file__).resolve().parents[2]
READY_S = 90.0
"""Two cores import torch for several workers at once."""
POLL_S = 0.01


_ports = itertools.cycle(range(10_000, 32_000))
for _ in range(os.getpid() * 101 % 22_000):
    next(_ports)


def free_port() -> int:
    """Below the ports that the kernel gives to outgoing connections: one of those may be taken before it is used.
    Test processes begin at different places and never take the same port twice in a row."""
    for port in _ports:
        with socket.socket() as s:
            try:
                s.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("unreachable: the ports are a cycle")


def wait_until(condition: Callable[[], bool], what: str | Callable[[], str], timeout: float = 30.0) -> None:
    """Polls a condition of another process; fails with what was waited for."""
    end = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > end:
            raise AssertionError(f"not within {timeout} s: {what if isinstance(what, str) else what()}")
        time.sleep(POLL_S)


def fetch(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def sample(url: str, name: str, **labels: str) -> float:
    """A sample of a process's /metrics; NaN while it does not answer."""
    return sample_of(fetch(f"{url}/metrics")[1], name, **labels)


def sample_of(page: str, name: str, **labels: str) -> float:
    """NaN: it is not there."""
    for line in page.splitlines():
        found = re.match(rf"{re.escape(name)}(?:\{{(.*)\}})? (\S+)", line)
        if found and all(f'{k}="{v}"' in (found[1] or "") for k, v in labels.items()):
            return float(found[2])
    return float("nan")


class Process(Protocol):
    """What is asked of a worker's process; `Popen` has it."""

    def send_signal(self, number: int, /) -> None: ...

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...


@dataclass(slots=True)
class Worker:
    name: str
    role: str
    metrics_port: int
    process: Process

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.metrics_port}"

    def metric(self, name: str, **labels: str) -> float:
        return sample(self.url, name, **labels)

    @property
    def state(self) -> dict[str, float]:
        """What it holds, by what holds it."""
        return _state(fetch(f"{self.url}/metrics")[1])

    @property
    def registered(self) -> bool:
        status, text = fetch(f"{self.url}/health")
        return status == 200 and json.loads(text)["proxies"] > 0


@dataclass(slots=True)
class Deployment:
    directory: Path
    model: Path
    port: int
    flags: tuple[str, ...] = ()
    store: str = "memory"
    keys: Path | None = None
    """With them, all sockets between the processes are tcp."""
    control: str = ""
    proxy: subprocess.Popen[bytes] | None = None
    workers: dict[str, Worker] = field(default_factory=dict)
    _client: OpenAI | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def client(self) -> OpenAI:
        """One for the deployment's life, closed by `stop`."""
        if self._client is None:
            self._client = OpenAI(base_url=f"{self.url}/v1", api_key="unused", max_retries=0, timeout=60)
        return self._client

    @property
    def model_name(self) -> str:
        return self.model.name

    def start_proxy(self, *flags: str) -> None:
        self.control = self.control or (f"tcp://127.0.0.1:{free_port()}" if self.keys else self._ipc("control"))
        arguments = [str(self.model), "--port", str(self.port), "--control", self.control, *self._keys()]
        self.proxy = self._spawn("proxy", [*arguments, "--store", self.store, *flags], "proxy")

    def start_worker(self, role: str, name: str, *flags: str) -> Worker:
        port = free_port()
        arguments = [str(self.model), "--role", role, "--worker-id", name, *self._addresses(name, port), *self._keys()]
        arguments += ["--metrics-bind", f"127.0.0.1:{port}", "--store", self.store, "--threads", "1"]
        process = self._start_worker(role, [*arguments, *self.flags, *flags], name)
        self.workers[name] = Worker(name, role, port, process)
        return self.workers[name]

    def wait_ready(self) -> None:
        """Until the proxy is ready and knows every worker."""
        wait_until(lambda: fetch(f"{self.url}/ready")[0] == 200, lambda: f"ready: {self._logs()}", READY_S)
        for worker in self.workers.values():
            wait_until(lambda w=worker: w.registered, lambda w=worker: f"{w.name}: {self._logs()}", READY_S)  # type: ignore[misc]

    def kill(self, name: str) -> None:
        process = self.workers[name].process
        process.send_signal(signal.SIGKILL)
        process.wait()
        del self.workers[name]

    def stream(self, prompt: Sequence[int], max_tokens: int, **more: object) -> Iterator[str]:
        """Texts of a streamed completion of token ids."""
        with self.client.completions.create(
            model=self.model_name,
            prompt=list(prompt),
            max_tokens=max_tokens,
            stream=True,
            **more,  # type: ignore[call-overload]
        ) as events:
            for event in events:
                for choice in event.choices:
                    yield choice.text

    def assert_quiet(self, timeout: float = 20) -> None:
        """Nothing is left anywhere: no request, hold, transfer; free + cached = total on every worker."""
        for name in ("kvmesh_choices_live", "kvmesh_choices_waiting"):
            wait_until(lambda n=name: sample(self.url, n) == 0, f"no {name}", timeout)  # type: ignore[misc]
        for worker in self.workers.values():
            wait_until(lambda w=worker: _quiet(w), lambda w=worker: f"{w.name}: {w.state}", timeout)  # type: ignore[misc]

    def stop(self) -> None:
        if self._client is not None:
            self._client.close()
        processes = [*[w.process for w in self.workers.values()], *([self.proxy] if self.proxy else [])]
        for process in processes:
            process.send_signal(signal.SIGTERM)
        for process in processes:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()

    def _start_worker(self, role: str, arguments: list[str], name: str) -> Process:
        return self._spawn("prefill" if role == "prefill" else "decode", arguments, name)

    def _addresses(self, name: str, port: int) -> list[str]:
        kv = "tcp://127.0.0.1:0" if self.keys else self._ipc(f"{name}-{port}.kv")
        return ["--proxy", self.control, "--kv-bind", kv]

    def _keys(self) -> list[str]:
        return ["--keys", str(self.keys)] if self.keys else []

    def _ipc(self, name: str) -> str:
        return f"ipc://{self.directory}/{name}"

    def _spawn(self, module: str, arguments: list[str], name: str) -> subprocess.Popen[bytes]:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        with (self.directory / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", module, *arguments], cwd=ROOT, env=environment, stdout=log, stderr=log
            )

    def _logs(self) -> str:
        return "\n".join(f"--- {p.name}\n{p.read_text()[-1500:]}" for p in self.directory.glob("*.log"))


STATES = {
    "running": ("vllm:num_requests_running", {}),
    "waiting": ("vllm:num_requests_waiting", {}),
    "fetching": ("kvmesh_kv_fetching_requests", {}),
    "held": ("kvmesh_kv_held_requests", {}),
    "held blocks": ("kvmesh_kv_blocks", {"state": "held"}),
    "fetches": ("kvmesh_kv_open", {"what": "fetching"}),
    "served": ("kvmesh_kv_open", {"what": "serving"}),
    "streams": ("kvmesh_kv_open", {"what": "streams"}),
    "slots": ("kvmesh_kv_open", {"what": "slots"}),
    "attempts": ("kvmesh_open_attempts", {}),
}


def _state(page: str) -> dict[str, float]:
    return {key: sample_of(page, name, **labels) for key, (name, labels) in STATES.items()}


def _quiet(worker: Worker) -> bool:
    _, page = fetch(f"{worker.url}/metrics")
    total = re.search(r'num_gpu_blocks="(\d+)"', page)
    free, cached = (sample_of(page, "kvmesh_kv_blocks", state=s) for s in ("free", "cached"))
    return all(v == 0 for v in _state(page).values()) and total is not None and free + cached == int(total[1])


@contextmanager
def deployment(
    directory: Path,
    model: Path,
    *,
    prefill: int,
    decode: int,
    flags: Sequence[str] = (),
    proxy_flags: Sequence[str] = (),
    store: str = "memory",
    keys: Path | None = None,
) -> Iterator[Deployment]:
    """Proxy, `prefill` and `decode` workers named `prefill-0` …; stopped at the end."""
    running = Deployment(directory, model, free_port(), tuple(flags), store, keys)
    try:
        running.start_proxy(*proxy_flags)
        for role, count in (("prefill", prefill), ("decode", decode)):
            for i in range(count):
                running.start_worker(role, f"{role}-{i}")
        running.wait_ready()
        yield running
    finally:
        running.stop()
