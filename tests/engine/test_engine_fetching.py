"""Blocks that come from another engine: every way they can arrive, be late, or not come at all."""

from __future__ import annotations

import pytest

from engine.engine import Engine
from engine.request import RequestState
from engine.sim_engine import SimRunner
from engine.step import Missing
from mesh import blockhash
from mesh.params import SamplingParams
from tests.engine.sim_requests import (
    BLOCK,
    ROOT,
    carry,
    engine,
    idle,
    oracle,
    prefill,
    prompt,
    request,
    run,
    state,
    steps,
)


def prefilled(*prompts: list[int]) -> Engine:
    """An engine that holds these prompts' blocks."""
    e = engine(num_blocks=200, budget=64)
    for i, tokens in enumerate(prompts):
        e.add(prefill(f"p{i}", tokens))
    steps(e)
    return e


def fill(source: Engine, target: Engine, key: str, missing: Missing) -> bool:
    found = source.export(missing.hash)
    assert found is not None
    return target.fill(key, missing.index, found[0])


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 15, 16, 33])
def test_disaggregated_equals_co_located(length: int) -> None:
    tokens = prompt(length)
    source, e = prefilled(tokens), engine()
    a = request("a", tokens, 12)
    assert carry(source, e, a) == -(-length // BLOCK)
    assert e.ready("a", oracle(tokens, 1)) == 1
    outputs = steps(e)
    assert [out.token for o in outputs for out in o.tokens] == oracle(tokens, 12)[1:]
    assert sum(o.num_scheduled_tokens for o in outputs) == 11, "nothing that was fetched is computed again"
    assert (a.num_cached_tokens, a.num_fetched_tokens) == (0, length)
    idle(e)


def test_missing_blocks_are_named_by_the_chain_and_the_tail_by_its_tokens() -> None:
    full = blockhash.chain(ROOT, prompt(10), BLOCK)
    assert engine().expect(request("a", prompt(10))) == (
        Missing(0, full[0], 4),
        Missing(1, full[1], 4),
        Missing(2, blockhash.block_hash(full[1], prompt(10)[8:]), 2),
    )


def test_cached_blocks_are_held_at_once_and_not_asked_for() -> None:
    e = engine(num_blocks=6)
    e.add(request("x", prompt(8), 1))
    run(e)
    a = request("a", prompt(14), 4)
    assert [m.index for m in e.expect(a)] == [2, 3]
    assert e.load().held_blocks == 2
    e.add(request("y", prompt(14, 5), 2))
    run(e)
    source = prefilled(prompt(14))
    for m in (Missing(2, a.block_hashes[2], 4), *e.expect(request("z", prompt(14), 4))[-1:]):
        assert fill(source, e, "a", m)
    e.abort("z")
    assert e.ready("a", oracle(prompt(14), 1)) == 1
    assert (a.num_cached_tokens, a.num_fetched_tokens) == (8, 6)
    assert run(e) == {"a": oracle(prompt(14), 4)[1:]}


def test_blocks_cached_behind_a_gap_are_held_too() -> None:
    e = engine(num_blocks=5)
    source = prefilled(prompt(16))
    f = request("f", prompt(16), 2)
    e.expect(f)
    for index in (1, 3):
        assert fill(source, e, "f", Missing(index, f.block_hashes[index], 4))
    a = request("a", prompt(16), 2)
    assert [m.index for m in e.expect(a)] == [0, 2]
    e.abort("f")
    assert e.load().held_blocks == 2


@pytest.mark.parametrize("order", [[2, 1, 0, 3], [3, 2, 1, 0]])
def test_blocks_may_come_in_any_order(order: list[int]) -> None:
    source, e = prefilled(prompt(14)), engine()
    missing = e.expect(request("a", prompt(14), 5))
    assert all(fill(source, e, "a", missing[index]) for index in order)
    assert e.ready("a", oracle(prompt(14), 1)) == 1
    assert run(e) == {"a": oracle(prompt(14), 5)[1:]}


@pytest.mark.parametrize(("lost", "owed"), [(0, 15), (1, 11), (2, 7), (3, 3)])
def test_a_block_that_does_not_come_is_computed_with_all_behind_it(lost: int, owed: int) -> None:
    source, e = prefilled(prompt(14)), engine()
    missing = e.expect(request("a", prompt(14), 5))
    for m in missing:
        if m.index != lost:
            assert fill(source, e, "a", m)
    assert e.ready("a", oracle(prompt(14), 1)) == owed
    e.check()
    outputs = steps(e)
    assert [out.token for o in outputs for out in o.tokens] == oracle(prompt(14), 5)[1:]
    assert outputs[0].num_scheduled_tokens <= owed, "full blocks behind the gap that came are found in the cache"
    idle(e)


def test_nothing_comes_at_all() -> None:
    e = engine()
    e.expect(request("a", prompt(14), 5))
    assert e.ready("a") == 14
    assert run(e) == {"a": oracle(prompt(14), 5)}


@pytest.mark.parametrize(("length", "owed"), [(13, 1), (14, 1), (16, 4), (1, 1), (4, 4)])
def test_without_a_first_token_the_last_token_is_computed_again(length: int, owed: int) -> None:
    source, e = prefilled(prompt(length)), engine()
    carry(source, e, request("a", prompt(length), 5))
    assert e.ready("a") == owed
    assert run(e) == {"a": oracle(prompt(length), 5)}
    idle(e)


def test_a_page_that_others_can_find_is_not_written_again() -> None:
    source, e = prefilled(prompt(8)), engine()
    a = request("a", prompt(8), 5)
    carry(source, e, a)
    shared = a.fetched_pages[1]
    e.ready("a")
    e.step()
    assert a.block_table[1] != shared


def test_a_block_is_accepted_once() -> None:
    source, e = prefilled(prompt(8)), engine()
    (first, _) = e.expect(request("a", prompt(8)))
    assert fill(source, e, "a", first)
    held = e.load().held_blocks
    assert not fill(source, e, "a", first)
    assert e.load().held_blocks == held


def test_bytes_for_nobody_are_refused() -> None:
    e = engine()
    payload = bytes(SimRunner(1, BLOCK).layout.block_bytes)
    assert not e.fill("nobody", 0, payload)
    e.add(request("w", prompt(8)))
    assert not e.fill("w", 0, payload)
    e.expect(request("a", prompt(8, 1)))
    assert not e.fill("a", 7, payload)
    assert not e.fill("a", 0, payload[1:])
    assert e.fill("a", 0, memoryview(payload))
    e.ready("a")
    assert not e.fill("a", 1, payload)
    e.abort("a")
    assert not e.fill("a", 1, payload)


def test_no_page_left_is_a_miss() -> None:
    source, e = prefilled(prompt(14)), engine(num_blocks=6)
    e.add(prefill("h", prompt(12, 3)))
    steps(e)
    missing = e.expect(request("a", prompt(14), 3))
    assert [fill(source, e, "a", m) for m in missing] == [True, True, True, False]
    assert e.ready("a", oracle(prompt(14), 1)) == 3
    e.release("h")
    assert run(e) == {"a": oracle(prompt(14), 3)[1:]}


def test_a_filled_block_is_an_ordinary_cached_block() -> None:
    source, e = prefilled(prompt(9)), engine()
    missing = e.expect(request("a", prompt(9)))
    assert fill(source, e, "a", missing[0])
    assert e.snapshot() == (missing[0].hash,)
    e.abort("a")
    b = request("b", prompt(9), 2)
    e.add(b)
    output = e.step()
    assert output.stored[0] == missing[0].hash
    assert b.num_cached_tokens == 4


def test_a_block_that_was_computed_meanwhile_takes_no_second_page() -> None:
    source, e = prefilled(prompt(9)), engine()
    first, second = request("a", prompt(9)), request("b", prompt(9))
    missing = e.expect(first)
    e.expect(second)
    assert fill(source, e, "a", missing[0])
    assert fill(source, e, "b", missing[0])
    assert first.fetched_pages == second.fetched_pages
    assert e.load().held_blocks == 1


def test_ready_looks_once_more_for_what_did_not_come() -> None:
    source, e = prefilled(prompt(9)), engine()
    a = request("a", prompt(9), 4)
    missing = e.expect(a)
    e.expect(request("b", prompt(9)))
    for m in missing[:2]:
        assert fill(source, e, "b", m)
    assert fill(source, e, "a", missing[2])
    assert e.ready("a", oracle(prompt(9), 1)) == 1
    assert (a.num_cached_tokens, a.num_fetched_tokens) == (8, 1)


def test_a_fetched_tail_grows_into_a_full_block_with_a_name() -> None:
    source, e = prefilled(prompt(6)), engine()
    carry(source, e, request("a", prompt(6), 8))
    e.ready("a", oracle(prompt(6), 1))
    run(e)
    everything = prompt(6) + oracle(prompt(6), 8)
    assert e.snapshot() == tuple(blockhash.chain(ROOT, everything[:-1], BLOCK))
    b = request("b", everything, 3)
    e.add(b)
    assert run(e) == {"b": oracle(everything, 3)}
    assert b.num_cached_tokens == 12


def test_ready_is_zero_when_the_new_token_ends_the_request() -> None:
    e = engine()
    first = oracle(prompt(6), 1)
    a = request("a", prompt(6), params=SamplingParams(max_tokens=9, stop_token_ids=tuple(first)))
    e.expect(a)
    assert e.ready("a", first) == 0
    assert state(a) is RequestState.FINISHED
    assert not e.has_work
    idle(e)


def test_ready_means_nothing_to_a_request_that_is_not_fetching() -> None:
    e = engine()
    assert e.ready("nobody", [1]) == 0
    a = request("a", prompt(6))
    e.add(a)
    assert e.ready("a", [1]) == 0
    assert a.tokens == prompt(6)


def test_prompt_logprobs_without_a_first_token_need_the_whole_prompt() -> None:
    source, e = prefilled(prompt(10)), engine()
    a = request("a", prompt(10), params=SamplingParams(max_tokens=2, prompt_logprobs=0))
    carry(source, e, a)
    assert e.ready("a") == 10
    outs = [out for output in steps(e) for out in output.tokens]
    assert len(outs[0].prompt_logprobs) == 10
    assert (a.num_cached_tokens, a.num_fetched_tokens) == (0, 0)


def test_prompt_logprobs_are_the_prefilling_engines_business() -> None:
    source, e = prefilled(prompt(10)), engine()
    a = request("a", prompt(10), params=SamplingParams(max_tokens=3, prompt_logprobs=0))
    carry(source, e, a)
    assert e.ready("a", oracle(prompt(10), 1)) == 1
    assert [out.prompt_logprobs for output in steps(e) for out in output.tokens] == [(), ()]


def test_a_damaged_block_would_be_seen() -> None:
    source, e = prefilled(prompt(10)), engine()
    for m in e.expect(request("a", prompt(10), 3)):
        found = source.export(m.hash)
        assert found is not None
        damaged = bytes([found[0][0] ^ 1]) + found[0][1:]
        assert e.fill("a", m.index, damaged if m.index == 0 else found[0])
    e.ready("a", oracle(prompt(10), 1))
    assert run(e)["a"][0] != oracle(prompt(10), 2)[1]


def test_a_request_moves_on_from_a_decoding_engine() -> None:
    """The conversation's history is fetched from the worker that decoded the last turn."""
    decoding = engine()
    decoding.add(request("a", prompt(9), 20))
    answer = run(decoding)["a"]
    following = engine()
    b = request("b", prompt(9) + answer + [1, 2, 3], 5)
    carry(decoding, following, b)
    assert following.ready("b") == 9 + 20 + 3 - 28
    assert run(following) == {"b": oracle(prompt(9) + answer + [1, 2, 3], 5)}
    assert b.num_fetched_tokens == 28


def test_a_prefill_passes_on_the_blocks_that_it_fetched() -> None:
    """Its first step reports them too, so that whoever fetches from it needs no other source."""
    tokens = prompt(19)
    source, e = prefilled(tokens[:12]), engine()
    held = prefill("a", tokens)
    for missing in e.expect(held)[: 12 // BLOCK]:
        assert fill(source, e, "a", missing)
    assert e.ready("a") == 19 - 12
    outputs = steps(e)
    assert [block.index for o in outputs for block in o.ready] == [0, 1, 2, 3, 4]
    assert sum(o.num_scheduled_tokens for o in outputs) == 19 - 12
    following = engine()
    b = request("b", tokens, 8)
    assert carry(e, following, b) == 5
    following.ready("b", oracle(tokens, 1))
    assert run(following)["b"] == oracle(tokens, 8)[1:]
    e.release("a")
    idle(e)


def test_abort_is_legal_in_every_state_and_leaves_nothing() -> None:
    source, e = prefilled(prompt(14)), engine(budget=8)
    e.add(request("waiting", prompt(20, 1)))
    e.abort("waiting")
    missing = e.expect(request("fetching", prompt(14)))
    fill(source, e, "fetching", missing[1])
    e.abort("fetching")
    carry(source, e, request("ready", prompt(14)))
    e.ready("ready", [1])
    e.abort("ready")
    e.add(request("prefilling", prompt(20, 2)))
    e.step()
    e.abort("prefilling")
    e.add(request("decoding", prompt(5, 3), 9))
    e.step()
    e.step()
    e.abort("decoding")
    e.add(prefill("held", prompt(5, 4)))
    steps(e)
    e.abort("held")
    for key in ("waiting", "fetching", "ready", "prefilling", "decoding", "held", "nobody"):
        e.abort(key)
    assert not e.has_work
    idle(e)
