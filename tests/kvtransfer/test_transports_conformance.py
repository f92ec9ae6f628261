"""What every transport must do, alone and between two endpoints. A new one needs a line in `MAKERS` and `WAYS`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from kvtransfer.endpoint import WantedChanged
from kvtransfer.fetcher import PROBE_S
from kvtransfer.messages import Place
from kvtransfer.transports import choice, groups
from kvtransfer.transports.base import Landing, Payload, Posted, Transport, TransportFault
from kvtransfer.transports.collective import CollectiveTransport
from kvtransfer.transports.cuda import CudaTransport
from kvtransfer.transports.inline import InlineTransport
from kvtransfer.transports.local import Exchange, LocalTransport
from kvtransfer.transports.shm import ShmTransport
from tests.kvtransfer.hostmemory import HostMemory
from tests.kvtransfer.pairs import LAYOUT, WALL_LIMIT_S, connected, content, name, transfer_id, wanted

Ends = tuple[Transport, Transport]
SLOT_BYTES = 3000
LINK = b"link"
T = transfer_id(1)


def _local() -> Ends:
    exchange = Exchange()
    return LocalTransport(exchange), LocalTransport(exchange)


def _cuda() -> Ends:
    memory = HostMemory()
    return CudaTransport(memory, "here", SLOT_BYTES), CudaTransport(memory, "here", SLOT_BYTES)


def _gloo() -> Transport:
    return CollectiveTransport(groups.gloo(), "here", "127.0.0.1", SLOT_BYTES)


MAKERS: dict[str, Callable[[], Ends]] = {
    "local": _local,
    "shm": lambda: (ShmTransport("here", SLOT_BYTES), ShmTransport("here", SLOT_BYTES)),
    "zmq": lambda: (InlineTransport(SLOT_BYTES), InlineTransport(SLOT_BYTES)),
    "gloo": lambda: (_gloo(), _gloo()),
    "cuda": _cuda,
}
WAYS = ("local", "shm", "zmq-ipc", "gloo", "cuda")
"""One route of every transport, for two endpoints."""
SHARED = tuple(way for way in WAYS if not way.startswith("zmq"))
"""Those that are no more than a better way than the connection."""


@pytest.fixture(autouse=True)
def _no_device_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = HostMemory()
    monkeypatch.setattr(choice, "CudaMemory", lambda device: memory)


@pytest.fixture(params=MAKERS)
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    """A sender and a receiver."""
    pair = MAKERS[request.param]()
    yield pair
    for transport in pair:
        transport.close()


def posted(transport: Transport, *parts: Payload) -> Posted:
    result = transport.post(parts, LINK)
    assert result is not None
    return result


def landed(payload: Payload | Landing) -> Payload:
    """Asks until it is there, as an endpoint's loop does."""
    limit = time.monotonic() + WALL_LIMIT_S
    while not isinstance(payload, bytes | memoryview):
        assert time.monotonic() < limit, "neither bytes nor a fault"
        time.sleep(0.001)
        payload = payload.payload() or payload
    return payload


def taken(transport: Transport, out: Posted, size: int) -> bytes:
    return bytes(landed(transport.take(out.place, size, out.frame)))


def test_both_ends_say_that_they_reach_each_other(ends: Ends) -> None:
    assert ends[0].scope == ends[1].scope


@pytest.mark.parametrize("parts", [(b"one",), (b"a" * 1000, b"b" * 1000, b"c" * 1000), (memoryview(b"view"),)])
def test_parts_arrive_one_after_another(ends: Ends, parts: tuple[bytes, ...]) -> None:
    sender, receiver = ends
    out = posted(sender, *parts)
    whole = b"".join(parts)
    assert taken(receiver, out, len(whole)) == whole
    assert out.place.transport == sender.name


def test_parcels_arrive_each_as_itself_and_in_order(ends: Ends) -> None:
    sender, receiver = ends
    outs = [posted(sender, bytes([n]) * (100 + n)) for n in range(20)]
    assert [taken(receiver, out, 100 + n) for n, out in enumerate(outs)] == [bytes([n]) * (100 + n) for n in range(20)]


