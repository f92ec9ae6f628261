"""KV block transfer between two processes, per transport and block size, beside a plain memory copy.

    python benchmarks/transfer.py [--json] [--mib 256] [--rounds 5]

One process holds blocks, this one fetches them through two `KvEndpoint`s, digests checked, and copies each into its
page, as a decode worker does. GB/s count payload bytes once, from `fetch` to `FetchEnded`. `memcpy` copies blocks of
the same size over the same amount of memory with numpy, in the same rounds. `ratio` is transport / memcpy, of the best
rounds; `cpu` is the same of processor time, memcpy's / that of the busier process, of the medians: what two idle
processors would reach, and the steadier figure on a machine that others use. `local` runs holder and fetcher in this
one process and moves no bytes but into the pages. `zmq-aes` is `zmq-tcp` with `--keys`. `raw-tcp` is ZeroMQ alone: the
same parts over tcp into the same pages, without a protocol, digest or window. Two more ratios compare within the run:
`zmq-aes` / `zmq-tcp`, and `zmq-tcp` / `raw-tcp`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import torch
import zmq

from kvtransfer.linktest import HELD_BYTES, ROUTES, Context, Pages, Spent, copy_once, link_times, spent, started
from kvtransfer.transports.base import parcel_bytes
from kvtransfer.transports.choice import unfit

BLOCK_KIB = (16, 192, 1024, 2048)
RAW = "raw-tcp"
RAW_QUEUE = 32
"""Messages: as much under way as a transfer's window."""
COMPARED = (("zmq-aes", "zmq-tcp"), ("zmq-tcp", RAW))


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
    cpu: float
    """Likewise by the medians of processor time."""


def serve_raw(kib: int) -> None:
    """The sending process of `raw-tcp`: answers a number with so many bytes in parts as a holder's."""
    context: Context = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.sndhwm = RAW_QUEUE
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # or it would drop what does not fit its queue, and not wait
    print(f"tcp://127.0.0.1:{socket.bind_to_random_port('tcp://127.0.0.1')}", flush=True)
    size = parcel_bytes(kib << 10)
    held = [os.urandom(size) for _ in range(HELD_BYTES // size)]  # one part again and again would never leave the cache
    while True:
        link, wanted = socket.recv_multipart()
        for number in range(-(-int(wanted) // size)):
            socket.send_multipart((link, b"head", held[number % len(held)]), copy=False)


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


def measure_raw(kib: int, pages: Pages, rounds: int) -> list[Spent]:
    context: Context = zmq.Context()
    with started(__file__, "--serve-raw", str(kib)) as (address, pid), context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.rcvhwm = RAW_QUEUE
        socket.connect(address)
        fetch_raw(socket, pages)
        times = [spent(partial(fetch_raw, socket, pages), pid) for _ in range(rounds)]
    context.term()
    return times


def measure(kib: int, mib: int, rounds: int) -> list[Figure]:
    blocks = max(1, (mib << 10) // kib)
    pages = np.zeros((blocks, kib << 10), dtype=np.uint8)
    source = np.ones_like(pages)
    size = pages.nbytes / 1e9
    copy = partial(spent, partial(copy_once, source, pages), os.getpid())
    copies = [copy() for _ in range(rounds)]
    times: dict[str, list[Spent]] = {"memcpy": copies}
    times[RAW] = measure_raw(kib, pages, rounds)
    for route in (r for r in ROUTES if not unfit(r, "cuda" if torch.cuda.is_available() else "cpu")):
        times[route] = link_times(route, pages, rounds)
        copies += [copy() for _ in range(2)]
    return [_figure(name, kib, size, taken, copies) for name, taken in times.items()]


def _figure(name: str, kib: int, size: float, taken: list[Spent], copies: list[Spent]) -> Figure:
    best = min(t.seconds for t in taken)
    ratio = min(t.seconds for t in copies) / best
    cpu = statistics.median(t.cpu_seconds for t in copies) / statistics.median(t.cpu_seconds for t in taken)
    return Figure(name, kib, size / best, size / statistics.median(t.seconds for t in taken), ratio, cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--mib", type=int, default=256, help="payload per fetch")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--serve-raw", type=int, metavar="KIB", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_raw:
        serve_raw(args.serve_raw)
    figures = [f for kib in BLOCK_KIB for f in measure(kib, args.mib, args.rounds)]
    if args.json:
        print(json.dumps({"mib": args.mib, "cpus": os.cpu_count(), "figures": [asdict(f) for f in figures]}))
        return
    print(f"{'transport':<10}{'block':>10}{'GB/s best':>12}{'median':>9}{'ratio':>8}{'cpu':>8}")
    for f in figures:
        rates = f"{f.gb_per_s:>12.2f}{f.median_gb_per_s:>9.2f}{f.ratio:>8.2f}{f.cpu:>8.2f}"
        print(f"{f.transport:<10}{f.block_kib:>6} KiB{rates}")
    for kib in BLOCK_KIB:
        of = {f.transport: f for f in figures if f.block_kib == kib}
        ratios = "   ".join(
            f"{a} / {b} {of[a].gb_per_s / of[b].gb_per_s:.2f} (cpu {of[a].cpu / of[b].cpu:.2f})" for a, b in COMPARED
        )
        print(f"{kib:>4} KiB   {ratios}")


if __name__ == "__main__":
    main()
