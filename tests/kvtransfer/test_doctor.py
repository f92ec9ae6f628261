"""`kvmesh doctor`: every link with real blocks, one line for each thing, an exit code that scripts can use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvtransfer import doctor
from kvtransfer.doctor import Finding, Link, which
from mesh.errors import EXIT_ENVIRONMENT
from mesh.keys import create

ROOT = Path(__file__).resolve().parents[2]


def kvmesh_doctor(*flags: str) -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("KVMESH_")} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-m", "mesh.cli", "doctor", "--mib", "1", *flags]
    return subprocess.run(command, env=environ, capture_output=True, text=True, check=False)


def test_every_link_of_this_host_is_measured(tmp_path: Path) -> None:
    create(tmp_path / "keys")
    found = kvmesh_doctor("--json", "--keys", str(tmp_path / "keys"))
    assert found.returncode == 0, found.stderr
    report: dict[str, list[dict[str, Any]]] = json.loads(found.stdout)
    assert [link["route"] for link in report["links"]] == ["copy", "shm", "zmq-ipc", "zmq-tcp", "zmq-aes"]
    assert all(link["gb_per_s"] > 0 and not link["failure"] for link in report["links"])
    assert {f["state"] for f in report["host"]} <= {"ok", "note"}
    assert any("keys" in f["text"] for f in report["host"])
    assert any("AES" in f["text"] for f in report["pairs"])


def test_what_is_missing_is_said_and_makes_the_exit_code(tmp_path: Path) -> None:
    found = kvmesh_doctor("--keys", str(tmp_path / "none"), "--store", "redis://:hush@127.0.0.1:1/0")
    assert found.returncode == EXIT_ENVIRONMENT
    failed = [line for line in found.stdout.splitlines() if line.startswith("  fail")]
    assert len(failed) == 2
    assert "hush" not in found.stdout + found.stderr
    assert "ZeroMQ over tcp" in found.stdout, "everything else is measured all the same"


def states(findings: list[Finding]) -> list[str]:
    return [finding.state for finding in findings]


@pytest.mark.parametrize(
    ("broken", "sealed", "expected"),
    [
        ((), True, ["ok", "ok", "ok"]),
        ((), False, ["ok", "ok", "note"]),
        (("shm",), True, ["note", "ok", "ok"]),
        (("shm", "zmq-ipc"), True, ["fail", "ok", "ok"]),
        (("zmq-aes",), True, ["ok", "ok", "fail"]),
    ],
)
def test_a_pair_uses_the_best_link_that_works(broken: tuple[str, ...], sealed: bool, expected: list[str]) -> None:
    links = [Link(route, 0.0 if route in broken else 1.0, 0.5) for route in ("copy", *doctor.WHAT)]
    assert states(which(links, sealed=sealed)) == expected


def test_a_link_that_does_not_work_is_told_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(route: str, *_: object) -> list[float]:
        if route == "shm":
            raise RuntimeError("the blocks went by zmq")
        return [0.5]

    monkeypatch.setattr(doctor, "link_times", times)
    found = {link.route: link for link in doctor.measure(1)}
    assert (found["shm"].gb_per_s, found["shm"].failure) == (0.0, "the blocks went by zmq")
    assert found["zmq-tcp"].gb_per_s > 0
