"""`/metrics` and `/health` of a process, over HTTP in threads of their own.

A step loop that hangs cannot keep them from answering, and a scrape never runs in a step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import BoundedSemaphore, Thread
from typing import Any, cast
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics

from mesh.errors import EXIT_PORT, EXIT_USAGE, StartupError

MAX_CONNECTIONS = 8
"""One or two scrapers and a probe; a ninth connection is closed at once."""
CLIENT_SECONDS = 5.0
"""A client that sends its request more slowly than that is cut off."""
POLL_SECONDS = 0.1
"""How long `close` may wait for the accepting thread."""


@dataclass(frozen=True, slots=True)
class Health:
    """`healthy` decides between 200 and 503; `detail` joins the JSON body."""

    healthy: bool
    detail: Mapping[str, Any] = field(default_factory=dict)


def render(registry: CollectorRegistry, accept: str = "") -> tuple[bytes, str]:
    """The page of `registry` and its content type, as the scraper's Accept header asks for it.

    Names keep their colon: without `allow-utf-8`, OpenMetrics would rename `vllm:x` to `vllm_x`.
    """
    if "application/openmetrics-text" in accept:
        page: bytes = openmetrics.generate_latest(registry, escaping="allow-utf-8")  # type: ignore[no-untyped-call]
        return page, openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


def always_healthy() -> Health:
    return Health(True)


class MetricsServer:
    """Holds its port from construction on and answers from `start` to `close`."""

    def __init__(self, bind: str) -> None:
        """`bind` is `HOST:PORT` (port 0: any), or empty for no server at all. Raises `StartupError`."""
        self.address = ""
        """`HOST:PORT` as bound, or empty."""
        self._server: _Server | None = None
        self._thread: Thread | None = None
        if bind:
            host, port = _host_and_port(bind)
            try:
                self._server = _Server((host, port))
            except OSError as error:
                raise StartupError(f"metrics cannot listen on {bind}: {error.strerror}", EXIT_PORT) from None
            bound_host, bound_port = self._server.server_address[:2]
            self.address = f"{bound_host!s}:{bound_port}"

    def start(self, registry: CollectorRegistry, health: Callable[[], Health] = always_healthy) -> None:
        """Serves `registry`; `health` is asked in the server's threads."""
        if self._server is None:
            return
        self._server.pages = _Pages(registry, health)
        self._thread = Thread(target=self._server.serve_forever, args=(POLL_SECONDS,), name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Frees the port; idempotent."""
        server, thread = self._server, self._thread
        self._server = self._thread = None
        if server is not None:
            if thread is not None:
                server.shutdown()
                thread.join()
            server.server_close()


@dataclass(frozen=True, slots=True)
class _Pages:
    registry: CollectorRegistry
    health: Callable[[], Health]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    pages: _Pages

    def __init__(self, address: tuple[str, int]) -> None:
        self._slots = BoundedSemaphore(MAX_CONNECTIONS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        """Without HTTPServer's look-up of the host's name, which can take seconds and is not used."""
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._slots.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._slots.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that leaves in the middle is no event."""


class _Handler(BaseHTTPRequestHandler):
    timeout = CLIENT_SECONDS

    def do_GET(self) -> None:
        pages = cast(_Server, self.server).pages
        path = urlsplit(self.path).path
        if path == "/metrics":
            self._answer(200, *render(pages.registry, self.headers.get("Accept", "")))
        elif path == "/health":
            health = pages.health()
            body = json.dumps({"healthy": health.healthy, **health.detail}).encode()
            self._answer(200 if health.healthy else 503, body, "application/json")
        else:
            self._answer(404, b"/metrics and /health are here\n", "text/plain; charset=utf-8")

    def log_message(self, format: str, *args: Any) -> None:
        """Scrapes are not logged."""

    def _answer(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _host_and_port(bind: str) -> tuple[str, int]:
    host, colon, port = bind.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise StartupError(f"{bind!r} is no address for metrics; give HOST:PORT", EXIT_USAGE)
    return host.strip("[]"), int(port)
