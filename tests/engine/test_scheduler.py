"""Who is computed, who waits and who loses its pages."""

from __future__ import annotations

from random import Random

import pytest

from engine.engine import EngineConfig
from engine.request import EngineRequest, RequestState
from mesh.params import SamplingParams
from tests.engine.sim_requests import engine, idle, oracle, prefill, prompt, request, run, state, steps


@pytest.mark.parametrize("num_blocks", [8, 10, 13, 20])
def test_preemption_changes_no_token(num_blocks: int) -> None:
    e = engine(num_blocks=num_blocks, budget=11)
    prompts = {str(i): prompt(3 + 2 * i, i) for i in range(6)}
    for key, tokens in prompts.items():
        e.add(request(key, tokens, 15))
    assert run(e) == {key: oracle(tokens, 15) for key, tokens in prompts.items()}
    assert e.num_preemptions > 0
    idle(e)


def test_the_oldest_is_never_preempted_and_finishes_first() -> None:
    e = engine(num_blocks=8)
    requests = [request(str(i), prompt(4, i), 20) for i in range(4)]
    for r in requests:
        e.add(r)
    finished = [out.request.key for output in steps(e) for out in output.tokens if out.finish]
    assert finished == ["0", "1", "2", "3"]
    assert requests[0].num_preemptions == 0
    assert e.num_preemptions > 0


def test_the_youngest_loses_its_pages_and_comes_back_first() -> None:
    e = engine(num_blocks=4, seqs=2)
    a, b = request("a", prompt(7, 1), 8), request("b", prompt(7, 2), 8)
    e.add(a)
    e.add(b)
    e.step()
    e.add(request("c", prompt(3, 3), 2))
    e.step()
    e.step()
    assert (a.num_preemptions, b.num_preemptions) == (0, 1)
    assert (state(b), b.block_table) == (RequestState.WAITING, [])
    later = [out.request.key for output in steps(e) for out in output.tokens if out.request is not a]
    assert later[0] == "b"


def ranked(key: str, tokens: list[int], max_tokens: int, priority: int) -> EngineRequest:
    return request(key, tokens, params=SamplingParams(max_tokens=max_tokens, priority=priority))


def test_a_lower_number_goes_first_and_equals_go_by_age() -> None:
    e = engine(seqs=1)
    for key, priority in (("a", 0), ("late", 9), ("b", 0), ("soon", -9)):
        e.add(ranked(key, prompt(4, priority), 3, priority))
    finished = [out.request.key for output in steps(e) for out in output.tokens if out.finish]
    assert finished == ["soon", "a", "b", "late"]


def test_when_pages_run_out_the_lower_priority_gives_up_its_own_although_it_is_older() -> None:
    e = engine(num_blocks=4)
    first, urgent = ranked("first", prompt(7, 1), 8, 0), ranked("urgent", prompt(7, 2), 8, -1)
    e.add(first)
    e.add(urgent)
    assert run(e) == {"first": oracle(prompt(7, 1), 8), "urgent": oracle(prompt(7, 2), 8)}
    assert (first.num_preemptions, urgent.num_preemptions) == (1, 0)
    idle(e)


@pytest.mark.parametrize("seed", range(6))
def test_priorities_change_no_token_and_block_nobody_for_ever(seed: int) -> None:
    rng = Random(seed)
    e = engine(num_blocks=10, budget=11, seqs=3)
    prompts = {str(i): prompt(3 + 2 * i, i % 3) for i in range(8)}
    tokens: dict[str, list[int]] = {key: [] for key in prompts}
    for key, ids in prompts.items():
        e.add(ranked(key, ids, 15, rng.randrange(-2, 3)))
        for _ in range(rng.randrange(6)):
            for out in e.step().tokens:
                tokens[out.request.key].append(out.token)
            e.check()
    for key, more in run(e).items():
        tokens[key] += more
    assert tokens == {key: oracle(ids, 15) for key, ids in prompts.items()}
    idle(e)


def test_a_preempted_request_finds_its_own_blocks_again() -> None:
    e = engine(num_blocks=9, seqs=2)
    a, b = request("a", prompt(7, 1), 18), request("b", prompt(7, 2), 14)
    e.add(a)
    e.add(b)
    computed = sum(output.num_scheduled_tokens for output in steps(e))
    assert b.num_preemptions == 1
    everything = (7 + 18 - 1) + (7 + 14 - 1)
    assert everything < computed < everything + b.num_tokens - 4, "some blocks were found, not computed"
    assert b.num_cached_tokens == 0, "its own blocks are no prefix hit of the prompt"


