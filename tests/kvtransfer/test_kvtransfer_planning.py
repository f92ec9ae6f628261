"""Who is asked for what: every block once, of one that has it, and the last one in soon."""

from __future__ import annotations

import random
from itertools import product

import pytest

from kvtransfer import gathering
from kvtransfer.gathering import Gathering, Source
from kvtransfer.planning import WORTH, Cost, Lane, assign
from kvtransfer.protocol import bits, mask_of

QUICK = Cost(0.0, 1.0)


def prefix(blocks: int) -> int:
    return (1 << blocks) - 1


def end_of(lanes: list[Lane], shares: list[int]) -> float:
    """When the last block is in."""
    ends = [s.bit_count() * lane.cost.block_s + lane.cost.ready_s for lane, s in zip(lanes, shares, strict=True) if s]
    return max(ends, default=0.0)


def runs(mask: int) -> int:
    return (mask & ~(mask << 1)).bit_count()


def random_lane(chance: random.Random, blocks: int) -> Lane:
    has = prefix(chance.randrange(blocks + 1)) if chance.random() < 0.7 else chance.getrandbits(blocks)
    return Lane(has, Cost(chance.choice((0.0, chance.uniform(0, 9))), chance.uniform(0.1, 3.0)), chance.random() < 0.2)


def test_every_block_is_asked_for_once_and_of_one_that_has_it() -> None:
    chance = random.Random(1)
    for _ in range(2000):
        blocks = chance.randrange(1, 70)
        lanes = [random_lane(chance, blocks) for _ in range(chance.randrange(1, 6))]
        wanted = chance.getrandbits(blocks)
        shares = assign(wanted, lanes)
        had = 0
        for lane, share in zip(lanes, shares, strict=True):
            assert share & ~lane.has == 0
            had |= lane.has
        assert sum(s.bit_count() for s in shares) == (wanted & had).bit_count()
        assert mask_of(i for s in shares for i in bits(s)) == wanted & had


def test_nothing_is_asked_of_nobody() -> None:
    assert assign(prefix(8), []) == []
    assert assign(0, [Lane(prefix(8), QUICK)]) == [0]
    assert assign(prefix(8), [Lane(0, QUICK)]) == [0]


def test_equal_holders_share_and_each_gets_one_run() -> None:
    shares = assign(prefix(100), [Lane(prefix(100), QUICK)] * 4)
    assert [s.bit_count() for s in shares] == [25] * 4
    assert [runs(s) for s in shares] == [1] * 4


def test_a_faster_holder_brings_more() -> None:
    lanes = [Lane(prefix(90), Cost(0.0, 2.0)), Lane(prefix(90), Cost(0.0, 1.0))]
    assert [s.bit_count() for s in assign(prefix(90), lanes)] == [30, 60]


@pytest.mark.parametrize("busy", [Cost(500.0, 1.0), Cost(0.0, 500.0)], ids=["late", "slow"])
def test_a_run_stays_with_one_holder_where_another_would_not_help(busy: Cost) -> None:
    assert assign(prefix(40), [Lane(prefix(40), busy), Lane(prefix(40), QUICK)]) == [0, prefix(40)]


def test_what_one_alone_has_is_not_delayed_by_what_others_have_too() -> None:
    """The shorter prefix is left to the holder that has nothing else."""
    lanes = [Lane(prefix(20), QUICK), Lane(prefix(40), QUICK)]
    assert assign(prefix(40), lanes) == [prefix(20), prefix(40) & ~prefix(20)]


def test_a_spare_holder_brings_only_what_no_other_has() -> None:
    lanes = [Lane(prefix(40), QUICK, spare=True), Lane(prefix(30), Cost(99.0, 9.0))]
    assert assign(prefix(40), lanes) == [prefix(40) & ~prefix(30), prefix(30)]


def test_prefixes_are_brought_about_as_soon_as_they_can_be() -> None:
    """Against every possible assignment of few blocks; the slack is what a second holder has to be worth."""
    chance = random.Random(2)
    for _ in range(150):
        blocks = chance.randrange(1, 7)
        lanes = [
            Lane(prefix(n), Cost(chance.uniform(0, 3), chance.choice((0.5, 1.0))))
            for n in [blocks, *[chance.randrange(blocks + 1) for _ in range(2)]]
        ]
        best = min(
            end_of(lanes, [mask_of(i for i, who in enumerate(choice) if who == n) for n in range(3)])
            for choice in product(range(3), repeat=blocks)
            if all(lanes[who].has >> i & 1 for i, who in enumerate(choice))
        )
        longest = max(lane.cost.block_s for lane in lanes)
        assert end_of(lanes, assign(prefix(blocks), lanes)) <= best / (1 - WORTH) ** 2 + longest + 1e-9


def test_what_a_holder_leaves_is_asked_of_the_others_until_nobody_has_it() -> None:
    """Holders fail, have less than was thought, or bring some of it, in any order: nothing is forgotten, taken twice or
    asked again of one that had not got it, and it ends."""
    chance = random.Random(3)
    for _ in range(1000):
        blocks = chance.randrange(1, 40)
        claims = [random_lane(chance, blocks) for _ in range(chance.randrange(1, 5))]
        truth = [lane.has & chance.choice((0, -1, chance.getrandbits(blocks))) for lane in claims]
        dies = [chance.random() < 0.3 for _ in claims]
        costs = [lane.cost for lane in claims]
        wanted = chance.getrandbits(blocks)
        state, asks = gathering.plan(Gathering(wanted, tuple(Source(c.has, c.spare) for c in claims)), costs)
        running = [(n, ask) for n, ask in enumerate(asks) if ask]
        came, rounds = 0, 0
        refused = [0] * len(claims)
        while running:
            rounds += 1
            assert rounds <= blocks * len(claims) + len(claims)
            assert (
                sum(ask.bit_count() for _, ask in running)
                == mask_of(i for _, a in running for i in bits(a)).bit_count()
            )
            number, ask = running.pop(chance.randrange(len(running)))
            brought = ask & truth[number]
            if dies[number]:
                brought &= chance.getrandbits(blocks)
            came |= brought
            refused[number] |= ask & ~brought
            failed = dies[number] and brought != ask
            if failed:
                refused[number] = -1
            state = gathering.ended(state, number, ask, ask & ~brought, failed=failed)
            state, asks = gathering.plan(state, costs)
            assert not any(more & (refused[n] | came) for n, more in enumerate(asks))
            running += [(n, more) for n, more in enumerate(asks) if more]
        assert state.wanted == state.open == wanted & ~came
        for number, claim in enumerate(claims):  # whoever still claims a block that is missing was asked in vain
            assert state.wanted & claim.has & ~refused[number] == 0


def test_one_that_is_stopped_asks_nobody() -> None:
    state, _ = gathering.plan(Gathering(prefix(4), (Source(prefix(4)), Source(prefix(4)))), [QUICK, QUICK])
    state = gathering.ended(gathering.stopped(state), 0, state.sources[0].asked, state.sources[0].asked, failed=False)
    assert gathering.plan(state, [QUICK, QUICK])[1] == [0, 0]
