"""Two endpoints in one process, pumped by hand, and blocks whose bytes follow from their names."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import zmq

from kvtransfer.endpoint import BlockArrived, Event, FetchEnded, KvEndpoint, NeedBlocks, Wanted
from kvtransfer.sockets import Context
from kvtransfer.transports.base import Transport
from kvtransfer.transports.local import Exchange
from mesh.keys import Keys
from mesh.layout import KvLayout

LAYOUT = KvLayout(layers=2, kv_heads=1, head_dim=8, block_tokens=4, dtype="float32")
WALL_LIMIT_S = 20.0
ROUTES = ("local", "shm", "zmq-ipc", "zmq-tcp")
E = TypeVar("E", bound=Event)


def name(number: int) -> bytes:
    return hashlib.blake2b(number.to_bytes(8, "little"), digest_size=16).digest()


def content(block: bytes, size: int = LAYOUT.block_bytes) -> bytes:
    return hashlib.shake_128(block).digest(size)


def transfer_id(number: int) -> bytes:
    return number.to_bytes(16, "big")


def wanted(numbers: Sequence[int]) -> tuple[Wanted, ...]:
    return tuple(Wanted(n, name(n), LAYOUT.block_tokens) for n in numbers)


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Side:
    """An endpoint, what it told, and which blocks its engine holds."""

    def __init__(self, endpoint: KvEndpoint) -> None:
        self.endpoint = endpoint
        self.held: dict[bytes, bytes] = {}
        self.events: list[Event] = []
        self.answers = True
        """Whether the engine answers `NeedBlocks`."""

    def hold(self, numbers: Sequence[int]) -> None:
        self.held.update({name(n): content(name(n), self.endpoint.layout.block_bytes) for n in numbers})

    def produce(self, stream: str, numbers: Sequence[int]) -> None:
        """As a step loop does: only what somebody wants."""
        self.hold(numbers)
        for n in numbers:
            if name(n) in self.endpoint.wants(stream):
                self.endpoint.produced(stream, name(n), self.held[name(n)])

    def take(self, events: list[Event]) -> None:
        self.events += events
        for event in events:
            if isinstance(event, NeedBlocks) and self.answers:
                for block in event.names:
                    self.endpoint.provide(block, self.held.get(block))

    def of(self, kind: type[E]) -> list[E]:
        return [e for e in self.events if isinstance(e, kind)]

    def blocks(self, transfer: bytes) -> dict[int, bytes]:
        return {e.index: bytes(e.payload) for e in self.of(BlockArrived) if e.transfer_id == transfer}

    def ended(self, transfer: bytes) -> FetchEnded | None:
        return next((e for e in self.of(FetchEnded) if e.transfer_id == transfer), None)

    def turn(self, ready: set[object]) -> None:
        for socket in self.endpoint.sockets():
            if socket in ready:
                self.take(self.endpoint.receive(socket))
        self.take(self.endpoint.tick())


class Pair:
    """A fetcher and a holder; `run` pumps both until something holds."""

    def __init__(self, fetcher: Side, holder: Side, clock: Clock) -> None:
        self.fetcher = fetcher
        self.holder = holder
        self.clock = clock
        self.sides = [fetcher, holder]

    def round(self, wait_ms: int = 20) -> None:
        poller = zmq.Poller()
        for side in self.sides:
            for socket in side.endpoint.sockets():
                poller.register(socket, zmq.POLLIN)
        ready: set[object] = {s for s, _ in poller.poll(wait_ms)}
        for side in self.sides:
            side.turn(ready)

    def run(self, until: Callable[[], object]) -> None:
        limit = time.monotonic() + WALL_LIMIT_S
        while not until():
            assert time.monotonic() < limit, "it never happened"
            self.round()

    def settle(self) -> None:
        """Until neither side has anything to read."""
        for _ in range(3):
            self.round(wait_ms=5)

    def fetch(self, transfer: bytes, stream: str, blocks: Sequence[Wanted], deadline_s: float = 60.0) -> None:
        peer = self.holder.endpoint.peer
        self.fetcher.endpoint.fetch(transfer, 1, peer, stream, blocks, deadline_s)

    def finish(self, transfer: bytes) -> FetchEnded:
        self.run(lambda: self.fetcher.ended(transfer))
        ended = self.fetcher.ended(transfer)
        assert ended is not None
        return ended

    def assert_nothing_left(self) -> None:
        """No transfer, stream, slot or unflushed parcel on either side."""
        self.run(lambda: not any(s.endpoint.stats().open_transfers for s in self.sides))
        for side in self.sides:
            stats = side.endpoint.stats()
            assert (stats.fetching, stats.serving, stats.held_streams, stats.slots) == (0, 0, 0, 0)


def unchanged(transport: Transport) -> Transport:
    return transport


def make_side(
    context: Context,
    folder: Path,
    route: str,
    clock: Callable[[], float],
    *,
    worker: str,
    incarnation: int,
    exchange: Exchange | None = None,
    layout: KvLayout = LAYOUT,
    wrap: Callable[[Transport], Transport] = unchanged,
    keys: Keys | None = None,
) -> Side:
    endpoint = KvEndpoint(
        context=context,
        bind="tcp://127.0.0.1:0" if route == "zmq-tcp" else f"ipc://{folder}/{worker}-{incarnation}",
        worker_id=worker,
        incarnation=incarnation,
        host="here",
        layout=layout,
        transports=(route.split("-")[0],),
        clock=clock,
        exchange=exchange,
        wrap=wrap,
        keys=keys,
        device="cuda" if route == "cuda" else "cpu",
    )
    return Side(endpoint)


@contextmanager
def connected(
    folder: Path,
    route: str = "zmq-ipc",
    *,
    layout: KvLayout = LAYOUT,
    wrap: Callable[[Transport], Transport] = unchanged,
) -> Iterator[Pair]:
    """A pair over one route; `wrap` is put around the fetcher's transports."""
    context: Context = zmq.Context()
    clock, exchange = Clock(), Exchange()
    holder = make_side(context, folder, route, clock, worker="p", incarnation=7, exchange=exchange, layout=layout)
    fetcher = make_side(
        context, folder, route, clock, worker="d", incarnation=9, exchange=exchange, layout=layout, wrap=wrap
    )
    pair = Pair(fetcher, holder, clock)
    try:
        yield pair
    finally:
        for side in (fetcher, holder):
            side.endpoint.close()
        context.term()


@contextmanager
def encrypted(folder: Path, fetcher_keys: Keys | None, holder_keys: Keys | None) -> Iterator[Pair]:
    """A pair over tcp, each with its own keys and context."""
    contexts: list[Context] = [zmq.Context(), zmq.Context()]
    clock = Clock()
    holder = make_side(contexts[0], folder, "zmq-tcp", clock, worker="p", incarnation=7, keys=holder_keys)
    fetcher = make_side(contexts[1], folder, "zmq-tcp", clock, worker="d", incarnation=9, keys=fetcher_keys)
    try:
        yield Pair(fetcher, holder, clock)
    finally:
        for side in (fetcher, holder):
            side.endpoint.close()
        for context in contexts:
            context.term()
