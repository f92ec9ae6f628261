"""Two endpoints over real sockets when something is wrong: damage, old lives, hostile frames, dead peers."""

from __future__ import annotations

import os
import random
import socket as sockets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import zmq

from kvtransfer.endpoint import FetchEnded, KvEndpoint, StreamReleased, WantedChanged
from kvtransfer.integrity import seal, unseal
from kvtransfer.messages import Blocks, Fetch, Offer, Place, Renew, SlotsReturned, Standing
from kvtransfer.protocol import ANSWER_S, MAX_INDEX
from kvtransfer.transports.base import Landing, Payload, Posted, Transport, TransportFault
from mesh.errors import EXIT_PORT, EXIT_USAGE, StartupError
from mesh.keys import Keys
from mesh.layout import KvLayout
from mesh.messages import Peer
from tests.kvtransfer.pairs import (
    LAYOUT,
    ROUTES,
    Clock,
    Pair,
    connected,
    content,
    make_side,
    name,
    transfer_id,
    wanted,
)

T = transfer_id(1)


class Damage:
    """What is wrong with an endpoint's receiving, over all its transports."""

    def __init__(self, times: int, *, stride: int = 1 << 30, fails: bool = False) -> None:
        self.times = times
        """Messages that are damaged."""
        self.stride = stride
        """One bit is flipped in every so many bytes."""
        self.fails = fails
        """Instead of damaged bytes there are none."""

    def wrap(self, transport: Transport) -> Transport:
        return Damaging(transport, self)


class Damaging:
    """A transport with `Damage` done to what it delivers."""

    def __init__(self, inner: Transport, damage: Damage) -> None:
        self.inner = inner
        self.damage = damage
        self.name = inner.name
        self.scope = inner.scope

    def post(self, parts: Sequence[Payload], link: bytes) -> Posted | None:
        return self.inner.post(parts, link)

    def take(self, place: Place, size: int, frame: Payload | None) -> Payload | Landing:
        payload = self.inner.take(place, size, frame)
        if self.damage.times == 0 or not isinstance(payload, bytes | memoryview):
            return payload
        self.damage.times -= 1
        if self.damage.fails:
            raise TransportFault("as asked")
        damaged = bytearray(payload)
        for at in range(5, len(damaged), self.damage.stride):
            damaged[at] ^= 0x10
        return bytes(damaged)

    def skip(self, place: Place, size: int) -> None:
        self.inner.skip(place, size)

    def reclaim(self, slot: int, seq: int) -> None:
        self.inner.reclaim(slot, seq)

    def forget(self, segment: str) -> None:
        self.inner.forget(segment)

    def close(self) -> None:
        self.inner.close()


@pytest.mark.parametrize("route", ROUTES)
def test_a_damaged_block_is_fetched_again(tmp_path: Path, route: str) -> None:
    with connected(tmp_path, route, wrap=Damage(1).wrap) as pair:
        pair.holder.hold(range(4))
        pair.fetch(T, "", wanted(range(4)))
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing, ended.corrupt) == ("ok", (), 1)
        assert pair.fetcher.blocks(T) == {n: content(name(n)) for n in range(4)}
        assert pair.fetcher.endpoint.stats().corrupt == 1
        pair.assert_nothing_left()


@pytest.mark.parametrize("route", ROUTES)
def test_a_block_that_is_damaged_twice_is_missing_and_never_delivered(tmp_path: Path, route: str) -> None:
    with connected(tmp_path, route, wrap=Damage(10**9, stride=LAYOUT.block_bytes).wrap) as pair:
        pair.holder.hold(range(2))
        pair.fetch(T, "", wanted(range(2)))
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing) == ("ok", (0, 1))
        assert pair.fetcher.blocks(T) == {}
        pair.assert_nothing_left()


def test_a_transport_that_fails_is_replaced_by_the_connection(tmp_path: Path) -> None:
    with connected(tmp_path, "shm", wrap=Damage(1, fails=True).wrap) as pair:
        pair.holder.hold(range(3))
        for number in (1, 2):
            pair.fetch(transfer_id(number), "", wanted(range(3)))
            assert pair.finish(transfer_id(number)).missing == ()
        assert set(pair.fetcher.endpoint.stats().bytes_in) == {"zmq"}


