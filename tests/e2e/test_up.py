"""`kvmesh up` as a person runs it: one command, one screen, a worker killed, Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.processes import ROOT, fetch, free_port, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

READY_S = 60.0


def kvmesh(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "mesh.cli", *arguments]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(kvmesh(*arguments), cwd=ROOT, capture_output=True, text=True, timeout=60)


@contextmanager
def up(log: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A running `kvmesh up` with the bundled model, and its port."""
    port = free_port()
    with log.open("wb") as out:
        process = subprocess.Popen(
            kvmesh("up", "--port", str(port), *flags), cwd=ROOT, stdout=out, stderr=out, start_new_session=True
        )
        try:
            wait_until(lambda: fetch(f"http://127.0.0.1:{port}/ready")[0] == 200, lambda: log.read_text(), READY_S)
            yield process, port
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait(30)


def children(pid: int) -> dict[int, str]:
    """Processes of ours below `pid`, by their command line."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid:
                found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        except (OSError, IndexError):
            continue
    return found


def test_a_killed_worker_comes_back_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    log = tmp_path / "up.log"
    with up(log) as (process, port):
        answer = run("complete", "Hello", "--url", f"http://127.0.0.1:{port}", "--max-tokens", "4")
        assert answer.returncode == 0, answer.stderr
        (victim,) = [pid for pid, line in children(process.pid).items() if "decode-0" in line]
        os.kill(victim, signal.SIGKILL)

        def replaced() -> bool:
            return any("decode-0" in line and pid != victim for pid, line in children(process.pid).items())

        wait_until(replaced, lambda: log.read_text())
        wait_until(lambda: fetch(f"http://127.0.0.1:{port}/ready")[0] == 200, lambda: log.read_text(), READY_S)
        again = run("complete", "Hello", "--url", f"http://127.0.0.1:{port}", "--max-tokens", "4")
        assert again.returncode == 0, again.stderr
        below = list(children(process.pid))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0, log.read_text()
        assert not [pid for pid in below if Path(f"/proc/{pid}").exists()]
    assert f"http://127.0.0.1:{port}" in log.read_text()


@pytest.mark.parametrize(
    ("flags", "code", "says"),
    [
        (("up", "/no/such/model"), 3, "model directory"),
        (("up", "--frobnicate"), 2, "--frobnicate"),
        (("up", "--store", "redis://127.0.0.1:1/0"), 6, "redis"),
        (("up", "--store", "http://example"), 6, "store"),
        (("up", "--gpu-memory-utilization", "0.000001", "--port", "0"), 5, "memory"),
        (("nonsense",), 2, "nonsense"),
    ],
)
def test_a_bad_start_is_one_line_and_a_documented_exit_code(
    flags: tuple[str, ...], code: int, says: str, tmp_path: Path
) -> None:
    answer = run(*flags)
    assert answer.returncode == code, answer.stdout + answer.stderr
    lines = [line for line in answer.stderr.splitlines() if line.startswith("kvmesh")]
    assert len(lines) == 1, answer.stderr
    assert says in lines[0].lower()
    assert "Traceback" not in answer.stderr


def test_an_unsupported_architecture_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["FancyForCausalLM"], "model_type": "fancy"}')
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((ROOT / "deploy" / "demo_model" / name).read_text())
    answer = run("up", str(tmp_path), "--port", str(free_port()))
    assert answer.returncode == 3, answer.stdout + answer.stderr
    assert "FancyForCausalLM" in answer.stderr


def test_a_port_in_use_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    with up(tmp_path / "up.log", "--prefill", "0") as (_, port):
        answer = run("up", "--port", str(port))
        assert answer.returncode == 4
        assert str(port) in answer.stderr
