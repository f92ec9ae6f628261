"""The proxy's own table of which worker holds which block, against a naive one."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest

from mesh.messages import BlockEvents
from mesh.residency import EVENT_NAMES, DirectPublisher, open_publisher
from proxy.routing.place import Place
from proxy.routing.residency import BlockChange, LocalResidency, short_names
from tests.proxy.fake_worker import info

A, B = Place("a", 1), Place("b", 1)


def stored(seq: int, *names: int) -> BlockChange:
    return BlockChange(seq, False, names, ())


def removed(seq: int, *names: int) -> BlockChange:
    return BlockChange(seq, False, (), names)


def reset(seq: int, *names: int) -> BlockChange:
    return BlockChange(seq, True, names, ())


def scrub_all(index: LocalResidency) -> None:
    for _ in range(1000):
        index.scrub()


def test_the_longest_prefix_ends_at_the_first_missing_block() -> None:
    index = LocalResidency()
    index.apply(A, reset(1, 1, 2, 3, 5))
    index.apply(B, reset(1, 1, 9, 3, 4, 5))
    assert index.longest([1, 2, 3, 4, 5]) == {A: 3, B: 1}
    assert index.longest([2, 1]) == {A: 2}
    assert index.longest([7, 1]) == {}
    assert index.longest([]) == {}


def test_removed_blocks_are_gone() -> None:
    index = LocalResidency()
    index.apply(A, reset(1, 1, 2))
    index.apply(B, reset(1, 1))
    index.apply(A, removed(2, 1, 77))
    assert index.longest([1, 2]) == {B: 1}
    index.apply(B, removed(2, 1))
    assert len(index) == 1


def test_a_retired_worker_is_gone_at_once_and_leaves_nothing_behind() -> None:
    index = LocalResidency()
    index.apply(A, reset(1, *range(1000)))
    index.apply(B, reset(1, *range(500)))
    index.retire(A)
    assert index.longest(range(1000)) == {B: 500}
    scrub_all(index)
    assert len(index) == 500


def test_a_later_life_starts_empty_and_the_earlier_one_is_fenced() -> None:
    index = LocalResidency()
    index.apply(A, reset(1, 1, 2))
    later = Place("a", 2)
    index.apply(later, stored(1, 1))
    assert index.longest([1, 2]) == {later: 1}
    index.apply(A, stored(2, 2))
    assert index.longest([1, 2]) == {later: 1}


def test_slots_are_given_out_again_only_when_nothing_of_the_old_owner_is_left() -> None:
    index = LocalResidency()
    for life in range(1, 300):
        index.apply(Place("a", life), reset(1, life, 10_000))
        if life % 3 == 0:
            index.scrub()
        assert index.longest([life]) == {Place("a", life): 1}
        assert index.longest([life - 1]) == {}
    scrub_all(index)
    assert len(index) == 2
    assert index._next_slot < 10


def test_missed_events_drop_what_was_known() -> None:
    index = LocalResidency()
    assert index.apply(A, reset(5, 1, 2))
    assert index.apply(A, stored(6, 3))
    assert not index.apply(A, stored(8, 4))
    assert index.longest([1]) == {}
    assert index.longest([4]) == {A: 1}
    assert index.apply(A, stored(9, 5))


def test_repeated_events_change_nothing() -> None:
    index = LocalResidency()
    index.apply(A, reset(5, 1))
    assert index.apply(A, stored(5, 2))
    assert index.apply(A, stored(6, 3))
    assert index.longest([1, 2, 3]) == {A: 3}


def test_memory_is_bounded() -> None:
    index = LocalResidency(max_names=100)
    index.apply(A, reset(1, *range(1000)))
    assert len(index) == 100
    index.apply(A, removed(2, *range(50)))
    index.apply(A, stored(3, 5000))
    assert index.longest([5000]) == {A: 1}


@pytest.mark.parametrize("seed", range(20))
def test_the_table_agrees_with_a_naive_one(seed: int) -> None:
    rng = random.Random(seed)
    index, truth = LocalResidency(), dict[Place, set[int]]()
    seqs = dict[Place, int]()
    for _ in range(400):
        place = Place(f"w{rng.randint(0, 5)}", 1 + len(truth) // 50)
        action = rng.random()
        if action < 0.05:
            for old in [p for p in truth if p.worker_id == place.worker_id]:
                index.retire(old)
                del truth[old]
            continue
        seqs[place] = seqs.get(place, 0) + 1
        new, gone = rng.sample(range(60), rng.randint(0, 20)), rng.sample(range(60), rng.randint(0, 10))
        gone = [g for g in gone if g not in new]
        whole = action < 0.15 or place not in truth
        index.apply(place, BlockChange(seqs[place], whole, new, gone))
        truth[place] = ((set() if whole else truth[place]) | set(new)) - set(gone)
        index.scrub()
        names = rng.sample(range(60), 12)
        expected = {p: _prefix(names, held) for p, held in truth.items() if _prefix(names, held)}
        assert index.longest(names) == expected


def _prefix(names: list[int], held: set[int]) -> int:
    return next((i for i, n in enumerate(names) if n not in held), len(names))


def test_a_long_prompt_is_looked_up_quickly_among_many_blocks() -> None:
    """256 blocks among 400,000: 20 to 40 microseconds on an idle core; the bound leaves room for a busy one."""
    index, rng = LocalResidency(), random.Random(0)
    names = [rng.getrandbits(64) for _ in range(400_000)]
    for w in range(4):
        index.apply(Place(f"w{w}", 1), reset(1, *names[w * 100_000 : (w + 1) * 100_000]))
    prompt = names[1000:1256]
    best = min(_seconds(lambda: index.longest(prompt)) for _ in range(20))
    assert index.longest(prompt) == {Place("w0", 1): 256}
    assert best < 500e-6


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def test_direct_publishing_numbers_and_splits_its_messages() -> None:
    sent: list[BlockEvents] = []
    publisher = DirectPublisher(sent.append)
    blocks = [i.to_bytes(16, "little") for i in range(EVENT_NAMES + 10)]
    publisher.reset(blocks)
    publisher.publish(blocks[:1], blocks[1:2])
    publisher.reset([])
    assert [e.seq for e in sent] == [1, 2, 3, 4]
    assert [e.reset for e in sent] == [True, False, False, True]
    index = LocalResidency()
    for e in sent[:3]:
        assert index.apply(A, BlockChange(e.seq, e.reset, short_names(e.stored), short_names(e.removed)))
    assert len(index) == EVENT_NAMES + 9
    assert index.longest(short_names([blocks[0], blocks[2], blocks[1]])) == {A: 2}


def test_a_large_exchange_removes_before_it_stores() -> None:
    sent: list[BlockEvents] = []
    blocks = [i.to_bytes(16, "little") for i in range(3 * EVENT_NAMES)]
    DirectPublisher(sent.append).publish(blocks[:5], blocks)
    index = LocalResidency()
    for e in sent:
        index.apply(A, BlockChange(e.seq, e.reset, short_names(e.stored), short_names(e.removed)))
    assert len(index) == 0 or index.longest(short_names(blocks[:5])) == {A: 5}


def test_memory_is_the_direct_publisher() -> None:
    sent: list[BlockEvents] = []
    publisher = open_publisher("memory", info("a", "decode"), sent.append)
    publisher.publish([b"x" * 16], [])
    publisher.close()
    assert len(sent) == 1
