"""The proxy process: settings, tokenizer, control socket, HTTP server, in this order.

Shutdown, on SIGTERM or SIGINT:

    1. take no more requests: 503 `draining` with Retry-After; /ready says so
    2. wait for the streams under way, at most `DRAIN_S`; the rest end with an error event
    3. close the HTTP server, the control socket, the store

A second signal skips the waiting.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import secrets
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import uvicorn
import uvloop

from mesh import environment, host, logs, options, startup
from mesh.errors import EXIT_PORT, EXIT_USAGE, StartupError
from mesh.keys import PROXY, Keys
from mesh.keys import load as load_keys
from mesh.modeldir import model_names
from mesh.progress import report
from mesh.settings import ProxySettings
from mesh.store import check_store
from mesh.tokenizer import Tokenizer
from proxy.api.door import Door
from proxy.api.responses_redis import RedisStore
from proxy.api.responses_store import MemoryStore, ResponseStore
from proxy.app import create_app
from proxy.connection import HttpConnection
from proxy.control import ControlSocket
from proxy.dispatcher import MeshDispatcher
from proxy.fleet import Fleet
from proxy.fleet_metrics import FleetCollector
from proxy.metrics import ProxyMetrics
from proxy.routing.place import Place
from proxy.routing.residency import BlockChange, LocalResidency
from proxy.routing.residency_redis import RedisFollower

log = logging.getLogger("proxy")

PROG = "kvmesh serve proxy"
GC_ALLOCATIONS = 20_000
"""Net, between collections of the youngest objects."""
DRAIN_S = 30.0
LAST_WORDS_S = 2.0
"""For error events, and for connections that uvicorn closes, after the draining time."""
KEEP_ALIVE_S = 75
"""Idle connections: longer than the usual minute of load balancers, so that they close first."""
SPARE_CONNECTIONS = 1024
"""Beside the requests: health checks, scrapes, idle connections."""


class Server(uvicorn.Server):
    """Signals begin a drain instead of an end."""

    def __init__(self, config: uvicorn.Config, on_signal: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_signal = on_signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self._on_signal()


def main() -> int:
    return startup.run(PROG, body)


def body() -> int:
    settings = options.parse(ProxySettings, sys.argv[1:], prog=PROG, description="One proxy.")
    logs.setup(settings.log_level, "proxy")
    environment.check()
    if not settings.model:
        raise StartupError("a model directory is needed: its tokenizer and chat template", EXIT_USAGE)
    keys = load_keys(settings.keys, PROXY)
    tokenizer = Tokenizer.load(settings.model)
    check_store(settings.store)
    listener = listen(settings.host, settings.port)
    collect_garbage_rarely()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(settings, tokenizer, listener, keys))
    return 0


def collect_garbage_rarely() -> None:
    """A token makes dozens of objects that reference counting frees. Looking for cycles among those of a thousand
    streams after every 700 would take a tenth of the time and hold every stream up."""
    gc.freeze()
    gc.set_threshold(GC_ALLOCATIONS, 20, 20)


def listen(address: str, port: int) -> socket.socket:
    """The HTTP server's socket. Raises `StartupError`."""
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(
            address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise _cannot_listen(address, port, error) from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(target)
        listener.listen()
    except OSError as error:
        listener.close()
        raise _cannot_listen(address, port, error) from None
    return listener


def _cannot_listen(address: str, port: int, error: OSError) -> StartupError:
    reason = (error.strerror or str(error)).lower()
    return StartupError(f"cannot listen on {address}:{port}: {reason}", EXIT_PORT)


async def serve(settings: ProxySettings, tokenizer: Tokenizer, listener: socket.socket, keys: Keys | None) -> None:
    """Serves until a signal has ended it. Raises `StartupError`."""
    loop = asyncio.get_running_loop()
    index = LocalResidency()
    fleet = Fleet(index, time.monotonic, loop.call_soon)
    follower = open_follower(settings.store, loop, fleet)
    if follower is not None:
        fleet.on_model = follower.follow
    dispatcher = MeshDispatcher(
        fleet,
        time.monotonic,
        max_requests=settings.max_concurrent_requests,
        disaggregate_above=settings.disaggregate_above,
    )
    control = ControlSocket(f"proxy-{secrets.token_hex(8)}", time.time_ns(), host.identity(), fleet, keys)
    try:
        control.bind(settings.control)
        fleet.connect(control, dispatcher)
        control.start()
        dispatcher.start()
        await serve_http(settings, tokenizer, listener, dispatcher, collector(fleet, dispatcher, control))
    finally:
        dispatcher.close()
        control.close()
        if follower is not None:
            await asyncio.to_thread(follower.close)


def collector(fleet: Fleet, dispatcher: MeshDispatcher, control: ControlSocket) -> FleetCollector:
    return FleetCollector(fleet, dispatcher, lambda: control.bad_frames, lambda: control.refused_keys)


def open_follower(store: str, loop: asyncio.AbstractEventLoop, fleet: Fleet) -> RedisFollower | None:
    """Residency from Redis, handed to the event loop; None when workers tell it themselves."""
    if store == "memory":
        return None

    def apply(worker: Place, change: BlockChange, applied: Callable[[], None]) -> None:
        fleet.apply(worker, change)
        applied()

    def deliver(worker: Place, change: BlockChange, applied: Callable[[], None]) -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(apply, worker, change, applied)

    return RedisFollower(store, deliver)


def open_responses(settings: ProxySettings) -> ResponseStore:
    """Where /v1/responses keeps its answers. Raises `StartupError` for a URL that means nothing."""
    if settings.store == "memory":
        return MemoryStore(settings.response_ttl)
    return RedisStore(settings.store, settings.response_ttl)


async def serve_http(
    settings: ProxySettings,
    tokenizer: Tokenizer,
    listener: socket.socket,
    dispatcher: MeshDispatcher,
    fleet_metrics: FleetCollector,
) -> None:
    name, *aliases = model_names(Path(settings.model), settings.served_model_name)
    responses = open_responses(settings)
    metrics = ProxyMetrics(name)
    metrics.registry.register(fleet_metrics)
    door = Door(settings.max_concurrent_requests)
    app = create_app(
        dispatcher, tokenizer, settings, name, aliases=aliases, metrics=metrics, door=door, responses=responses
    )
    config = uvicorn.Config(
        app,
        http=HttpConnection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=settings.max_concurrent_requests + SPARE_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(LAST_WORDS_S),
    )
    loop = asyncio.get_running_loop()
    stop = Shutdown(door, dispatcher)
    server = Server(config, lambda: loop.call_soon_threadsafe(stop.signalled))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    report("ready", 1.0)
    log.info("serving %s on %s:%d", name, *listener.getsockname()[:2])
    stopping = asyncio.create_task(stop.run())
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    server.should_exit = True
    stopping.cancel()
    await serving
    await responses.close()


class Shutdown:
    """The sequence in the module's docstring, up to closing the server."""

    def __init__(self, door: Door, dispatcher: MeshDispatcher) -> None:
        self._door = door
        self._dispatcher = dispatcher
        self._asked = asyncio.Event()
        self._now = asyncio.Event()

    def signalled(self) -> None:
        if self._asked.is_set():
            self._now.set()
        self._asked.set()

    async def run(self) -> None:
        await self._asked.wait()
        log.info("draining: %d requests under way", self._door.in_flight)
        self._door.draining = True
        self._dispatcher.drain()
        await self._until_empty(DRAIN_S)
        self._dispatcher.close()
        await self._until_empty(LAST_WORDS_S)

    async def _until_empty(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while self._door.in_flight and time.monotonic() < until and not self._now.is_set():
            await asyncio.sleep(0.05)


if __name__ == "__main__":
    sys.exit(main())
