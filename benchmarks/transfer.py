"""KV block transfer between two processes, per transport and block size, beside a plain memory copy.

    python benchmarks/transfer.py [--json] [--mib 256] [--rounds 5]

One process holds blocks, this one fetches them through two `KvEndpoint`s, digests checked, and copies each into its
page, as a decode worker does. GB/s count payload bytes once, from `fetch` to `FetchEnded`. `memcpy` copies blocks of
the same size over the same amount of memory with numpy, in the same rounds; `ratio` is transport / memcpy. `local` runs
holder and fetcher in this one process and moves no bytes but into the pages. `zmq-aes` is `zmq-tcp` with `--keys`.
`raw-tcp` is ZeroMQ alone: the same parts over tcp into the same pages, without a protocol, digest or window. Two more
ratios compare within the run: `zmq-aes` / `zmq-tcp`, and `zmq-tcp` / `raw-tcp`.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import zmq

from kvtransfer.endpoint import BlockArrived, FetchEnded, KvEndpoint, NeedBlocks, Wanted
from kvtransfer.transports.base import parcel_bytes
from kvtransfer.transports.local import Exchange
from kvtransfer.transports.shm import remove_orphans
from mesh.keys import WORKER, create, load
from mesh.layout import KvLayout
from mesh.messages import Peer

BLOCK_KIB = (16, 192, 1024, 2048)
ROUTES = ("local", "shm", "zmq-ipc", "zmq-tcp", "zmq-aes")
RAW = "raw-tcp"
RAW_QUEUE = 32
"""Messages: as much under way as a transfer's window."""
COMPARED = (("zmq-aes", "zmq-tcp"), ("zmq-tcp", RAW))
FETCH_LIMIT_S = 120.0
Context = zmq.Context[zmq.Socket[bytes]]
Pages = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Figure:
    """One transport at one block size."""

    transport: str
    block_kib: int
    gb_per_s: float
    """Best round."""
    median_gb_per_s: float
    ratio: float
    """Best round beside the best of memcpy."""


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
        )
        self.poller = zmq.Poller()
        self.watched: set[zmq.Socket[bytes]] = set()
        self.held = [os.urandom(kib << 10) for _ in range(max(1, (64 << 10) // kib))]

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


def serve_raw(kib: int) -> None:
    """The sending process of `raw-tcp`: answers a number with so many bytes in parts as a holder's."""
    context: Context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.sndhwm = RAW_QUEUE
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # or it would drop what does not fit its queue, and not wait
    print(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}", flush=True)
    part = os.urandom(parcel_bytes(kib << 10))
    while True:
        link, size = socket.recv_multipart()
        for _ in range(-(-int(size) // len(part))):
            socket.send_multipart((link, b"head", part), copy=False)


def fetch_raw(socket: zmq.Socket[bytes], pages: Pages) -> float:
    """Seconds to bring as many bytes as `pages` has, each part into its place."""
    flat = pages.reshape(-1)
    began = time.perf_counter()
    socket.send(str(pages.nbytes).encode())
    at = 0
    while at < pages.nbytes:
        part = np.frombuffer(socket.recv_multipart(copy=False)[1].buffer, dtype=np.uint8)
        size = min(len(part), pages.nbytes - at)
        np.copyto(flat[at : at + size], part[:size])
        at += size
    return time.perf_counter() - began


def measure_raw(kib: int, pages: Pages, rounds: int) -> list[float]:
    context: Context = zmq.Context()
    with started(RAW, "", kib) as address, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.rcvhwm = RAW_QUEUE
        socket.connect(address)
        fetch_raw(socket, pages)
        times = [fetch_raw(socket, pages) for _ in range(rounds)]
    context.term()
    return times


@contextmanager
def started(route: str, folder: str, kib: int) -> Iterator[str]:
    """The other process; gives its address."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--serve", route, folder, str(kib)], stdout=subprocess.PIPE, text=True
    )
    try:
        if process.stdout is None:
            raise RuntimeError("no pipe to the holder")
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait()
        remove_orphans()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def holder(
    route: str, folder: str, kib: int, context: Context, exchange: Exchange
) -> Iterator[tuple[Peer, Station | None]]:
    if route == "local":
        station = Station(context, route, folder, kib, exchange, 7)
        yield station.endpoint.peer, station
        station.endpoint.close()
        return
    with started(route, folder, kib) as address:
        yield Peer("7", 7, address, "bench"), None


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


def measure(kib: int, mib: int, rounds: int) -> list[Figure]:
    blocks = max(1, (mib << 10) // kib)
    pages = np.zeros((blocks, kib << 10), dtype=np.uint8)
    source = np.ones_like(pages)
    size = pages.nbytes / 1e9
    copies = [copy_once(source, pages) for _ in range(rounds)]
    times: dict[str, list[float]] = {"memcpy": copies}
    times[RAW] = measure_raw(kib, pages, rounds)
    for route in ROUTES:
        exchange = Exchange()
        context: Context = zmq.Context()
        with (
            key_folder() as folder,
            holder(route, folder, kib, context, exchange) as (peer, other),
        ):
            station = Station(context, route, folder, kib, exchange, 9)
            fetch_once(station, other, peer, pages)
            times[route] = [fetch_once(station, other, peer, pages) for _ in range(rounds)]
            station.endpoint.close()
        context.term()
        copies += [copy_once(source, pages) for _ in range(2)]
    best = size / min(copies)
    return [
        Figure(name, kib, size / min(t), size / statistics.median(t), size / min(t) / best) for name, t in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--mib", type=int, default=256, help="payload per fetch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve", nargs=3, metavar=("ROUTE", "FOLDER", "KIB"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve and args.serve[0] == RAW:
        serve_raw(int(args.serve[2]))
    if args.serve:
        serve(args.serve[0], args.serve[1], int(args.serve[2]))
        return
    figures = [f for kib in BLOCK_KIB for f in measure(kib, args.mib, args.rounds)]
    if args.json:
        print(json.dumps({"mib": args.mib, "cpus": os.cpu_count(), "figures": [asdict(f) for f in figures]}))
        return
    print(f"{'transport':<10}{'block':>10}{'GB/s best':>12}{'median':>9}{'ratio':>8}")
    for f in figures:
        print(f"{f.transport:<10}{f.block_kib:>6} KiB{f.gb_per_s:>12.2f}{f.median_gb_per_s:>9.2f}{f.ratio:>8.2f}")
    for kib in BLOCK_KIB:
        best = {f.transport: f.gb_per_s for f in figures if f.block_kib == kib}
        ratios = "   ".join(f"{a} / {b} {best[a] / best[b]:.2f}" for a, b in COMPARED)
        print(f"{kib:>4} KiB   {ratios}")


if __name__ == "__main__":
    main()