def test_shared_memory_without_a_free_slot_goes_by_the_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvtransfer.transports.shm.SEGMENT_BYTES", 0)
    with connected(tmp_path, "shm") as pair:
        pair.holder.hold(range(3))
        pair.fetch(T, "", wanted(range(3)))
        assert pair.finish(T).missing == ()
        assert set(pair.fetcher.endpoint.stats().bytes_in) == {"zmq"}


def test_slots_return_while_a_transfer_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.transports.shm.SEGMENT_BYTES", 3 << 20)  # two slots
    with connected(tmp_path, "shm") as pair:
        pair.holder.endpoint.open_stream("r#1")
        pair.fetch(T, "r#1", wanted(range(10)))
        pair.run(lambda: pair.holder.of(WantedChanged))
        for n in range(10):
            pair.holder.produce("r#1", [n])
            pair.run(lambda n=n: n in pair.fetcher.blocks(T))  # type: ignore[misc]
            pair.run(lambda: not pair.holder.endpoint.stats().slots)
        assert set(pair.holder.endpoint.stats().bytes_out) == {"shm"}


def test_slots_of_an_aborted_transfer_are_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.transports.shm.SEGMENT_BYTES", 3 << 20)
    with connected(tmp_path, "shm") as pair:
        pair.holder.endpoint.open_stream("r#1")
        for number in range(5):
            transfer, both = transfer_id(number), pair.sides
            pair.fetch(transfer, "r#1", wanted([number]))
            pair.run(lambda n=number: len(pair.holder.of(WantedChanged)) == 2 * n + 1)  # type: ignore[misc]
            pair.sides = [pair.holder]
            pair.holder.produce("r#1", [number])
            pair.settle()
            assert pair.holder.endpoint.stats().slots == 1
            pair.sides = both
            pair.fetcher.endpoint.abort_fetch(transfer)  # before it reads what was sent
            pair.run(lambda: not pair.holder.endpoint.stats().serving)
        assert pair.holder.endpoint.stats().bytes_out == {"shm": 5 * LAYOUT.block_bytes}


def test_an_earlier_incarnation_is_refused_by_name(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        old = replace(pair.holder.endpoint.peer, incarnation=6)
        pair.fetcher.endpoint.fetch(T, 1, old, "r#1", wanted([0]), 60)
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing) == ("refused", (0,))
        assert ended.detail.startswith("stale_incarnation")
        assert pair.holder.endpoint.stats().serving == 0