def test_a_younger_fetching_request_loses_its_pages_and_goes_on_as_a_miss() -> None:
    source, e = engine(), engine(num_blocks=8)
    source.add(prefill("s", prompt(12, 9)))
    steps(source)
    e.add(request("a", prompt(8), 20))
    e.step()
    f = request("f", prompt(12, 9), 4)
    missing = e.expect(f)
    for m in missing[:2]:
        found = source.export(m.hash)
        assert found is not None
        assert e.fill("f", m.index, found[0])
    run(e)
    assert (f.num_preemptions, state(f), f.fetched_pages) == (1, RequestState.FETCHING, {})
    late = source.export(missing[2].hash)
    assert late is not None
    assert not e.fill("f", 2, late[0]), "what comes after the preemption is not accepted"
    e.ready("f", oracle(prompt(12, 9), 1))
    assert run(e) == {"f": oracle(prompt(12, 9), 4)[1:]}
    idle(e)


def test_a_waiting_request_with_pages_is_preempted_for_an_older_one() -> None:
    e = engine(num_blocks=8, seqs=1)
    e.add(prefill("p", prompt(9, 5)))
    steps(e)
    e.release("p")
    a = request("a", prompt(7), 20)
    e.add(a)
    e.step()
    f = request("f", prompt(9, 5), 4)
    e.expect(f)
    e.ready("f")
    assert len(f.block_table) == 2
    assert run(e) == {"a": oracle(prompt(7), 20)[1:], "f": oracle(prompt(9, 5), 4)}
    assert f.num_preemptions == 1


def test_older_waiting_pages_do_not_lock_out_the_only_running_request() -> None:
    source, e = engine(), engine(num_blocks=6, seqs=1)
    source.add(prefill("s", prompt(16, 9)))
    steps(source)
    f = request("f", prompt(16, 9), 8)
    missing = e.expect(f)
    e.add(request("a", prompt(4), 12))
    e.step()
    for m in missing:
        found = source.export(m.hash)
        assert found is not None
        e.fill("f", m.index, found[0])
    e.ready("f")
    tokens = run(e)
    assert tokens["f"] == oracle(prompt(16, 9), 8)
    assert tokens["a"] == oracle(prompt(4), 12)[1:]
    idle(e)


def test_held_pages_are_never_taken() -> None:
    e = engine(num_blocks=5)
    e.add(prefill("p", prompt(8, 1)))
    steps(e)
    e.add(request("a", prompt(9), 8))
    assert len(run(e)["a"]) < 8, "it stops at the last page"
    assert e.load().held == 1
    assert e.has_work
    e.release("p")
    run(e)
    idle(e)


def test_held_pages_are_not_taken_by_an_older_request_either() -> None:
    e = engine(num_blocks=7)
    a = request("a", prompt(9), 14)
    e.add(a)
    e.step()
    p = prefill("p", prompt(8, 1))
    e.add(p)
    e.step()
    assert state(p) is RequestState.HELD
    run(e)
    assert (p.num_preemptions, len(p.block_table)) == (0, 2)
    e.release("p")
    run(e)
    assert a.tokens == prompt(9) + oracle(prompt(9), 14)


def test_a_waiting_request_starts_only_when_all_its_pages_are_there() -> None:
    e = engine(num_blocks=8, budget=64)
    a, b = request("a", prompt(15), 3), request("b", prompt(17, 1), 3)
    e.add(a)
    e.add(b)
    e.step()
    assert (state(a), state(b)) == (RequestState.RUNNING, RequestState.WAITING)
    run(e)
    assert e.num_preemptions == 0


def test_nobody_overtakes_a_request_that_waits_for_pages() -> None:
    e = engine(num_blocks=8, budget=64)
    for key, length in (("a", 15), ("b", 17), ("c", 2)):
        e.add(request(key, prompt(length, length), 3))
    order = [out.request.key for output in steps(e) for out in output.tokens if out.index == 0]
    assert order == ["a", "b", "c"]


def test_a_shared_prompt_is_computed_once_by_requests_in_flight_together() -> None:
    e = engine(budget=8)
    for i in range(4):
        e.add(request(str(i), prompt(34), 3))
    outputs = steps(e)
    assert [out.token for o in outputs for out in o.tokens if out.request.key == "3"] == oracle(prompt(34), 3)
    assert sum(o.num_scheduled_tokens for o in outputs) == 34 + 3 * 2 + 4 * 2


