"""Groups of two ranks over gloo: between processes, when one is killed or never joins, and when a message was lost."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvtransfer.messages import Place
from kvtransfer.transports import groups
from kvtransfer.transports.base import Landing, Payload, Transport, TransportFault
from kvtransfer.transports.choice import open_transports
from kvtransfer.transports.collective import REBUILD_S, CollectiveTransport
from kvtransfer.transports.groups import Group
from kvtransfer.transports.pairs import Arriving, Pair
from mesh.errors import StartupError
from tests.kvtransfer.pairs import WALL_LIMIT_S, Clock, connected, content, name, transfer_id, wanted

PARCEL_BYTES = 1 << 20
LINK = b"link"
POLL_S = 0.001
HANG_S = 0.5
"""Instead of seconds; nothing here is about to happen when it is over."""
RECEIVER = """
import sys, time
from kvtransfer.messages import Place
from kvtransfer.transports import groups
from kvtransfer.transports.collective import CollectiveTransport
transport = CollectiveTransport(groups.gloo(), "here", "127.0.0.1", 1 << 20)
print("ready", flush=True)
for line in sys.stdin:
    segment, slot, size = line.split()
    landing = transport.take(Place("gloo", segment, int(slot), 0), int(size), None)
    while (payload := landing.payload()) is None:
        time.sleep(0.001)
    print(len(payload), payload[0], flush=True)
"""
SENDER = """
import sys
from kvtransfer.transports import groups
from kvtransfer.transports.collective import CollectiveTransport
transport = CollectiveTransport(groups.gloo(), "here", "127.0.0.1", 1 << 20)
first = transport.post([b"first"], b"link")
print(first.place.segment, flush=True)
sys.stdin.readline()
"""


def transport(wait_s: float = groups.WAIT_S, clock: Clock | None = None) -> CollectiveTransport:
    now = time.monotonic if clock is None else clock
    return CollectiveTransport(groups.gloo(), "here", "127.0.0.1", PARCEL_BYTES, wait_s=wait_s, clock=now)


@contextmanager
def process(script: str) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def said(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def tell(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(line + "\n")
    child.stdin.flush()


def landed(landing: Landing) -> bytes:
    limit = time.monotonic() + WALL_LIMIT_S
    while (payload := landing.payload()) is None:
        assert time.monotonic() < limit, "neither bytes nor a fault"
        time.sleep(POLL_S)
    return bytes(payload)


def post(sender: Transport, data: bytes) -> Place:
    out = sender.post([data], LINK)
    assert out is not None
    return out.place


def test_parcels_between_two_processes_and_the_death_of_the_receiver() -> None:
    clock = Clock()
    sender = transport(clock=clock)
    with process(RECEIVER) as child:
        assert said(child) == "ready"
        for n in range(3):
            place = post(sender, bytes([n]) * (1000 + n))
            tell(child, f"{place.segment} {place.slot} {1000 + n}")
            assert said(child) == f"{1000 + n} {n}"
        old = place.segment
        child.kill()
        child.wait()
    limit = time.monotonic() + WALL_LIMIT_S
    while sender.post([b"into nothing"], LINK) is not None:  # until the first of them has failed
        assert time.monotonic() < limit
        time.sleep(POLL_S)
    clock.now += REBUILD_S - 0.1
    assert sender.post([b"x"], LINK) is None, "not built anew at once"
    clock.now += 0.1
    receiver = transport()
    try:
        place = post(sender, b"again")
        assert place.segment != old
        assert place.slot == 0
        assert landed(receiver.take(place, 5, None)) == b"again"
    finally:
        receiver.close()
        sender.close()


def test_the_death_of_the_sender_is_a_fault() -> None:
    receiver = transport()
    with process(SENDER) as child:
        place = Place("gloo", said(child), 0, 0)
        assert landed(receiver.take(place, 5, None)) == b"first"
        second = receiver.take(replace(place, slot=1), 5, None)
        child.kill()
        began = time.monotonic()
        with pytest.raises(TransportFault):
            landed(second)
        assert time.monotonic() - began < groups.WAIT_S + 1
        with pytest.raises(TransportFault):
            receiver.take(replace(place, slot=2), 5, None)
    receiver.close()


def test_a_sender_that_never_joins_is_a_fault_in_time() -> None:
    holder, receiver = transport(), transport(HANG_S)
    try:
        address = post(holder, b"for somebody else").segment.partition("/")[0]
        landing = receiver.take(Place("gloo", f"{address}/{'0' * 32}", 0, 0), 5, None)
        assert landing.payload() is None, "nobody waited for it"
        began = time.monotonic()
        with pytest.raises(TransportFault):
            landed(landing)
        assert time.monotonic() - began < HANG_S + 1
    finally:
        receiver.close()
        holder.close()


def test_a_receiver_that_never_joins_is_left_in_time() -> None:
    sender = transport(HANG_S, clock=Clock())
    post(sender, b"x")
    limit = time.monotonic() + WALL_LIMIT_S
    while sender.post([b"x"], LINK) is not None:
        assert time.monotonic() < limit
        time.sleep(POLL_S)
    sender.close()


class Elsewhere:
    """A fetcher's transport that joins groups in which nobody else is."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.name = inner.name
        self.scope = inner.scope
        self.post = inner.post
        self.skip = inner.skip
        self.reclaim = inner.reclaim
        self.forget = inner.forget
        self.close = inner.close

    def take(self, place: Place, size: int, frame: Payload | None) -> Payload | Landing:
        if place.transport == "gloo":
            place = replace(place, segment=place.segment[:-32] + "0" * 32)
        return self.inner.take(place, size, frame)


