"""Which store a mesh gets, and what is said of one that is not there."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from mesh import store
from mesh.errors import EXIT_STORE, StartupError
from mesh.store import check_store, choose_store


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def refusal(url: str) -> str:
    with pytest.raises(StartupError) as caught:
        check_store(url)
    assert caught.value.exit_code == EXIT_STORE
    return str(caught.value)


def test_auto_is_memory_where_nothing_is_installed(tmp_path: Path) -> None:
    if store.embedded_server() is None:
        assert choose_store("auto", {}, tmp_path).url == "memory"


def test_auto_takes_the_external_store_first(tmp_path: Path) -> None:
    assert choose_store("auto", {"KVMESH_STORE": "memory"}, tmp_path).url == "memory"
    with pytest.raises(StartupError):
        choose_store("auto", {"KVMESH_STORE": "redis://127.0.0.1:1/0"}, tmp_path)


def test_auto_starts_an_embedded_server_if_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "embedded_server", lambda: Path("/opt/valkey-server"))
    chosen = choose_store("auto", {}, tmp_path)
    assert chosen.command[0] == "/opt/valkey-server"
    assert chosen.url == f"unix://{tmp_path}/store.sock"


@pytest.mark.parametrize("url", ["http://x", "redis://", "redis://:0", "redis://h:x", "disk", "", "unix://"])
def test_what_is_no_store_is_refused(url: str) -> None:
    assert "give memory, redis://HOST:PORT/DB" in refusal(url)


def test_a_closed_port_is_named_without_the_password() -> None:
    text = refusal("redis://user:hunter22@127.0.0.1:1/0")
    assert "does not answer" in text
    assert "hunter22" not in text


@pytest.mark.parametrize(
    ("answer", "right"), [(b"+PONG\r\n", True), (b"-NOAUTH x\r\n", True), (b"HTTP/1.1 400", False)]
)
def test_only_a_redis_server_will_do(listener: socket.socket, answer: bytes, right: bool) -> None:
    def serve() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(64)
            connection.sendall(answer)

    thread = Thread(target=serve)
    thread.start()
    url = f"redis://127.0.0.1:{listener.getsockname()[1]}/0"
    if right:
        check_store(url)
    else:
        assert "is not a Redis server" in refusal(url)
    thread.join()


def test_the_embedded_servers_command_starts_a_redis(tmp_path: Path) -> None:
    chosen = store.embedded(Path("/usr/bin/redis-server"), tmp_path)
    with subprocess.Popen(chosen.command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if b"ready to accept" in line.lower():
                    break
            check_store(chosen.url)
        finally:
            process.kill()