def test_a_sharer_holds_nothing_while_it_waits_and_starts_once_the_shared_part_is_there() -> None:
    e = engine(budget=64)
    e.add(request("x", prompt(8), 1))
    run(e)
    a, b = request("a", prompt(12) + prompt(20, 1), 50), request("b", prompt(12) + prompt(3, 2), 3)
    e.add(a)
    e.add(b)
    e.step()
    assert (state(a), state(b), b.block_table) == (RequestState.RUNNING, RequestState.WAITING, [])
    e.step()
    assert state(b) is RequestState.RUNNING
    assert b.num_cached_tokens == 12


def test_requests_that_share_nothing_pass_one_that_waits_for_a_shared_block() -> None:
    e = engine(budget=8, seqs=8)
    e.add(request("a", prompt(30), 3))
    e.add(request("b", prompt(30), 3))
    e.add(request("c", prompt(5, 7), 3))
    order = [out.request.key for output in steps(e) for out in output.tokens if out.index == 0]
    assert order.index("c") < order.index("b")


def test_the_waiting_sharer_goes_on_when_the_computing_one_is_aborted() -> None:
    e = engine(budget=8)
    e.add(request("a", prompt(30), 3))
    b = request("b", prompt(30), 3)
    e.add(b)
    e.step()
    assert state(b) is RequestState.WAITING
    e.abort("a")
    assert run(e) == {"b": oracle(prompt(30), 3)}
    assert b.num_cached_tokens == 8, "what was computed before the abort is found"


def test_a_request_waits_for_blocks_that_an_earlier_one_fetches() -> None:
    source, e = engine(), engine()
    source.add(prefill("s", prompt(16)))
    steps(source)
    missing = e.expect(request("f", prompt(16), 3))
    b = request("b", [*prompt(16), 5, 6], 3)
    e.add(b)
    assert e.step().num_scheduled_tokens == 0
    for m in missing:
        found = source.export(m.hash)
        assert found is not None
        e.fill("f", m.index, found[0])
    tokens = run(e)
    assert tokens["b"] == oracle([*prompt(16), 5, 6], 3)
    assert b.num_cached_tokens == 16


@pytest.mark.parametrize("end", ["abort", "ready"])
def test_a_fetch_that_ends_empty_lets_those_who_waited_for_it_compute(end: str) -> None:
    e = engine()
    e.expect(request("f", prompt(16), 3))
    e.add(request("b", prompt(16), 3))
    assert e.step().num_scheduled_tokens == 0
    getattr(e, end)("f")
    assert run(e)["b"] == oracle(prompt(16), 3)


def test_only_an_earlier_request_is_waited_for() -> None:
    e = engine(budget=8)
    e.add(request("a", prompt(16), 3))
    e.expect(request("f", prompt(16), 3))
    assert e.step().num_scheduled_tokens == 8


def test_a_request_with_prompt_logprobs_waits_for_nobody() -> None:
    e = engine(budget=64)
    e.add(request("a", prompt(16), 3))
    e.add(request("b", prompt(16), params=SamplingParams(max_tokens=3, prompt_logprobs=0)))
    assert e.step().num_scheduled_tokens == 32
    run(e)
    idle(e)


def test_a_preempted_prompt_collects_its_logprobs_from_the_start_again() -> None:
    e = engine(num_blocks=8, budget=6)
    e.add(request("a", prompt(5), 20))
    b = request("b", prompt(22, 1), params=SamplingParams(max_tokens=2, prompt_logprobs=0))
    e.add(b)
    outs = [out for output in steps(e) for out in output.tokens if out.request is b]
    assert b.num_preemptions > 0
    entries = outs[0].prompt_logprobs
    assert [entry.token for entry in entries if entry is not None] == prompt(22, 1)[1:]


@pytest.mark.parametrize("field", ["max_num_seqs", "max_num_batched_tokens", "max_model_len"])
def test_bounds_below_one_are_refused_by_name(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        EngineConfig(**{"max_num_seqs": 1, "max_num_batched_tokens": 1, "max_model_len": 1, field: 0})


def test_the_same_requests_give_the_same_steps() -> None:
    def trace() -> list[tuple[int, tuple[str, ...], tuple[bytes, ...]]]:
        e = engine(num_blocks=12, budget=9)
        for i in range(7):
            e.add(request(str(i), prompt(4 + 3 * i, i % 3), 9))
        return [
            (o.num_scheduled_tokens, tuple(out.request.key for out in o.tokens), o.stored + o.removed) for o in steps(e)
        ]

    assert trace() == trace()