def test_a_holder_whose_blocks_are_of_no_use_is_refused_by_the_name_of_the_field(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        peer = replace(pair.holder.endpoint.peer, layout=replace(LAYOUT, head_dim=4))
        pair.fetcher.endpoint.fetch(T, 1, peer, "", wanted([0]), 60)
        ended = pair.finish(T)
        assert (ended.outcome, ended.detail, ended.missing) == ("refused", "layout: head_dim 4 -> 8", (0,))
        assert pair.holder.endpoint.stats().dropped == {}, "it is not even asked"


def test_a_holder_refuses_to_send_in_a_layout_that_it_has_not_got(tmp_path: Path) -> None:
    """The fetcher was told wrongly: it would take the bytes for something else."""
    with connected(tmp_path) as pair:
        pair.holder.hold([0])
        peer = replace(pair.holder.endpoint.peer, layout=replace(LAYOUT, dtype="bfloat16"))
        pair.fetcher.endpoint.fetch(T, 1, peer, "", wanted([0]), 60)
        ended = pair.finish(T)
        assert (ended.outcome, ended.detail) == ("refused", "layout: dtype is float32, not bfloat16")


def test_a_holder_that_closes_in_the_middle_ends_the_fetch_at_once(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.holder.endpoint.open_stream("r#1")
        pair.fetch(T, "r#1", wanted([0, 1]))
        pair.run(lambda: pair.holder.of(WantedChanged))
        pair.holder.produce("r#1", [0])
        pair.run(lambda: pair.fetcher.blocks(T))
        pair.holder.endpoint.close()
        pair.sides = [pair.fetcher]
        ended = pair.finish(T)  # the clock stands still: no deadline can have ended it
        assert (ended.outcome, ended.missing) == ("peer_lost", (1,))
        pair.assert_nothing_left()


def test_a_fetcher_that_closes_in_the_middle_frees_the_holder_at_once(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.holder.endpoint.open_stream("r#1")
        pair.fetch(T, "r#1", wanted([0, 1]))
        pair.run(lambda: pair.holder.of(WantedChanged))
        pair.holder.answers = False  # or the holder would notice by writing to the fetcher
        pair.holder.endpoint.close_stream("r#1")
        pair.settle()
        pair.fetcher.endpoint.close()
        pair.sides = [pair.holder]

        def released() -> bool:
            pair.clock.now += 0.02  # the holder probes for a moment; far below the lease
            return bool(pair.holder.of(StreamReleased))

        began = pair.clock.now
        pair.run(released)
        assert pair.holder.of(StreamReleased)[0].reason == "peer_lost"
        assert pair.clock.now - began < 5


def test_a_peer_that_is_not_there_is_lost_at_once(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        with sockets.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        gone = Peer("p", 7, f"tcp://127.0.0.1:{port}", "here", LAYOUT)
        pair.fetcher.endpoint.fetch(T, 1, gone, "r#1", wanted([0]), 60)
        assert pair.finish(T).outcome == "peer_lost"


def test_an_address_that_is_none_is_not_dialled(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.fetcher.endpoint.fetch(T, 1, Peer("p", 7, "nonsense", "here", LAYOUT), "r#1", wanted([0]), 60)
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing) == ("refused", (0,))


def test_a_holder_that_does_not_answer_times_out(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.fetch(T, "r#1", wanted([0]))
        pair.sides = [pair.fetcher]
        pair.settle()
        pair.clock.now += ANSWER_S
        assert pair.finish(T).outcome == "timeout"


def test_the_deadline_ends_a_fetch_whatever_the_holder_says(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.holder.endpoint.open_stream("r#1")
        pair.fetch(T, "r#1", wanted([0]), deadline_s=3.0)
        pair.run(lambda: pair.holder.of(WantedChanged))
        pair.clock.now += 3.0
        assert pair.finish(T).outcome == "timeout"
        pair.run(lambda: not pair.holder.endpoint.stats().serving)


def test_an_engine_that_does_not_answer_makes_blocks_missing(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.holder.answers = False
        pair.fetch(T, "", wanted([0]))

        def ended() -> FetchEnded | None:
            pair.clock.now += 0.25
            return pair.fetcher.ended(T)

        pair.run(ended)
        assert pair.finish(T).missing == (0,)
        assert pair.finish(T).outcome == "ok"


def hostile_frames() -> list[list[bytes]]:
    """Whatever a broken or hostile process could send to a holder."""
    chance = random.Random(5)
    fetch = Fetch(T, 1, 0, "s", LAYOUT, (), wanted([0, 1]), 4, 0, 5.0)
    place = Place("shm", "../../etc/passwd", -1, 1 << 63)
    messages: list[object] = [
        replace(fetch, transfer_id=b"short"),
        replace(fetch, wanted=(replace(fetch.wanted[0], index=-1),)),
        replace(fetch, wanted=(replace(fetch.wanted[0], index=MAX_INDEX),)),
        replace(fetch, wanted=(fetch.wanted[0], fetch.wanted[0])),
        replace(fetch, wanted=(replace(fetch.wanted[0], name=b"x"),)),
        replace(fetch, wanted=(replace(fetch.wanted[0], valid_tokens=1 << 60),)),
        replace(fetch, credit=0),
        replace(fetch, deadline_s=float("nan")),
        replace(fetch, deadline_s=float("inf")),
        replace(fetch, attempt=-1),
        replace(fetch, stream="s" * 5000),
        replace(fetch, layout=replace(LAYOUT, block_tokens=0)),
        replace(fetch, offers=tuple(Offer(str(i), "") for i in range(100))),
        Blocks(T, 1, place, ()),
        Standing(0, ()),
        Renew(1, tuple(bytes([i % 256]) * 16 for i in range(5000))),
        SlotsReturned("shm", ((1, 1), (-1, 1 << 62))),
    ]
    frames = [[seal(m, 99, 7)] for m in messages]
    whole = seal(fetch, 99, 7)
    frames += [[], [b""], [whole, b"extra"], [b"\xc1"], [os.urandom(100)], [whole[:-3]]]
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        frames.append([bytes(damaged)])
    return frames


def test_hostile_frames_are_counted_and_dropped_and_others_are_served(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        with context.socket(zmq.DEALER) as hostile:
            hostile.linger = 0
            hostile.connect(pair.holder.endpoint.address)
            for frames in hostile_frames():
                hostile.send_multipart(frames or [b""])
            pair.run(lambda: sum(pair.holder.endpoint.stats().dropped.values()) > 100)
            pair.holder.hold([0])
            pair.fetch(T, "", wanted([0]))
            assert pair.finish(T).missing == ()
        context.term()


def hostile_answers() -> list[list[bytes]]:
    """Whatever a broken or hostile holder could answer."""
    block = Blocks(T, 1, Place("zmq", "", 0, 0), ())
    return [
        [b"", b"x"],
        [b"\x93\x01"],
        [seal(replace(block, place=Place("shm", "/etc/passwd", 0, 2)), 7, 9)],
        [seal(replace(block, place=Place("rdma", "", 0, 2)), 7, 9), b"z"],
        [seal(block, 7, 9), b"a", b"b"],
        [seal(block, 6, 9), b""],
        [seal(Standing(0, ()), 7, 8)],
        [seal(Renew(1, ()), 7, 9)],
    ]


def test_hostile_answers_are_counted_and_dropped(tmp_path: Path) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    fetcher = make_side(context, tmp_path, "zmq-ipc", Clock(), worker="d", incarnation=9)
    with context.socket(zmq.ROUTER) as holder:
        holder.linger = 0
        holder.bind(f"ipc://{tmp_path}/h")
        pair = Pair(fetcher, fetcher, Clock())
        pair.sides = [fetcher]
        fetcher.endpoint.fetch(T, 1, Peer("p", 7, f"ipc://{tmp_path}/h", "here", LAYOUT), "s", wanted([0]), 60)
        link, frame = holder.recv_multipart()
        assert unseal(frame).message.stream == "s"
        for frames in hostile_answers():
            holder.send_multipart([link, *frames])
        pair.run(lambda: sum(fetcher.endpoint.stats().dropped.values()) >= len(hostile_answers()) - 1)
        assert fetcher.blocks(T) == {}
        fetcher.endpoint.close()
    context.term()


def endpoint_at(bind: str, transports: tuple[str, ...] = ("zmq",), keys: Keys | None = None) -> KvEndpoint:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        return KvEndpoint(
            context=context,
            bind=bind,
            worker_id="p",
            incarnation=7,
            host="here",
            layout=LAYOUT,
            transports=transports,
            clock=Clock(),
            keys=keys,
        )
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("bind", ["tcp://0.0.0.0:0", "tcp://10.1.2.3:7000", "tcp://*:7000", "udp://127.0.0.1:1", "x"])
def test_only_ipc_and_loopback_are_bound(bind: str) -> None:
    with pytest.raises(StartupError) as error:
        endpoint_at(bind)
    assert error.value.exit_code == EXIT_USAGE
    assert bind in str(error.value)


def test_a_port_in_use_says_so() -> None:
    with sockets.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(StartupError, match="cannot listen") as error:
            endpoint_at(f"tcp://127.0.0.1:{taken.getsockname()[1]}")
    assert error.value.exit_code == EXIT_PORT


def test_an_unknown_transport_is_named() -> None:
    with pytest.raises(StartupError, match="carrier-pigeon"):
        endpoint_at("tcp://127.0.0.1:0", ("carrier-pigeon",))


def test_a_block_of_the_wrong_size_is_the_callers_mistake(tmp_path: Path) -> None:
    with connected(tmp_path) as pair, pytest.raises(ValueError, match="bytes"):
        pair.holder.endpoint.produced("r#1", name(0), b"short")


def test_block_bytes_of_the_test_layout() -> None:
    assert KvLayout(2, 1, 8, 4, "float32").block_bytes == len(content(name(0)))
