"""`kvmesh doctor`: every link with real blocks, one line for each thing, an exit code that scripts can use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvtransfer import doctor, pairing
from kvtransfer.doctor import Link, which
from kvtransfer.doctor_fleet import Finding
from kvtransfer.linktest import Spent
from mesh.errors import EXIT_ENVIRONMENT
from mesh.keys import create
from mesh.settings import DoctorSettings

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


def links(*broken: str) -> list[Link]:
    return [Link(r, 0.0 if r in broken else 1.0, 0.5, "broken" if r in broken else "") for r in ("copy", *doctor.WHAT)]


@pytest.mark.parametrize(
    ("broken", "sealed", "expected"),
    [
        ((), True, ["ok", "ok", "ok"]),
        ((), False, ["ok", "ok", "note"]),
        (("shm",), True, ["note", "ok", "ok"]),
        (("shm", "zmq-ipc"), True, ["fail", "ok", "ok"]),
        (("zmq-tcp",), True, ["ok", "fail", "ok"]),
        (("zmq-aes",), True, ["ok", "ok", "fail"]),
    ],
)
def test_a_pair_uses_the_best_link_that_works(broken: tuple[str, ...], sealed: bool, expected: list[str]) -> None:
    settings = DoctorSettings(keys="keys" if sealed else "")
    assert states(which(links(*broken), settings)) == expected


def said(settings: DoctorSettings, *broken: str) -> list[str]:
    return [finding.text for finding in which(links(*broken), settings)]


def test_every_better_transport_is_named_with_what_is_against_it() -> None:
    here, apart, far = said(DoctorSettings(keys="keys"))
    assert here == "same host: shared memory (shm); not cuda: it is for workers on CUDA devices"
    assert apart.startswith(
        "containers of one host: ZeroMQ (zmq); not cuda: it is for workers on CUDA devices; not shm: they do"
    )
    assert far.startswith("other hosts: ZeroMQ (zmq), sealed with AES-256-GCM; not cuda: ")
    assert "not nccl: it is for workers on CUDA devices" in far


def test_a_better_transport_that_is_broken_or_not_asked_for_says_so() -> None:
    assert (
        "ZeroMQ (zmq); not cuda: it is for workers on CUDA devices; not shm: broken" in said(DoctorSettings(), "shm")[0]
    )
    assert "not shm: --transport prefers another" in said(DoctorSettings(transport="zmq,shm"))[0]
    assert "not shm: --transport does not name it" in said(DoctorSettings(transport="zmq"))[0]
    assert said(DoctorSettings())[2].startswith("other hosts: none")


def test_workers_on_devices_use_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "unfit", lambda name, device: "")
    on_devices = DoctorSettings(transport="cuda,nccl,zmq", device="cuda", keys="keys")
    here, _, far = said(on_devices)
    assert here == "same host: CUDA device memory (cuda)"
    assert far.startswith("other hosts: NCCL (nccl); not cuda: they share no memory; not shm:")
    here, _, far = said(DoctorSettings(device="cuda", keys="keys"))
    assert here == "same host: shared memory (shm); not cuda: --transport does not name it"
    assert far.endswith("not nccl: --transport does not name it")


def test_only_links_that_can_be_tried_are() -> None:
    assert doctor.routes(DoctorSettings()) == ["shm", "zmq-ipc", "zmq-tcp", "zmq-aes"]
    assert doctor.routes(DoctorSettings(transport="gloo,zmq"))[-1] == "gloo"


def test_a_link_that_does_not_work_is_told_and_the_others_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def times(route: str, *_: object) -> list[Spent]:
        if route == "shm":
            raise RuntimeError("the blocks went by zmq")
        return [Spent(0.5, 0.1)]

    monkeypatch.setattr(doctor, "link_times", times)
    found = {link.route: link for link in doctor.measure(1, ["shm", "zmq-tcp"])}
    assert (found["shm"].gb_per_s, found["shm"].failure) == (0.0, "the blocks went by zmq")
    assert found["zmq-tcp"].gb_per_s > 0