def test_a_fetch_whose_group_hangs_falls_back_to_zeromq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CollectiveTransport.__init__, "__kwdefaults__", {"wait_s": HANG_S, "clock": time.monotonic})
    with connected(tmp_path, "gloo", wrap=Elsewhere) as pair:
        pair.holder.hold(range(3))
        pair.fetch(transfer_id(1), "", wanted(range(3)))
        began = time.monotonic()
        ended = pair.finish(transfer_id(1))
        assert time.monotonic() - began < HANG_S + 5
        assert (ended.outcome, ended.missing) == ("ok", ())
        assert pair.fetcher.blocks(transfer_id(1)) == {n: content(name(n)) for n in range(3)}
        assert set(pair.fetcher.endpoint.stats().bytes_in) == {"zmq"}
        pair.assert_nothing_left()


class Motionless(Group):
    """Joined at once, moves nothing."""

    def __init__(self) -> None:
        pass

    def abort(self) -> None:
        pass


def test_a_parcel_behind_others_has_its_time_from_the_last_that_moved() -> None:
    clock = Clock()
    pair = Pair("group", Motionless, None, clock)
    landing = Arriving(pair, np.zeros(1, dtype=np.uint8), 1, clock, 4.0)
    clock.now += 3
    moved = threading.Event()
    pair.put(lambda group: moved.set())
    assert moved.wait(WALL_LIMIT_S)
    while pair.moved_at < clock.now:
        time.sleep(POLL_S)
    clock.now += 3
    assert landing.payload() is None
    clock.now += 1
    with pytest.raises(TransportFault):
        landing.payload()
    pair.wait(WALL_LIMIT_S)


def test_a_parcel_whose_message_was_lost_does_not_shift_those_after_it() -> None:
    sender, receiver = transport(), transport()
    try:
        places = [post(sender, bytes([n])) for n in range(3)]
        assert landed(receiver.take(places[0], 1, None)) == b"\x00"
        with pytest.raises(TransportFault):
            receiver.take(places[2], 1, None)
        with pytest.raises(TransportFault):
            receiver.take(places[1], 1, None)
    finally:
        receiver.close()
        sender.close()


def test_what_nobody_wants_is_received_all_the_same() -> None:
    sender, receiver = transport(), transport()
    try:
        first, second = post(sender, b"one"), post(sender, b"two")
        receiver.skip(first, 3)
        assert landed(receiver.take(second, 3, None)) == b"two"
    finally:
        receiver.close()
        sender.close()


@pytest.mark.parametrize("segment", ["", "x", "127.0.0.1:0/" + "0" * 32, "127.0.0.1:99999/" + "0" * 32, ":1/x"])
def test_a_group_that_cannot_be_is_a_fault_at_once(segment: str) -> None:
    receiver = transport()
    with pytest.raises(TransportFault):
        receiver.take(Place("gloo", segment, 0, 0), 5, None)
    receiver.close()


def test_gloo_is_for_this_host_alone_and_nccl_for_cuda_alone() -> None:
    with pytest.raises(StartupError, match="encrypt"):
        open_transports(("gloo",), host="h", block_bytes=9, exchange=None, bind="tcp://10.0.0.1:7000")
    found = open_transports(("nccl", "gloo"), host="h", block_bytes=9, exchange=None, bind="tcp://127.0.0.1:7000")
    assert list(found) == ["gloo", "zmq"]
