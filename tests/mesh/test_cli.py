"""The command line from outside: help, exit codes, what it imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mesh import serve
from mesh.cli import COMMANDS, main
from mesh.errors import StartupError

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "fastapi", "httpx", "zmq", "redis", "prometheus_client", "pydantic", "msgpack")


def kvmesh(*argv: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KVMESH_")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "mesh.cli", *argv],
        env=environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_text("{}")
    return tmp_path


def test_help_names_every_command() -> None:
    found = kvmesh("--help")
    assert found.returncode == 0
    assert all(f"  {name} " in found.stdout for name in COMMANDS)


@pytest.mark.parametrize("command", ["--help", "up", "chat", "complete"])
def test_no_command_imports_anything_heavy_to_start(command: str) -> None:
    code = (
        "import sys\nfrom mesh.cli import dispatch\n"
        f"try:\n    dispatch([{command!r}, '--help'])\nexcept SystemExit:\n    pass\n"
        f"print([m for m in {HEAVY!r} if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", ["up", "chat", "complete", "doctor"])
def test_each_command_has_help(command: str) -> None:
    found = kvmesh(command, "--help")
    assert found.returncode == 0
    assert found.stdout.startswith(f"usage: kvmesh {command}")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version"]) == main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("kvmesh 0.")


@pytest.mark.parametrize(
    ("argv", "code", "text"),
    [
        (["upp"], 2, "did you mean up?"),
        (["--nope"], 2, "unknown flag --nope"),
        (["version", "x"], 2, "takes no arguments"),
        (["up", "--nope"], 2, "unknown flag --nope"),
        (["up", "/nowhere"], 3, "there is no model directory /nowhere"),
        (["serve", "cook"], 2, "'cook' is nothing to serve"),
        (["serve", "decode"], 3, "give the model's directory"),
        (["serve", "proxy", "/nowhere"], 3, "there is no model directory /nowhere"),
        (["chat", "--url", "http://127.0.0.1:1", "hi"], 9, "start one with `kvmesh up`"),
        (["chat", "--url", "nonsense", "hi"], 2, "is no server address"),
        (["complete", "--max-tokens", "0", "hi"], 2, "--max-tokens must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_a_code(
    argv: list[str], code: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == code
    out, err = capsys.readouterr()
    assert out == ""
    (line,) = err.splitlines()
    assert line.startswith("kvmesh: ")
    assert text in line


def test_no_arguments_is_help_and_a_usage_error() -> None:
    found = kvmesh()
    assert found.returncode == 2
    assert "usage: kvmesh" in found.stdout


def test_serve_becomes_the_module_of_the_role(model: Path) -> None:
    command = serve.command_line("both", [str(model), "--threads", "2"])
    assert command[1:4] == ["-P", "-m", "decode"]
    assert command[4:] == ["--role=both", "--threads=2", "--", str(model)]
    assert serve.command_line("proxy", [str(model)])[3] == "proxy"


def test_serve_checks_the_store_and_the_flags_first(model: Path) -> None:
    with pytest.raises(StartupError, match="does not answer") as caught:
        serve.command_line("prefill", [str(model), "--store", "redis://127.0.0.1:1"])
    assert caught.value.exit_code == 6
    with pytest.raises(StartupError, match="unknown flag --role"):
        serve.command_line("prefill", [str(model), "--role", "both"])


def test_serve_lists_its_roles() -> None:
    found = kvmesh("serve", "--help")
    assert found.returncode == 0
    assert all(f"  {role} " in found.stdout for role in serve.SERVED)
