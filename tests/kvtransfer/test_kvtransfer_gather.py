"""One fetch over several holders, over real sockets: what each brings, and what becomes of what one does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from kvtransfer.endpoint import BlockArrived, FetchEnded, Noted
from kvtransfer.pace import MEASURED_BYTES, Pace
from kvtransfer.protocol import LEASE_GIVE_UP_S, Wanted
from kvtransfer.sockets import Context
from mesh.messages import KvHolder, Peer
from tests.kvtransfer.pairs import LAYOUT, Clock, Pair, Side, content, make_side, name, transfer_id, wanted

T = transfer_id(1)
SIZE = LAYOUT.block_tokens


@contextmanager
def among(folder: Path, count: int) -> Iterator[tuple[Pair, list[Side]]]:
    """A fetcher and so many holders; the pair is the fetcher and the first."""
    context: Context = zmq.Context()
    clock = Clock()
    sides = [make_side(context, folder, "zmq-ipc", clock, worker=f"w{i}", incarnation=7 + i) for i in range(count + 1)]
    pair = Pair(sides[0], sides[1], clock)
    pair.sides = sides
    try:
        yield pair, sides[1:]
    finally:
        for side in sides:
            side.endpoint.close()
        context.term()


def claims(*holders: tuple[Side, int]) -> list[KvHolder]:
    """What the proxy says: so many blocks each."""
    return [KvHolder(side.endpoint.peer, blocks * SIZE, 0) for side, blocks in holders]


def gather(
    pair: Pair, holders: Sequence[KvHolder], blocks: Sequence[Wanted], maker: Side | None = None, stream: str = "r#1"
) -> None:
    peer = None if maker is None else maker.endpoint.peer
    pair.fetcher.endpoint.gather(T, 1, peer, stream if maker else "", holders, blocks, 60.0)


def sent(side: Side) -> int:
    return side.endpoint.stats().blocks_out


def complete(pair: Pair, blocks: int) -> FetchEnded:
    """Ended, with every block once and right."""
    ended = pair.finish(T)
    assert (ended.outcome, ended.missing, ended.num_bytes) == ("ok", (), blocks * LAYOUT.block_bytes)
    assert pair.fetcher.blocks(T) == {n: content(name(n)) for n in range(blocks)}
    assert len(pair.fetcher.of(BlockArrived)) == blocks
    assert len(pair.fetcher.of(FetchEnded)) == 1
    pair.run(lambda: not any(s.endpoint.stats().open_transfers for s in pair.sides))
    return ended


def test_two_holders_bring_a_half_each(tmp_path: Path) -> None:
    with among(tmp_path, 2) as (pair, (a, b)):
        for side in (a, b):
            side.hold(range(4000))
        gather(pair, claims((a, 4000), (b, 4000)), wanted(range(4000)))
        complete(pair, 4000)
        assert sent(a) == sent(b) == 2000


def test_each_holder_is_asked_only_for_what_it_is_thought_to_have(tmp_path: Path) -> None:
    with among(tmp_path, 2) as (pair, (a, b)):
        a.hold(range(10))
        b.hold(range(30))
        gather(pair, claims((a, 10), (b, 30)), wanted(range(40)))
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing) == ("ok", tuple(range(30, 40)))
        assert len(pair.fetcher.blocks(T)) == 30


def test_a_stale_claim_is_a_miss_that_another_holder_makes_good(tmp_path: Path) -> None:
    with among(tmp_path, 3) as (pair, (a, b, c)):
        b.hold(range(4))
        c.hold(range(20))
        holders = claims((a, 20), (b, 20), (c, 20))
        holders[2] = KvHolder(c.endpoint.peer, 20 * SIZE, 1000)  # the last one that would be asked
        gather(pair, holders, wanted(range(20)))
        complete(pair, 20)
        assert sent(a) == 0
        assert sent(c) >= 16


def test_what_nobody_has_is_missing_and_no_error(tmp_path: Path) -> None:
    with among(tmp_path, 2) as (pair, (a, b)):
        b.hold(range(3))
        gather(pair, claims((a, 9), (b, 9)), wanted(range(9)))
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing) == ("ok", tuple(range(3, 9)))


def test_a_holder_that_dies_in_the_middle_is_made_good_by_the_other(tmp_path: Path) -> None:
    with among(tmp_path, 2) as (pair, (a, b)):
        a.answers = False
        for side in (a, b):
            side.hold(range(4000))
        gather(pair, claims((a, 4000), (b, 4000)), wanted(range(4000)))
        pair.run(lambda: len(pair.fetcher.blocks(T)) == 2000)
        pair.sides.remove(a)
        a.endpoint.close()
        complete(pair, 4000)
        assert sent(b) == 4000


@pytest.mark.parametrize("tokens", [-(2**63), 2**63 - 1])
def test_a_claim_that_cannot_be_is_worth_nothing_or_all(tmp_path: Path, tokens: int) -> None:
    with among(tmp_path, 2) as (pair, (a, b)):
        b.hold(range(8))
        gather(pair, [KvHolder(a.endpoint.peer, tokens, 0), *claims((b, 8))], wanted(range(8)))
        complete(pair, 8)


def test_a_holder_whose_address_is_none_is_made_good_by_the_other(tmp_path: Path) -> None:
    with among(tmp_path, 1) as (pair, (a,)):
        a.hold(range(8))
        nowhere = KvHolder(Peer("w9", 9, "no address", "here", LAYOUT), 8 * SIZE, 0)
        gather(pair, [nowhere, *claims((a, 8))], wanted(range(8)))
        complete(pair, 8)


def test_without_anybody_to_ask_it_ends_at_once(tmp_path: Path) -> None:
    with among(tmp_path, 1) as (pair, _):
        gather(pair, [], wanted(range(3)))
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing, ended.num_bytes) == ("ok", (0, 1, 2), 0)


def test_the_maker_need_not_send_what_others_have(tmp_path: Path) -> None:
    with among(tmp_path, 2) as (pair, (maker, a)):
        a.hold(range(20))
        maker.hold(range(20))
        maker.endpoint.open_stream("r#1")
        gather(pair, claims((a, 20)), wanted(range(25)), maker)
        pair.run(lambda: len(pair.fetcher.blocks(T)) == 20)
        maker.endpoint.note("r#1", b"first")
        maker.produce("r#1", range(20, 25))
        maker.endpoint.close_stream("r#1")
        complete(pair, 25)
        assert [n.payload for n in pair.fetcher.of(Noted)] == [b"first"]
        assert (sent(maker), sent(a)) == (5, 20)


def test_the_maker_makes_good_what_a_holder_leaves_while_it_is_still_making(tmp_path: Path) -> None:
    """Also blocks that it has not got yet; its note is heard once."""
    with among(tmp_path, 2) as (pair, (maker, a)):
        a.hold(range(5))
        maker.endpoint.open_stream("r#1")
        gather(pair, claims((a, 20)), wanted(range(25)), maker)
        pair.run(lambda: len(pair.fetcher.blocks(T)) == 5 and len(maker.endpoint.wants("r#1")) == 20)
        maker.endpoint.note("r#1", b"first")
        maker.produce("r#1", range(25))
        maker.endpoint.close_stream("r#1")
        complete(pair, 25)
        assert [n.payload for n in pair.fetcher.of(Noted)] == [b"first"]


def test_the_maker_makes_good_what_a_holder_leaves_after_it_is_done(tmp_path: Path) -> None:
    with among(tmp_path, 2) as (pair, (maker, a)):
        a.answers = False
        a.hold(range(20))
        maker.endpoint.open_stream("r#1")
        gather(pair, claims((a, 20)), wanted(range(25)), maker)
        pair.run(lambda: len(maker.endpoint.wants("r#1")) == 5)
        maker.produce("r#1", range(25))
        maker.endpoint.close_stream("r#1")
        pair.run(lambda: len(pair.fetcher.blocks(T)) == 5)
        pair.sides.remove(a)
        a.endpoint.close()
        complete(pair, 25)


def test_holders_go_on_when_the_maker_dies(tmp_path: Path) -> None:
    with among(tmp_path, 2) as (pair, (maker, a)):
        a.answers = False
        a.hold(range(20))
        maker.endpoint.open_stream("r#1")
        gather(pair, claims((a, 20)), wanted(range(25)), maker)
        pair.run(lambda: len(maker.endpoint.wants("r#1")) == 5)
        pair.sides.remove(maker)
        maker.endpoint.close()
        pair.run(lambda: pair.fetcher.endpoint.stats().fetching == 1)
        a.answers = True
        for block in [w.name for w in wanted(range(20))]:
            a.endpoint.provide(block, a.held[block])
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing) == ("peer_lost", tuple(range(20, 25)))


def test_an_abort_ends_every_part(tmp_path: Path) -> None:
    with among(tmp_path, 2) as (pair, (a, b)):
        a.answers = b.answers = False
        gather(pair, claims((a, 4000), (b, 4000)), wanted(range(4000)))
        pair.run(lambda: a.endpoint.stats().serving and b.endpoint.stats().serving)
        pair.fetcher.endpoint.abort_fetch(T)
        ended = pair.finish(T)
        assert (ended.outcome, len(ended.missing)) == ("aborted", 4000)
        pair.assert_nothing_left()


def test_a_transfer_id_is_used_once(tmp_path: Path) -> None:
    with among(tmp_path, 1) as (pair, (a,)):
        a.answers = False
        gather(pair, claims((a, 3)), wanted(range(3)))
        with pytest.raises(ValueError, match="once"):
            gather(pair, claims((a, 3)), wanted(range(3)))


def test_a_pace_is_what_was_measured_and_a_load_delays() -> None:
    pace = Pace("here", LAYOUT)
    near, far = (KvHolder(Peer("w", n, "somewhere", host, LAYOUT), 0, 0) for n, host in ((1, "here"), (2, "there")))
    assert pace.cost(near, 0).block_s < pace.cost(far, 0).block_s
    pace.learn(far.peer, MEASURED_BYTES - 1, 1e-9)
    assert pace.cost(far, 0).block_s > pace.cost(near, 0).block_s, "too little to say anything"
    pace.learn(far.peer, 8 * MEASURED_BYTES, 1e-3)
    assert pace.cost(far, 0).block_s == LAYOUT.block_bytes / (8 * MEASURED_BYTES / 1e-3)
    for _ in range(50):
        pace.learn(far.peer, 2 * MEASURED_BYTES, 1e-3)
    assert pace.cost(far, 0).block_s == pytest.approx(LAYOUT.block_bytes / (2 * MEASURED_BYTES / 1e-3), rel=0.01)
    busy = KvHolder(near.peer, 0, 30)
    assert pace.cost(busy, 0).ready_s > pace.cost(near, 0).ready_s
    assert pace.cost(near, 100).ready_s == pytest.approx(pace.cost(near, 0).ready_s + 100 * pace.cost(near, 0).block_s)


def test_of_holders_that_fail_at_once_none_is_asked_for_what_another_leaves(tmp_path: Path) -> None:
    with among(tmp_path, 3) as (pair, (a, b, c)):
        for side in (a, b, c):
            side.answers = False
        gather(pair, claims((a, 20), (b, 40)), wanted(range(40)), c)
        pair.run(lambda: all(s.endpoint.stats().serving == 1 for s in (a, b, c)))
        pair.clock.now += LEASE_GIVE_UP_S
        ended = pair.finish(T)
        assert (ended.outcome, len(ended.missing)) == ("peer_lost", 40)
        assert pair.fetcher.endpoint.stats().ended == {"peer_lost": 3}
