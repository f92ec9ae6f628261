"""The /metrics and /health server of a process."""

from __future__ import annotations

import json
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event, Thread

import pytest
from prometheus_client import CollectorRegistry, Counter

from mesh.errors import StartupError
from mesh.metrics import MAX_CONNECTIONS, Health, MetricsServer

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture
def registry() -> CollectorRegistry:
    found = CollectorRegistry()
    Counter("vllm:prompt_tokens", "Prompt tokens.", registry=found).inc(7)
    return found


@contextmanager
def running(registry: CollectorRegistry, health: Health | None = None) -> Iterator[str]:
    server = MetricsServer("127.0.0.1:0")
    server.start(registry, lambda: health or Health(True))
    try:
        yield server.address
    finally:
        server.close()


def fetch(address: str, path: str, accept: str = "*/*") -> tuple[int, str, str]:
    request = urllib.request.Request(f"http://{address}{path}", headers={"Accept": accept})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.status, response.headers["Content-Type"], response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


@pytest.mark.parametrize("accept", ["*/*", OPENMETRICS])
def test_names_keep_their_colon_in_every_format(registry: CollectorRegistry, accept: str) -> None:
    with running(registry) as address:
        status, kind, page = fetch(address, "/metrics", accept)
    assert status == 200
    assert kind.split(";")[0] == ("text/plain" if accept == "*/*" else "application/openmetrics-text")
    assert "vllm:prompt_tokens_total 7.0" in page


@pytest.mark.parametrize(("healthy", "status"), [(True, 200), (False, 503)])
def test_health_is_what_the_process_says(registry: CollectorRegistry, healthy: bool, status: int) -> None:
    with running(registry, Health(healthy, {"steps": 3})) as address:
        found, _, body = fetch(address, "/health")
    assert found == status
    assert json.loads(body) == {"healthy": healthy, "steps": 3}


def test_other_paths_are_not_found(registry: CollectorRegistry) -> None:
    with running(registry) as address:
        assert fetch(address, "/secrets")[0] == 404


def test_a_slow_answer_does_not_block_the_next(registry: CollectorRegistry) -> None:
    """A health check that hangs must leave /metrics alone."""
    asked, go_on = Event(), Event()

    def health() -> Health:
        asked.set()
        go_on.wait(10)
        return Health(True)

    server = MetricsServer("127.0.0.1:0")
    server.start(registry, health)
    waiting = Thread(target=fetch, args=(server.address, "/health"))
    waiting.start()
    assert asked.wait(10)
    assert fetch(server.address, "/metrics")[0] == 200
    go_on.set()
    waiting.join()
    server.close()


def test_idle_connections_are_bounded(registry: CollectorRegistry) -> None:
    with running(registry) as address:
        host, port = address.split(":")
        idle = [socket.create_connection((host, int(port)), 10) for _ in range(MAX_CONNECTIONS + 1)]
        assert idle[-1].recv(1) == b""
        for connection in idle:
            connection.close()


def test_no_address_means_no_server(registry: CollectorRegistry) -> None:
    server = MetricsServer("")
    server.start(registry)
    assert server.address == ""
    server.close()


def test_closing_twice_or_unstarted_is_harmless(registry: CollectorRegistry) -> None:
    MetricsServer("127.0.0.1:0").close()
    server = MetricsServer("127.0.0.1:0")
    server.start(registry)
    server.close()
    server.close()


@pytest.mark.parametrize(("bind", "code"), [("8000", 2), ("h:x", 2), ("h:99999", 2), ("taken", 4)])
def test_a_wrong_address_is_one_line(bind: str, code: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}" if bind == "taken" else bind
        with pytest.raises(StartupError) as caught:
            MetricsServer(address)
    assert caught.value.exit_code == code
