"""What `kvmesh up` decides before it starts anything."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from mesh import launcher, options
from mesh.console import Console
from mesh.errors import StartupError
from mesh.modeldir import DEMO_MODEL, check_model_dir
from mesh.screen import MeshFacts, WorkerRow, start_screen
from mesh.settings import ProxySettings, UpSettings, WorkerSettings
from mesh.store import Store

RUNTIME = Path("/run/x")


def planned(up: UpSettings, shared: WorkerSettings | None = None) -> tuple[WorkerSettings, ...]:
    return launcher.plan_workers(up, shared or WorkerSettings(), "ipc:///run/x/control", RUNTIME)


def counts(*argv: str) -> tuple[int, int, int]:
    up, _, _ = launcher.parse(argv, environ={})
    return up.prefill, up.decode, up.both


def test_the_numbers_of_workers() -> None:
    assert counts() == (1, 1, 0)
    assert counts("--both", "2") == (0, 0, 2)
    assert counts("--prefill", "0") == (0, 1, 0)
    assert counts("--prefill", "3", "--decode", "2", "--both", "1") == (3, 2, 1)


def test_each_worker_has_a_name_and_sockets_of_its_own() -> None:
    workers = planned(UpSettings(prefill=2, decode=1, both=1))
    assert [w.worker_id for w in workers] == ["prefill-0", "prefill-1", "decode-0", "both-0"]
    assert [w.role for w in workers] == ["prefill", "prefill", "decode", "both"]
    assert [w.kv_bind for w in workers] == [f"ipc:///run/x/{w.worker_id}.kv" for w in workers]
    assert {w.proxy for w in workers} == {("ipc:///run/x/control",)}


def test_workers_share_the_cores_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    workers = planned(UpSettings(prefill=1, decode=2), WorkerSettings(gpu_memory_utilization=0.9))
    assert {w.threads for w in workers} == {2}
    assert [w.gpu_memory_utilization for w in workers] == pytest.approx([0.3] * 3)
    assert {w.threads for w in planned(UpSettings(prefill=9, decode=9))} == {1}
    assert {w.threads for w in planned(UpSettings(prefill=1, decode=1), WorkerSettings(threads=5))} == {5}


def test_cuda_means_every_gpu_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    workers = planned(UpSettings(prefill=1, decode=2), WorkerSettings(device="cuda"))
    assert [w.device for w in workers] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [w.gpu_memory_utilization for w in workers] == pytest.approx([0.45, 0.9, 0.45])


def test_a_members_command_line_is_its_settings() -> None:
    workers = planned(UpSettings(prefill=1, decode=0, both=1))
    launch = launcher.Launch(ProxySettings(model="m", port=9), workers, Store("memory", "memory"))
    proxy, prefill, both = launcher.programs(launch, launcher.modules("proxy", "prefill", "decode"))
    assert proxy.argv[1:4] == ("-P", "-m", "proxy")
    assert prefill.argv[3] == "prefill"
    assert both.argv[3] == "decode"
    assert options.parse(WorkerSettings, both.argv[4:], environ={}, role="decode") == workers[1]
    assert options.parse(ProxySettings, proxy.argv[4:], environ={}) == launch.proxy
    assert both.environ["OMP_NUM_THREADS"] == str(workers[1].threads)


def test_what_workers_read_when_they_load_can_be_overruled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    launch = launcher.Launch(
        ProxySettings(model="m", port=9), planned(UpSettings(prefill=1, decode=1)), Store("memory", "memory")
    )
    proxy, worker, *_ = launcher.programs(launch, launcher.modules("proxy", "prefill", "decode"))
    assert worker.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert worker.environ["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert "GLIBC_TUNABLES" not in proxy.environ


def test_a_childs_environment() -> None:
    environ = launcher.child_environment({"KVMESH_PORT": "1", "PYTHONPATH": "/x"})
    assert "KVMESH_PORT" not in environ
    assert environ["PYTHONPATH"] == f"{launcher.ROOT}{os.pathsep}/x"


def test_port_zero_is_a_free_port() -> None:
    assert launcher.free_port("127.0.0.1", 0) > 0


@pytest.mark.parametrize("host", ["999.1.1.1", "203.0.113.1"])
def test_an_address_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(StartupError, match="cannot listen on") as caught:
        launcher.free_port(host, 8000)
    assert caught.value.exit_code == 4


def test_a_long_temporary_directory_is_avoided(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A unix socket's path has 107 bytes at most."""
    deep = tmp_path / ("x" * 90)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with launcher.runtime_dir() as path:
        assert len(str(path)) < 40
    assert not path.exists()


def broken(tmp_path: Path, name: str) -> Path:
    """A model directory with one thing wrong."""
    path = tmp_path / "model"
    if name == "missing":
        return path
    if name == "file":
        path.write_text("")
        return path
    path.mkdir()
    contents = {"empty": None, "no json": "{", "no object": "[]", "no tokenizer": "{}"}[name]
    if contents is not None:
        (path / "config.json").write_text(contents)
    return path


@pytest.mark.parametrize("name", ["missing", "file", "empty", "no json", "no object", "no tokenizer"])
def test_a_broken_model_directory_is_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(StartupError) as caught:
        check_model_dir(broken(tmp_path, name))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_the_demo_model_is_a_model_directory() -> None:
    check_model_dir(DEMO_MODEL)


def test_the_screen_of_another_port_says_how_to_reach_it() -> None:
    row = WorkerRow("decode-0", "decode", 7, "cpu", {})
    facts = MeshFacts("http://127.0.0.1:9", "it's", "models/x", "memory", 6, 1.0, [row])
    screen = "\n".join(start_screen(facts))
    assert "kvmesh chat --url http://127.0.0.1:9" in screen
    assert "'\"'\"'" in screen
    assert "decode-0  (pid 7)  cpu" in screen


def test_the_screen_of_a_mesh_with_keys_shows_where_they_go() -> None:
    screen = "\n".join(start_screen(MeshFacts("http://127.0.0.1:8000", "m", "m", "memory", 6, 1.0, [], keyed=True)))
    assert "kvmesh chat --api-key-file FILE Hello" in screen
    assert "-H 'authorization: Bearer KEY'" in screen


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_log_lines_stand_above_the_progress_line() -> None:
    log = Terminal()
    console = Console(io.StringIO(), log)
    console.status("loading")
    console.line("decode-0", '{"msg": "hello", "level": "info"}')
    before, after = log.getvalue().split("hello")
    assert before.startswith("\r\x1b[Kloading\r\x1b[K")
    assert "decode-0" in before
    assert after == "\nloading"
    console.clear()
    assert log.getvalue().endswith("\r\x1b[K")
