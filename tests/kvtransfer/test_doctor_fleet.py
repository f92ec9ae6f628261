"""`kvmesh doctor --url`: what each pair of a fleet's workers converts, read from a proxy's own page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

from prometheus_client import CollectorRegistry, generate_latest

from kvtransfer.doctor_fleet import Finding, exchanges
from mesh.layout import KvLayout
from proxy.dispatcher import MeshDispatcher
from proxy.fleet import Fleet
from proxy.fleet_metrics import FleetCollector
from proxy.routing.place import Place
from proxy.routing.pool import Worker
from proxy.routing.residency import LocalResidency
from tests.worker.role_fakes import LAYOUT, info


def page(*layouts: KvLayout) -> bytes:
    """/metrics of a proxy whose workers have these layouts."""
    fleet = Fleet(LocalResidency(), lambda: 0.0, lambda later: None)
    for number, layout in enumerate(layouts):
        place = Place(f"w{number}", 1)
        facts = replace(info(), worker_id=place.worker_id, layout=layout)
        fleet.pool._workers[place] = Worker(facts, place, 0.0, 0.0)
    registry = CollectorRegistry()
    dispatcher = MeshDispatcher(fleet, lambda: 0.0, max_requests=1, disaggregate_above=0)
    registry.register(FleetCollector(fleet, dispatcher, lambda: 0, lambda: 0))
    return generate_latest(registry)


@contextmanager
def serving(text: bytes) -> Iterator[str]:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/metrics" else 404)
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_: object) -> None:
            """Nothing on stderr."""

    server = HTTPServer(("127.0.0.1", 0), Page)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


def test_equal_workers_are_one_line() -> None:
    with serving(page(LAYOUT, LAYOUT)) as url:
        assert exchanges(url) == [Finding("ok", "2 workers, none has to convert")]


def test_each_direction_of_an_unequal_pair_is_said() -> None:
    floats = replace(LAYOUT, dtype="bfloat16")
    with serving(page(floats, replace(floats, block_tokens=64, dtype="float32"))) as url:
        assert exchanges(url) == [
            Finding("note", "w0 to w1: block_tokens 4 -> 64, dtype bfloat16 -> float32"),
            Finding("note", "w1 to w0: block_tokens 64 -> 4, dtype float32 -> bfloat16"),
        ]


def test_a_pair_that_cannot_exchange_is_a_failure_with_the_field() -> None:
    with serving(page(LAYOUT, replace(LAYOUT, layers=2))) as url:
        assert [f.state for f in exchanges(url)] == ["fail", "fail"]
        assert "no blocks, layers 1 -> 2" in exchanges(url)[0].text


def test_a_proxy_that_does_not_answer_is_a_failure() -> None:
    (found,) = exchanges("http://127.0.0.1:1")
    assert found.state == "fail"


def test_a_page_that_is_none_is_a_failure() -> None:
    with serving(b"\xff what { is this") as url:
        (found,) = exchanges(url)
    assert found.state == "fail"