def test_the_wrong_size_is_a_fault(ends: Ends) -> None:
    sender, receiver = ends
    out = posted(sender, b"12345")
    with pytest.raises(TransportFault):
        taken(receiver, out, SLOT_BYTES * 1_000_000)


def test_a_wrong_place_is_a_fault(ends: Ends) -> None:
    sender, receiver = ends
    place = posted(sender, b"12345").place
    for wrong in (replace(place, segment="nobody's"), replace(place, slot=place.slot + 1), Place("", "", 0, 0)):
        if sender.name == "zmq" or (sender.name == "local" and wrong.slot == place.slot):
            continue  # the connection, or the process, is the whole place
        with pytest.raises(TransportFault):
            taken(receiver, Posted(wrong, None), 5)
    with pytest.raises(TransportFault):
        taken(receiver, Posted(place, b"1234" if sender.name == "zmq" else None), 1 << 30)


def test_what_was_taken_does_not_change_with_what_is_sent_next(ends: Ends) -> None:
    sender, receiver = ends
    first = posted(sender, b"first")
    payload = landed(receiver.take(first.place, 5, first.frame))
    sender.reclaim(first.place.slot, first.place.seq)
    for _ in range(5):
        assert taken(receiver, posted(sender, b"other"), 5) == b"other"
    assert bytes(payload) == b"first"


def test_nothing_is_put_into_a_place_before_it_is_reclaimed(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.transports.shm.SEGMENT_BYTES", 4 * 4096)
    monkeypatch.setattr("kvtransfer.transports.cuda.SLAB_BYTES", 4 * 3072)
    sender, receiver = ends
    outs = [sender.post([bytes([n]) * 50], LINK) for n in range(40)]
    full = [n for n, out in enumerate(outs) if out is None]
    assert full in ([], list(range(4, 40))), "no room is said, and then there is none until something is reclaimed"
    assert [taken(receiver, out, 50) for out in outs if out] == [bytes([n]) * 50 for n, out in enumerate(outs) if out]


def test_a_place_that_was_taken_back_is_a_fault_or_still_what_it_was(ends: Ends) -> None:
    sender, receiver = ends
    old = posted(sender, b"old")
    sender.reclaim(old.place.slot, old.place.seq)
    new = posted(sender, b"new")
    with suppress(TransportFault):
        assert taken(receiver, old, 3) == b"old"
    assert taken(receiver, new, 3) == b"new"


def test_a_sender_that_is_gone_leaves_a_fault_or_what_it_sent(ends: Ends) -> None:
    sender, receiver = ends
    first, second = posted(sender, b"first"), posted(sender, b"second")
    assert taken(receiver, first, 5) == b"first"
    sender.close()
    with suppress(TransportFault):
        assert taken(receiver, second, 6) == b"second"
    receiver.forget(first.place.segment)
    if second.frame is None:
        with pytest.raises(TransportFault):
            taken(receiver, second, 6)


def test_closing_twice_and_forgetting_strangers_is_harmless(ends: Ends) -> None:
    for transport in ends:
        transport.forget("nobody")
        transport.close()
        transport.close()


class Faulty:
    """A transport that fails to deliver while `fails` is set."""

    def __init__(self, inner: Transport) -> None:
        self.inner = inner
        self.name = inner.name
        self.scope = inner.scope
        self.fails = False

    def post(self, parts: Sequence[Payload], link: bytes) -> Posted | None:
        return self.inner.post(parts, link)

    def take(self, place: Place, size: int, frame: Payload | None) -> Payload | Landing:
        if self.fails:
            self.inner.skip(place, size)
            raise TransportFault("as asked")
        return self.inner.take(place, size, frame)

    def skip(self, place: Place, size: int) -> None:
        self.inner.skip(place, size)

    def reclaim(self, slot: int, seq: int) -> None:
        self.inner.reclaim(slot, seq)

    def forget(self, segment: str) -> None:
        self.inner.forget(segment)

    def close(self) -> None:
        self.inner.close()


def carried(before: dict[str, int], after: dict[str, int]) -> set[str]:
    return {transport for transport, size in after.items() if size > before.get(transport, 0)}


@pytest.mark.parametrize("way", WAYS)
def test_a_fetch_goes_by_the_transport_that_both_have(tmp_path: Path, way: str) -> None:
    with connected(tmp_path, way) as pair:
        pair.holder.hold(range(9))
        pair.fetch(T, "", wanted(range(10)))
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing, ended.corrupt) == ("ok", (9,), 0)
        assert pair.fetcher.blocks(T) == {n: content(name(n)) for n in range(9)}
        assert pair.fetcher.endpoint.stats().bytes_in == {way.split("-")[0]: 9 * LAYOUT.block_bytes}
        pair.assert_nothing_left()


