"""Two endpoints over real sockets: the life of a fetch, over every transport."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvtransfer.endpoint import BlockArrived, Noted, StreamReleased, WantedChanged
from kvtransfer.protocol import HOLD_CAP_S, LEASE_TTL_S, UNCLAIMED_S
from mesh.layout import KvLayout
from tests.kvtransfer.pairs import LAYOUT, ROUTES, connected, content, name, transfer_id, wanted

T = transfer_id(1)


@pytest.mark.parametrize("route", ROUTES)
def test_held_and_produced_blocks_arrive_with_their_bytes(tmp_path: Path, route: str) -> None:
    with connected(tmp_path, route) as pair:
        pair.holder.hold(range(3))
        pair.holder.endpoint.open_stream("r#1")
        pair.fetch(T, "r#1", wanted(range(8)))
        pair.run(lambda: len(pair.fetcher.blocks(T)) == 3)
        pair.holder.produce("r#1", [3, 4])
        pair.run(lambda: len(pair.fetcher.blocks(T)) == 5)
        pair.holder.produce("r#1", [5, 6, 7])
        pair.holder.endpoint.close_stream("r#1")
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing) == ("ok", ())
        assert ended.num_bytes == 8 * LAYOUT.block_bytes
        assert pair.fetcher.blocks(T) == {n: content(name(n)) for n in range(8)}
        pair.run(lambda: pair.holder.of(StreamReleased))
        assert pair.holder.of(StreamReleased) == [StreamReleased("r#1", "confirmed")]
        assert set(pair.fetcher.endpoint.stats().bytes_in) == {route.split("-")[0]}
        pair.assert_nothing_left()


@pytest.mark.parametrize("route", ROUTES)
def test_blocks_larger_than_a_parcel(tmp_path: Path, route: str) -> None:
    layout = KvLayout(layers=4, kv_heads=8, head_dim=64, block_tokens=128, dtype="float32")
    with connected(tmp_path, route, layout=layout) as pair:
        pair.holder.hold(range(5))
        pair.fetch(T, "", wanted(range(5)))
        assert pair.finish(T).missing == ()
        assert pair.fetcher.blocks(T) == pair_contents(5, layout)


def pair_contents(count: int, layout: KvLayout) -> dict[int, bytes]:
    return {n: content(name(n), layout.block_bytes) for n in range(count)}


@pytest.mark.parametrize("route", ROUTES)
def test_more_blocks_than_one_window(tmp_path: Path, route: str) -> None:
    with connected(tmp_path, route) as pair:
        pair.holder.hold(range(3000))
        pair.fetch(T, "", wanted(range(3000)))
        assert pair.finish(T).missing == ()
        assert len(pair.fetcher.blocks(T)) == 3000
        pair.assert_nothing_left()


def test_small_blocks_travel_together(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.holder.hold(range(100))
        pair.fetch(T, "", wanted(range(100)))
        pair.run(lambda: pair.fetcher.of(BlockArrived))
        assert len(pair.fetcher.of(BlockArrived)) == 100  # one message, so all in one round


def test_a_fetch_before_its_stream(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.fetch(T, "r#1", wanted([0, 1]))
        pair.run(lambda: pair.holder.of(WantedChanged))
        pair.holder.endpoint.open_stream("r#1")
        pair.holder.produce("r#1", [0, 1])
        pair.holder.endpoint.close_stream("r#1")
        assert pair.finish(T).missing == ()


def test_a_fetch_after_its_stream_closed_finds_what_is_held_and_the_notes(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.holder.endpoint.open_stream("r#1")
        pair.holder.hold([0])
        pair.holder.endpoint.note("r#1", b"first token")
        pair.holder.endpoint.close_stream("r#1")
        pair.fetch(T, "r#1", wanted([0, 1]))
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing) == ("ok", (1,))
        assert pair.fetcher.of(Noted) == [Noted(T, b"first token")]


def test_a_fetch_of_nothing_hears_the_notes(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.holder.endpoint.open_stream("r#1")
        pair.fetch(T, "r#1", ())
        pair.settle()
        pair.holder.endpoint.note("r#1", b"a")
        pair.holder.endpoint.note("r#1", b"b")
        pair.run(lambda: len(pair.fetcher.of(Noted)) == 2)
        assert pair.fetcher.ended(T) is None
        pair.holder.endpoint.close_stream("r#1")
        assert pair.finish(T).outcome == "ok"
        assert [n.payload for n in pair.fetcher.of(Noted)] == [b"a", b"b"]


def test_a_note_arrives_before_the_blocks_that_were_produced_after_it(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.holder.endpoint.open_stream("r#1")
        pair.fetch(T, "r#1", wanted([0, 1]))
        pair.run(lambda: pair.holder.of(WantedChanged))
        pair.holder.produce("r#1", [0])
        pair.holder.endpoint.note("r#1", b"n")
        pair.holder.produce("r#1", [1])
        pair.holder.endpoint.close_stream("r#1")
        pair.finish(T)
        kinds = [type(e) for e in pair.fetcher.events]
        assert kinds[:3] == [BlockArrived, Noted, BlockArrived]


def test_the_step_loop_is_told_what_is_wanted_and_that_nobody_wants_it_any_more(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.holder.endpoint.open_stream("r#1")
        pair.fetch(T, "r#1", wanted([4, 5]))
        pair.run(lambda: pair.holder.of(WantedChanged))
        assert pair.holder.of(WantedChanged)[-1].names == {name(4), name(5)}
        pair.fetcher.endpoint.abort_fetch(T)
        pair.run(lambda: pair.holder.of(WantedChanged)[-1].names == frozenset())


def test_two_fetchers_of_one_stream_both_get_everything(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.holder.endpoint.open_stream("r#1")
        other = transfer_id(2)
        pair.fetch(T, "r#1", wanted([0, 1, 2]))
        pair.fetch(other, "r#1", wanted([1, 2]))
        pair.run(lambda: len(pair.holder.of(WantedChanged)) == 2)
        pair.holder.produce("r#1", [0, 1, 2])
        pair.holder.endpoint.close_stream("r#1")
        assert pair.finish(T).missing == pair.finish(other).missing == ()
        pair.run(lambda: pair.holder.of(StreamReleased))
        assert len(pair.holder.of(StreamReleased)) == 1


def test_abort_before_any_answer(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.fetch(T, "r#1", wanted([0]))
        pair.fetcher.endpoint.abort_fetch(T)
        pair.fetcher.endpoint.abort_fetch(T)
        assert pair.finish(T).outcome == "aborted"
        pair.settle()
        pair.assert_nothing_left()


@pytest.mark.parametrize("route", ROUTES)
def test_abort_in_the_middle_frees_the_holder(tmp_path: Path, route: str) -> None:
    with connected(tmp_path, route) as pair:
        pair.holder.endpoint.open_stream("r#1")
        pair.fetch(T, "r#1", wanted(range(10)))
        pair.run(lambda: pair.holder.of(WantedChanged))
        pair.holder.produce("r#1", [0, 1])
        pair.run(lambda: pair.fetcher.blocks(T))
        pair.holder.produce("r#1", [2, 3])
        pair.fetcher.endpoint.abort_fetch(T)
        ended = pair.finish(T)
        assert ended.outcome == "aborted"
        assert set(ended.missing) >= set(range(4, 10))
        pair.run(lambda: not pair.holder.endpoint.stats().serving)
        pair.holder.endpoint.close_stream("r#1")
        pair.run(lambda: pair.holder.of(StreamReleased))
        assert pair.holder.of(StreamReleased) == [StreamReleased("r#1", "aborted")]
        pair.assert_nothing_left()


def test_an_unclaimed_stream_is_released(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.holder.endpoint.open_stream("r#1")
        pair.holder.endpoint.close_stream("r#1")
        pair.clock.now += UNCLAIMED_S - 1
        pair.settle()
        assert pair.holder.of(StreamReleased) == []
        pair.clock.now += 1
        pair.run(lambda: pair.holder.of(StreamReleased))
        assert pair.holder.of(StreamReleased)[0].reason == "unclaimed"


def test_no_stream_is_held_longer_than_the_cap_even_by_a_fetcher_that_lives(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.holder.answers = False
        pair.holder.endpoint.open_stream("r#1")
        pair.fetch(T, "r#1", wanted([0]), deadline_s=3600)
        pair.run(lambda: pair.holder.of(WantedChanged))
        pair.holder.endpoint.close_stream("r#1")
        for _ in range(int(HOLD_CAP_S / 2) + 1):
            pair.clock.now += 2
            pair.round(wait_ms=2)
        pair.run(lambda: pair.holder.of(StreamReleased))


def test_a_fetcher_that_falls_silent_loses_its_lease(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.holder.endpoint.open_stream("r#1")
        pair.fetch(T, "r#1", wanted([0]))
        pair.run(lambda: pair.holder.of(WantedChanged))
        pair.holder.endpoint.close_stream("r#1")
        pair.sides = [pair.holder]  # the fetcher's I/O thread stops
        pair.clock.now += LEASE_TTL_S
        pair.run(lambda: pair.holder.of(StreamReleased))
        assert pair.holder.of(StreamReleased)[0].reason == "lease"


def test_a_long_prefill_keeps_its_fetch(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.holder.endpoint.open_stream("r#1")
        pair.fetch(T, "r#1", wanted([0]), deadline_s=600)
        pair.run(lambda: pair.holder.of(WantedChanged))
        for _ in range(60):
            pair.clock.now += 1
            pair.settle()
        assert pair.fetcher.ended(T) is None
        pair.holder.produce("r#1", [0])
        pair.holder.endpoint.close_stream("r#1")
        assert pair.finish(T).missing == ()
