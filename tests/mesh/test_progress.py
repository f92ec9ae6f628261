"""What a starting process tells its launcher."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from mesh import startup
from mesh.errors import StartupError
from mesh.progress import PROGRESS_FD, Failed, Phase, parse_report, report, report_failure


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A file in the launcher's place."""
    path = tmp_path / "reports"
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    monkeypatch.setenv(PROGRESS_FD, str(fd))
    return path


def test_reports_arrive_as_they_were_sent(told: Path) -> None:
    report("weights", 0.4)
    report("ready", blocks=7, device="cpu")
    report_failure("no such model", 3)
    assert [parse_report(line) for line in told.read_text().splitlines()] == [
        Phase("weights", 0.4),
        Phase("ready", None, {"blocks": 7, "device": "cpu"}),
        Failed("no such model", 3),
    ]


def test_without_a_launcher_nothing_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PROGRESS_FD, raising=False)
    report("weights")
    assert not report_failure("x", 3)


@pytest.mark.parametrize("fd", ["", "x", "-1", "99999"])
def test_a_bad_descriptor_is_no_error(monkeypatch: pytest.MonkeyPatch, fd: str) -> None:
    monkeypatch.setenv(PROGRESS_FD, fd)
    report("weights")
    assert not report_failure("x", 3)


@pytest.mark.parametrize(
    "line",
    ["", "x", "[]", "7", '{"kvmesh": "progress"}', '{"kvmesh": "failed", "message": 1, "exit_code": 3}', "[" * 99999],
)
def test_anything_else_is_no_report(line: str) -> None:
    assert parse_report(line) is None


def test_a_share_stays_between_0_and_1() -> None:
    def sent(fraction: object) -> object:
        found = parse_report(json.dumps({"kvmesh": "progress", "phase": "p", "fraction": fraction, "facts": {}}))
        assert isinstance(found, Phase)
        return found.fraction

    assert [sent(f) for f in (-1, 7, 0.5, None, "x", float("nan"))] == [0.0, 1.0, 0.5, None, None, None]


def refuse() -> int:
    raise StartupError("no such model", 3)


def test_a_startup_error_is_told_to_the_launcher_alone(told: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert startup.run("kvmesh", refuse) == 3
    assert parse_report(told.read_text()) == Failed("no such model", 3)
    assert capsys.readouterr().err == ""


def test_a_startup_error_is_one_line_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(PROGRESS_FD, raising=False)
    assert startup.run("kvmesh", refuse) == 3
    assert capsys.readouterr().err == "kvmesh: no such model\n"