@pytest.mark.parametrize("way", SHARED)
def test_a_transport_that_fails_is_left_within_the_fetch_until_it_is_probed(tmp_path: Path, way: str) -> None:
    faulty: list[Faulty] = []

    def wrap(transport: Transport) -> Transport:
        faulty.append(Faulty(transport))
        faulty[-1].fails = transport.name == way
        return faulty[-1]

    with connected(tmp_path, way, wrap=wrap) as pair:
        pair.holder.hold(range(3))

        def fetch(number: int) -> set[str]:
            before = dict(pair.fetcher.endpoint.stats().bytes_in)
            pair.fetch(transfer_id(number), "", wanted(range(3)))
            ended = pair.finish(transfer_id(number))
            assert (ended.outcome, ended.missing) == ("ok", ())
            assert pair.fetcher.blocks(transfer_id(number)) == {n: content(name(n)) for n in range(3)}
            return carried(before, dict(pair.fetcher.endpoint.stats().bytes_in))

        def dropped() -> int:
            return pair.fetcher.endpoint.stats().dropped.get("transport", 0)

        assert fetch(1) == {"zmq"}, "within the same fetch"
        assert dropped() == 1
        for transport in faulty:
            transport.fails = False
        pair.clock.now += PROBE_S - 1
        assert fetch(2) == {"zmq"}, "it is not tried again at once"
        pair.clock.now += 1
        assert fetch(3) == {way}, "it works again, and is used again"
        assert dropped() == 1
        pair.assert_nothing_left()


@pytest.mark.parametrize("way", SHARED)
def test_a_transport_that_still_fails_when_it_is_probed_is_left_again(tmp_path: Path, way: str) -> None:
    def wrap(transport: Transport) -> Transport:
        faulty = Faulty(transport)
        faulty.fails = transport.name == way
        return faulty

    with connected(tmp_path, way, wrap=wrap) as pair:
        pair.holder.hold([0])
        for number, faults in ((1, 1), (2, 1), (3, 2), (4, 2)):
            pair.fetch(transfer_id(number), "", wanted([0]))
            assert pair.finish(transfer_id(number)).missing == ()
            assert pair.fetcher.endpoint.stats().dropped.get("transport") == faults
            pair.clock.now += PROBE_S / 2


@pytest.mark.parametrize("way", WAYS)
def test_a_holder_that_is_gone_in_the_middle_leaves_what_came(tmp_path: Path, way: str) -> None:
    with connected(tmp_path, way) as pair:
        pair.holder.endpoint.open_stream("r#1")
        pair.fetch(T, "r#1", wanted([0, 1]))
        pair.run(lambda: pair.holder.of(WantedChanged))
        pair.holder.produce("r#1", [0])
        pair.run(lambda: pair.fetcher.blocks(T))
        pair.holder.endpoint.close()
        pair.sides = [pair.fetcher]
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing) == ("peer_lost", (1,))
        assert pair.fetcher.blocks(T) == {0: content(name(0))}
        pair.assert_nothing_left()
