"""Two processes: shared memory between them, and the death of one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from kvtransfer.transports.shm import SHM_DIR, remove_orphans
from mesh.messages import Peer
from tests.kvtransfer.pairs import LAYOUT, Clock, Pair, content, make_side, name, transfer_id, wanted

HOLDER = """
import sys, time
from pathlib import Path
import zmq
from tests.kvtransfer.pairs import Pair, make_side
side = make_side(zmq.Context(), Path(sys.argv[1]), sys.argv[2], time.monotonic, worker="p", incarnation=7)
side.hold(range(50))
print(side.endpoint.address, flush=True)
pair = Pair(side, side, None)
pair.sides = [side]
while True:
    pair.round()
"""
T = transfer_id(1)


@contextmanager
def holder_process(folder: Path, route: str) -> Iterator[tuple[subprocess.Popen[str], Peer]]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder), route], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, Peer("p", 7, process.stdout.readline().strip(), "here", LAYOUT)
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextmanager
def fetching_pair(folder: Path, route: str) -> Iterator[Pair]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    clock = Clock()
    side = make_side(context, folder, route, clock, worker="d", incarnation=9)
    pair = Pair(side, side, clock)
    pair.sides = [side]
    try:
        yield pair
    finally:
        side.endpoint.close()
        context.term()


@pytest.mark.parametrize("route", ["shm", "zmq-tcp", "gloo"])
def test_blocks_between_two_processes_and_the_death_of_the_holder(tmp_path: Path, route: str) -> None:
    with holder_process(tmp_path, route) as (process, peer), fetching_pair(tmp_path, route) as pair:
        pair.fetcher.endpoint.fetch(T, 1, peer, "", wanted(range(60)), 60)
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing) == ("ok", tuple(range(50, 60)))
        assert pair.fetcher.blocks(T) == {n: content(name(n)) for n in range(50)}
        assert set(pair.fetcher.endpoint.stats().bytes_in) == {route.split("-")[0]}

        pair.fetcher.endpoint.fetch(transfer_id(2), 1, peer, "never opened", wanted([99]), 60)
        pair.settle()
        process.kill()
        assert pair.finish(transfer_id(2)).outcome == "peer_lost"  # the clock stands still: found at once
        pair.assert_nothing_left()
        process.wait()
        remove_orphans()
        assert list(SHM_DIR.glob(f"kvmesh-{process.pid}-*")) == []
