"""Blocks from an engine with blocks of another size: a part that is stale, mixed or missing is a wrong token."""

from __future__ import annotations

from itertools import product

import pytest

from engine.engine import Engine, EngineConfig
from engine.request import EngineRequest
from engine.sim_engine import SimRunner
from engine.step import Missing
from mesh import blockhash
from mesh.layout import KvLayout
from tests.engine.sim_requests import ROOT, VOCAB, idle, oracle, prefill, prompt, request, run, state, steps

SMALL, LARGE = 16, 64
PAIRS = [(SMALL, LARGE), (LARGE, SMALL), (SMALL, 24), (24, SMALL)]
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 80, 100, 127, 128, 129, 200]


def layout(block_tokens: int) -> KvLayout:
    return SimRunner(1, block_tokens).layout


def engine(block_tokens: int, num_blocks: int = 64) -> Engine:
    return Engine(SimRunner(num_blocks, block_tokens, VOCAB), EngineConfig(8, 512, 400))


def holder(block_tokens: int, tokens: list[int]) -> Engine:
    """An engine that has computed `tokens` for another and holds them, the partly filled last block included."""
    e = engine(block_tokens)
    e.add(prefill("p", tokens))
    steps(e)
    return e


def bring(source: Engine, e: Engine, one: EngineRequest, missing: Missing, theirs: KvLayout) -> bool:
    found = source.export(missing.hash)
    assert found is not None
    assert found[1] == missing.valid_tokens
    return e.fill(one.key, missing.index, found[0], theirs)


