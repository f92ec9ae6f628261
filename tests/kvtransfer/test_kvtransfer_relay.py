"""Through a relay that damages what it forwards: nothing wrong is ever accepted, and every fetch ends."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from kvtransfer.endpoint import FetchEnded
from kvtransfer.fetcher import NO_GREETING
from kvtransfer.protocol import ANSWER_S
from kvtransfer.sockets import addresses
from mesh.keys import WORKER, Keys, create, load
from mesh.messages import Peer
from tests.faults.links import Strikes
from tests.kvtransfer import relay
from tests.kvtransfer.pairs import Pair, content, encrypted, name, transfer_id, wanted
from tests.kvtransfer.relay import CORRUPTING, EVERY, FLIP, REPEAT, SEALED, SWAP, Faults, Relay, send_through

FRAMES = 400


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    create(tmp_path / "keys")
    keys = load(str(tmp_path / "keys"), WORKER)
    assert keys is not None
    return keys


def test_without_faults_everything_is_accepted() -> None:
    outcome = send_through(Faults(SEALED, 1, rate=0.0), FRAMES)
    assert (outcome.accepted, sum(outcome.refused.values())) == (FRAMES, 0)


@pytest.mark.parametrize("kind", CORRUPTING)
def test_no_damaged_message_is_accepted(kind: str) -> None:
    outcome = send_through(Faults((kind,), 2), FRAMES)
    assert (outcome.accepted, sum(outcome.refused.values())) == (0, FRAMES)
    assert outcome.done == {kind: FRAMES}


def test_a_repeated_message_is_accepted_once() -> None:
    outcome = send_through(Faults((REPEAT,), 3), FRAMES)
    assert (outcome.accepted, outcome.refused) == (FRAMES, {"replayed": FRAMES})


def test_a_message_that_comes_late_is_refused() -> None:
    outcome = send_through(Faults((SWAP,), 4, rate=0.2), FRAMES)
    assert outcome.refused == {"replayed": outcome.done[SWAP]}
    assert outcome.accepted == FRAMES - outcome.done[SWAP]


@pytest.mark.parametrize("seed", range(3))
def test_among_all_faults_only_what_was_sent_is_accepted(seed: int) -> None:
    outcome = send_through(Faults(SEALED, seed, rate=0.5), FRAMES)
    assert set(outcome.done) == set(SEALED)
    assert outcome.accepted >= FRAMES - sum(outcome.done.values())


def fetch_through(pair: Pair, keys: Keys, faults: Faults, number: int) -> FetchEnded:
    """One fetch whose answers come through a relay of its own."""
    peer = pair.holder.endpoint.peer
    control, bulk = addresses(peer.kv_address, keys)
    between = Relay(int(bulk.rsplit(":", 1)[1]), faults)
    relayed = Peer(peer.worker_id, peer.incarnation, f"{control}/{between.port}", peer.host, peer.layout)
    transfer = transfer_id(number)
    pair.fetcher.endpoint.fetch(transfer, 1, relayed, "", wanted(range(20)), 60.0)

    def ended() -> FetchEnded | None:
        pair.clock.now += 0.25  # a stalled fetch ends by its lease
        return pair.fetcher.ended(transfer)

    try:
        pair.run(ended)
    finally:
        between.close()
    assert all(block == content(name(n)) for n, block in pair.fetcher.blocks(transfer).items())
    return pair.finish(transfer)


@pytest.mark.parametrize("kind", EVERY)
def test_every_fetch_ends_and_brings_nothing_wrong(tmp_path: Path, keys: Keys, kind: str) -> None:
    with encrypted(tmp_path, keys, keys) as pair:
        pair.holder.hold(range(20))
        faults = Faults((kind,), 7, rate=0.5)
        ended = [fetch_through(pair, keys, faults, number) for number in range(4)]
        assert faults.done[kind] >= 1
        for number, end in enumerate(ended):
            arrived = pair.fetcher.blocks(transfer_id(number))
            assert arrived.keys() | set(end.missing) == set(range(20))
            assert not arrived.keys() & set(end.missing)


def test_a_damaged_message_is_fetched_again(tmp_path: Path, keys: Keys) -> None:
    """The relay damages the first message with blocks and no other."""

    class Once(Faults):
        def apply(self, frames: list[relay.Frame]) -> relay.Hit:
            self._rate = 1.0 if not self.done else 0.0
            return super().apply(frames)

    with encrypted(tmp_path, keys, keys) as pair:
        pair.holder.hold(range(20))
        ended = fetch_through(pair, keys, Once(CORRUPTING, 1), 1)
        assert (ended.outcome, ended.missing) == ("ok", ())
        dropped = pair.fetcher.endpoint.stats().dropped
        assert sum(dropped.get(reason, 0) for reason in ("forged", "truncated", "session", "replayed")) == 1


@pytest.mark.parametrize("struck", ["hello", "greeting"])
def test_a_connection_without_a_greeting_is_not_used_again(tmp_path: Path, keys: Keys, struck: str) -> None:
    """Of the bulk connection's first message in either direction, a bit is flipped; all others pass."""
    with encrypted(tmp_path, keys, keys) as pair:
        pair.holder.hold(range(20))
        peer = pair.holder.endpoint.peer
        control, bulk = addresses(peer.kv_address, keys)
        sides = {"hello": Strikes(), "greeting": Strikes()}
        sides[struck].strike(FLIP, 1, 0.0)
        between = Relay(int(bulk.rsplit(":", 1)[1]), sides["greeting"], sides["hello"])
        relayed = Peer(peer.worker_id, peer.incarnation, f"{control}/{between.port}", peer.host, peer.layout)

        def fetched(number: int) -> FetchEnded:
            transfer = transfer_id(number)
            pair.fetcher.endpoint.fetch(transfer, 1, relayed, "", wanted(range(20)), 60.0)

            def ended() -> FetchEnded | None:
                pair.clock.now += 0.05
                return pair.fetcher.ended(transfer)

            pair.run(ended)
            return pair.finish(transfer)

        try:
            first, second = fetched(1), fetched(2)
        finally:
            between.close()
        assert sides[struck].done == {FLIP: 1}
        assert (first.outcome, first.detail) == ("peer_lost", NO_GREETING)
        assert first.seconds <= ANSWER_S + 1
        assert (second.outcome, second.missing) == ("ok", ())


def test_no_relay_stays_behind() -> None:
    before = threading.active_count()
    send_through(Faults(SEALED, 1), 10)
    assert threading.active_count() == before


def test_a_relay_is_what_it_says() -> None:
    """A stub that forwards everything would fail the tests above; one that forwards nothing fails this one."""
    outcome = send_through(Faults(CORRUPTING, 5, rate=0.5), FRAMES)
    assert outcome.accepted == FRAMES - sum(outcome.done.values())
    assert 0 < outcome.accepted < FRAMES
