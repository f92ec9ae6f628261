"""Blocks from one process to another over one transport, to see that it works and how fast.

One process holds blocks, this one fetches them through two `KvEndpoint`s, digests checked, and copies each into its
page, as a decode worker does. A route is a transport and the socket that it needs:

    local     within this process; no bytes move but into the pages
    shm       shared memory, its messages over a Unix socket
    zmq-ipc   ZeroMQ over a Unix socket
    zmq-tcp   ZeroMQ over tcp
    zmq-aes   the same, sealed, as with `--keys`
    cuda      memory of a CUDA device, its messages over a Unix socket
    gloo      a group of two ranks over loopback, its messages over a Unix socket
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import zmq

from kvtransfer.endpoint import BlockArrived, FetchEnded, KvEndpoint, NeedBlocks, Wanted
from kvtransfer.transports.local import Exchange
from kvtransfer.transports.shm import remove_orphans
from mesh.keys import WORKER, create, load
from mesh.layout import KvLayout
from mesh.messages import Peer

ROUTES = ("local", "shm", "zmq-ipc", "zmq-tcp", "zmq-aes", "gloo", "cuda")
FETCH_LIMIT_S = 120.0
HELD_BYTES = 64 << 20
"""Different blocks of a holder: more than a cache has room for."""
Context = zmq.Context[zmq.Socket[bytes]]
Pages = npt.NDArray[np.uint8]


def layout_of(block_kib: int) -> KvLayout:
    """[layers, 2, 8, 16, 64] uint8: 16 KiB per layer."""
    return KvLayout(layers=block_kib // 16, kv_heads=8, head_dim=64, block_tokens=16, dtype="uint8")


def block_name(number: int) -> bytes:
    return number.to_bytes(16, "big")


class Station:
    """An endpoint and the loop around it; answers every `NeedBlocks` from a few blocks that it holds."""

    def __init__(self, context: Context, route: str, folder: str, kib: int, exchange: Exchange, worker: int) -> None:
        self.endpoint = KvEndpoint(
            context=context,
            bind="tcp://127.0.0.1:0" if route in ("zmq-tcp", "zmq-aes") else f"ipc://{folder}/{worker}",
            worker_id=str(worker),
            incarnation=worker,
            host="bench",
            layout=layout_of(kib),
            transports=(route.split("-")[0],),
            clock=time.monotonic,
            exchange=exchange,
            keys=load(folder, WORKER) if route == "zmq-aes" else None,
            device="cuda" if route == "cuda" else "cpu",
        )
        self.poller = zmq.Poller()
        self.watched: set[zmq.Socket[bytes]] = set()
        self.held = [os.urandom(kib << 10) for _ in range(max(1, HELD_BYTES // (kib << 10)))]

    def turn(self, wait_ms: int) -> list[BlockArrived | FetchEnded]:
        current = set(self.endpoint.sockets())
        for socket in self.watched - current:
            self.poller.unregister(socket)
        for socket in current - self.watched:
            self.poller.register(socket, zmq.POLLIN)
        self.watched = current
        due = self.endpoint.next_deadline() <= time.monotonic()
        ready = {s for s, _ in self.poller.poll(0 if due else wait_ms)}
        events = [e for s in current if s in ready for e in self.endpoint.receive(s)]
        events += self.endpoint.tick()
        for event in events:
            if isinstance(event, NeedBlocks):
                for name in event.names:
                    self.endpoint.provide(name, self.held[int.from_bytes(name, "big") % len(self.held)])
        return [e for e in events if isinstance(e, (BlockArrived, FetchEnded))]


def serve(route: str, folder: str, kib: int) -> None:
    """The holding process."""
    station = Station(zmq.Context(), route, folder, kib, Exchange(), 7)
    print(station.endpoint.address, flush=True)
    while True:
        station.turn(50)


class Spent(NamedTuple):
    """What one fetch took."""

    seconds: float
    cpu_seconds: float
    """Processor time of the busier of the two processes, which says more than `seconds` where others compute too."""


def cpu_seconds(pid: int) -> float:
    """Processor time of all threads that the process has now."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(task.read_text().split()[0]) for task in tasks) / 1e9


@contextmanager
def started(*arguments: str) -> Iterator[tuple[str, int]]:
    """Another Python process, which prints an address; gives that and its process id."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    try:
        if process.stdout is None:
            raise RuntimeError("no pipe to the holder")
        yield process.stdout.readline().strip(), process.pid
    finally:
        process.terminate()
        process.wait()
        remove_orphans()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def holder(
    route: str, folder: str, kib: int, context: Context, exchange: Exchange
) -> Iterator[tuple[Peer, Station | None, int]]:
    """A holder, in this process or (None) in the one with that id."""
    if route == "local":
        station = Station(context, route, folder, kib, exchange, 7)
        yield station.endpoint.peer, station, os.getpid()
        station.endpoint.close()
        return
    with started("-P", "-m", "kvtransfer.linktest", route, folder, str(kib)) as (address, pid):
        yield Peer("7", 7, address, "bench", layout_of(kib)), None, pid


def fetch_once(station: Station, other: Station | None, peer: Peer, pages: Pages) -> float:
    """Seconds to bring all of `pages`, `[blocks, block_bytes]`."""
    layout = station.endpoint.layout
    wanted = [Wanted(i, block_name(i), layout.block_tokens) for i in range(len(pages))]
    transfer_id = secrets.token_bytes(16)
    began = time.perf_counter()
    station.endpoint.fetch(transfer_id, 0, peer, "", wanted, FETCH_LIMIT_S)
    while True:
        for event in station.turn(0 if other is not None else 50):
            if isinstance(event, BlockArrived):
                np.copyto(pages[event.index], np.frombuffer(event.payload, dtype=np.uint8))
            elif event.outcome != "ok" or event.missing:
                raise RuntimeError(f"the fetch ended: {event.outcome}, {len(event.missing)} missing")
            else:
                return time.perf_counter() - began
        if other is not None:
            other.turn(0)


@contextmanager
def key_folder() -> Iterator[str]:
    """A private directory for sockets, with keys."""
    with tempfile.TemporaryDirectory() as folder:
        create(Path(folder))
        yield folder


def copy_once(source: Pages, pages: Pages) -> float:
    began = time.perf_counter()
    for page, block in zip(pages, source, strict=True):
        np.copyto(page, block)
    return time.perf_counter() - began


def spent(fetch: Callable[[], float], pid: int) -> Spent:
    """What `fetch`, which gives its seconds, takes of this process and of the one with that id."""
    before = (cpu_seconds(pid), time.process_time())
    seconds = fetch()
    return Spent(seconds, max(cpu_seconds(pid) - before[0], time.process_time() - before[1]))


def link_times(route: str, pages: Pages, rounds: int) -> list[Spent]:
    """Of each of `rounds` fetches of all of `pages`, `[blocks, block_bytes]`, after one that is not counted.
    Raises `RuntimeError` when a fetch does not bring everything."""
    kib, exchange, context = pages.shape[1] >> 10, Exchange(), Context()
    with key_folder() as folder, holder(route, folder, kib, context, exchange) as (peer, other, pid):
        station = Station(context, route, folder, kib, exchange, 9)
        try:
            fetch_once(station, other, peer, pages)
            times = [spent(partial(fetch_once, station, other, peer, pages), pid) for _ in range(rounds)]
            carried = {name for name, size in station.endpoint.stats().bytes_in.items() if size}
        finally:
            station.endpoint.close()
    context.term()
    if carried != {route.split("-")[0]}:
        raise RuntimeError(f"the blocks went by {', '.join(sorted(carried))}")
    return times


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
