"""The proxy as a process: what it refuses to start with, and how it ends."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.errors import EXIT_PORT, EXIT_STORE, EXIT_USAGE, StartupError
from proxy.__main__ import listen

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / "deploy" / "demo_model"


def start(*flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "proxy", str(MODEL), *flags]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_taken_port_is_one_clear_line(taken: int) -> None:
    with pytest.raises(StartupError, match=f"cannot listen on 127.0.0.1:{taken}: address already in use") as refusal:
        listen("127.0.0.1", taken)
    assert refusal.value.exit_code == EXIT_PORT


def test_an_address_of_another_machine_is_one_clear_line() -> None:
    with pytest.raises(StartupError, match="cannot listen") as refusal:
        listen("192.0.2.1", 0)
    assert refusal.value.exit_code == EXIT_PORT


def test_what_cannot_be_served_ends_with_one_line_and_its_code(tmp_path: Path, taken: int) -> None:
    control = f"ipc://{tmp_path}/control"
    cases = {
        EXIT_STORE: ("--store", f"redis://127.0.0.1:{taken + 1 if taken < 65535 else 1}/0", "--port", "0"),
        EXIT_USAGE: ("--control", "tcp://0.0.0.0:7400", "--port", "0"),
        EXIT_PORT: ("--port", str(taken), "--control", control),
    }
    processes = {code: start(*flags) for code, flags in cases.items()}
    for code, process in processes.items():
        _, said = process.communicate(timeout=60)
        assert process.returncode == code, said
        assert len(said.strip().splitlines()) == 1, said
        assert "Traceback" not in said


def test_a_proxy_without_workers_answers_and_ends_on_sigterm(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = start("--port", str(port), "--control", f"ipc://{tmp_path}/control")
    try:
        assert get(port, "/health") == (200, {"status": "ok"})
        assert get(port, "/ready")[0] == 503
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.communicate()


def get(port: int, path: str) -> tuple[int, object]:
    """Tries until the server listens."""
    deadline = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except ConnectionRefusedError:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        finally:
            connection.close()