@pytest.mark.parametrize(("theirs", "own"), PAIRS)
@pytest.mark.parametrize("length", LENGTHS)
def test_what_was_fetched_gives_the_tokens_of_a_co_located_engine(theirs: int, own: int, length: int) -> None:
    tokens = prompt(length)
    source, e = holder(theirs, tokens), engine(own)
    a = request("a", tokens, 12)
    missing = e.expect(a, layout(theirs))
    assert [m.index for m in missing] == list(range(-(-length // theirs)))
    assert all(bring(source, e, a, m, layout(theirs)) for m in missing)
    e.check()
    assert e.ready("a", oracle(tokens, 1)) == 1, "nothing is computed again"
    assert run(e) == {"a": oracle(tokens, 12)[1:]}
    assert (a.num_cached_tokens, a.num_fetched_tokens) == (0, length)
    idle(e)


@pytest.mark.parametrize(("theirs", "own"), PAIRS)
def test_what_was_fetched_is_cached_under_ones_own_names(theirs: int, own: int) -> None:
    tokens = prompt(200)
    source, e = holder(theirs, tokens), engine(own)
    a = request("a", tokens, 4)
    for m in e.expect(a, layout(theirs)):
        bring(source, e, a, m, layout(theirs))
    e.ready("a")
    run(e)
    assert set(blockhash.chain(ROOT, tokens, own)) <= set(e.snapshot())
    b = request("b", tokens, 4)
    e.add(b)
    assert run(e) == {"b": oracle(tokens, 4)}
    assert b.num_cached_tokens == 199 // own * own


@pytest.mark.parametrize("lost", range(4))
def test_one_of_four_that_does_not_come_makes_the_large_block_a_miss(lost: int) -> None:
    tokens = prompt(150)
    source, e = holder(SMALL, tokens), engine(LARGE)
    a = request("a", tokens, 6)
    for m in e.expect(a, layout(SMALL)):
        if m.index != 4 + lost:
            assert bring(source, e, a, m, layout(SMALL))
    assert e.ready("a", oracle(tokens, 1)) == 151 - 64, "only the first block of 64 is whole"
    e.check()
    assert blockhash.chain(ROOT, tokens, LARGE)[1] not in e.snapshot()
    assert run(e) == {"a": oracle(tokens, 6)[1:]}
    idle(e)


def test_a_tail_without_one_of_its_parts_is_computed() -> None:
    tokens = prompt(100)
    source, e = holder(SMALL, tokens), engine(LARGE)
    a = request("a", tokens, 6)
    missing = e.expect(a, layout(SMALL))
    assert [(m.index, m.valid_tokens) for m in missing] == [(i, 16) for i in range(6)] + [(6, 4)]
    for m in missing[:-1]:
        bring(source, e, a, m, layout(SMALL))
    assert e.ready("a", oracle(tokens, 1)) == 101 - 64
    assert run(e) == {"a": oracle(tokens, 6)[1:]}


def test_a_large_block_that_does_not_come_is_four_misses() -> None:
    tokens = prompt(200)
    source, e = holder(LARGE, tokens), engine(SMALL)
    a = request("a", tokens, 6)
    for m in e.expect(a, layout(LARGE)):
        if m.index != 1:
            bring(source, e, a, m, layout(LARGE))
    assert e.ready("a", oracle(tokens, 1)) == 201 - 64
    assert run(e) == {"a": oracle(tokens, 6)[1:]}
    idle(e)


@pytest.mark.parametrize(("theirs", "own", "asked"), [(SMALL, LARGE, range(4, 10)), (LARGE, SMALL, range(1, 3))])
def test_only_what_covers_the_missing_blocks_is_asked_for(theirs: int, own: int, asked: range) -> None:
    tokens = prompt(150)
    e = engine(own)
    e.add(request("x", tokens[:65], 1))
    run(e)
    assert [m.index for m in e.expect(request("a", tokens, 4), layout(theirs))] == list(asked)


def test_a_large_block_fills_only_the_small_ones_that_are_missing() -> None:
    """Of the four, the first two are cached."""
    tokens = prompt(100)
    source, e = holder(LARGE, tokens), engine(SMALL)
    e.add(request("x", tokens[:33], 1))
    run(e)
    a = request("a", tokens, 4)
    before = e.load().held_blocks
    for m in e.expect(a, layout(LARGE)):
        bring(source, e, a, m, layout(LARGE))
    assert e.load().held_blocks - before == 7
    assert e.ready("a", oracle(tokens, 1)) == 1
    assert (a.num_cached_tokens, a.num_fetched_tokens) == (32, 68)
    assert run(e) == {"a": oracle(tokens, 4)[1:]}


@pytest.mark.parametrize("order", [[3, 2, 1, 0, 6, 5, 4], [6, 0, 5, 1, 4, 2, 3]])
def test_parts_may_come_in_any_order_and_twice(order: list[int]) -> None:
    tokens = prompt(100)
    source, e = holder(SMALL, tokens), engine(LARGE)
    a = request("a", tokens, 6)
    missing = e.expect(a, layout(SMALL))
    for index in order:
        assert bring(source, e, a, missing[index], layout(SMALL))
        bring(source, e, a, missing[index], layout(SMALL))
        e.check()
    assert not bring(source, e, a, missing[0], layout(SMALL)), "nothing of it is missing any more"
    assert e.ready("a", oracle(tokens, 1)) == 1
    assert run(e) == {"a": oracle(tokens, 6)[1:]}


def test_without_a_page_a_part_is_a_miss() -> None:
    tokens = prompt(120)
    source, e = holder(SMALL, tokens), engine(LARGE, num_blocks=2)
    a, b = request("a", tokens, 4), request("b", prompt(128, 5), 1)
    missing = e.expect(a, layout(SMALL))
    theirs = holder(SMALL, prompt(128, 5))
    for m in e.expect(b, layout(SMALL))[::4]:
        assert bring(theirs, e, b, m, layout(SMALL))
    assert not bring(source, e, a, missing[0], layout(SMALL))
    e.check()
    e.abort("b")
    e.ready("a")
    assert run(e) == {"a": oracle(tokens, 4)}


@pytest.mark.parametrize("leave", ["abort", "ready"])
def test_partly_filled_pages_are_given_back(leave: str) -> None:
    tokens = prompt(100)
    source, e = holder(SMALL, tokens), engine(LARGE)
    a = request("a", tokens, 4)
    bring(source, e, a, e.expect(a, layout(SMALL))[1], layout(SMALL))
    assert e.load().held_blocks == 1
    e.check()
    if leave == "abort":
        e.abort("a")
    else:
        e.ready("a")
        e.check()
        e.abort("a")
    idle(e)
    assert e.load().free_blocks == 64


@pytest.mark.parametrize(("index", "size"), list(product([0, 1, 7, 1 << 16], [0, 1, 127, 512])))
def test_bytes_of_another_size_or_place_change_nothing(index: int, size: int) -> None:
    e = engine(LARGE)
    a = request("a", prompt(100), 4)
    e.expect(a, layout(SMALL))
    assert not e.fill("a", index, bytes(size), layout(SMALL))
    assert not e.fill("nobody", 0, bytes(128), layout(SMALL))
    assert state(a).value == "fetching"
    assert e.load().held_blocks == 0
