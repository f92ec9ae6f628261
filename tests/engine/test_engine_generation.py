"""Tokens come out right however a prompt is cut, batched or cached."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from engine.engine import CannotFit, Engine, EngineConfig
from engine.request import RequestState
from engine.sim_engine import SimRunner
from engine.step import Row, Sampled
from mesh.params import SamplingParams
from tests.engine.sim_requests import engine, idle, oracle, prefill, prompt, request, run, state, steps


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8, 15, 16, 17, 40])
@pytest.mark.parametrize("budget", [1, 3, 16, 64])
def test_tokens_equal_the_oracle_for_any_length_and_budget(length: int, budget: int) -> None:
    e = engine(budget=budget)
    e.add(request("a", prompt(length), 10))
    assert run(e) == {"a": oracle(prompt(length), 10)}
    idle(e)


def test_a_step_never_exceeds_the_token_budget_and_uses_it() -> None:
    e = engine(budget=10)
    for i in range(5):
        e.add(request(str(i), prompt(13, i), 3))
    counts = [output.num_scheduled_tokens for output in steps(e)]
    assert max(counts) == 10
    assert counts[:6] == [10] * 6


def test_running_requests_are_bounded_and_first_come_first_served() -> None:
    e = engine(seqs=2, budget=64)
    for i in range(5):
        e.add(request(str(i), prompt(5, i), 3))
    order: list[str] = []
    for output in steps(e):
        assert len(output.tokens) <= 2
        order += [out.request.key for out in output.tokens if out.index == 0]
    assert order == ["0", "1", "2", "3", "4"]


def test_a_batch_gives_the_same_tokens_as_each_request_alone() -> None:
    e = engine(num_blocks=400, seqs=64, budget=100)
    prompts = {str(i): prompt(1 + 3 * i, i) for i in range(16)}
    for key, tokens in prompts.items():
        e.add(request(key, tokens, 12))
    assert run(e) == {key: oracle(tokens, 12) for key, tokens in prompts.items()}


def test_long_decoding_names_generated_blocks_too() -> None:
    e = engine(model_len=300)
    e.add(request("a", prompt(5), 100))
    tokens = run(e)["a"]
    assert tokens == oracle(prompt(5), 100)
    assert len(e.snapshot()) == (5 + 100 - 1) // 4
    again = request("b", prompt(5) + tokens[:50], 100, num_prompt_tokens=5)
    e.add(again)
    assert run(e)["b"] == tokens[50:]
    assert again.num_cached_tokens == 5, "only prompt tokens are counted"


def test_indices_count_generated_tokens_and_end_with_a_reason() -> None:
    e = engine()
    tokens = prompt(6) + oracle(prompt(6), 2)
    e.add(request("a", tokens, 5, num_prompt_tokens=6))
    outs = [out for output in steps(e) for out in output.tokens]
    assert [out.index for out in outs] == [2, 3, 4]
    assert [out.finish for out in outs] == [None, None, "length"]


def test_stop_token_is_part_of_the_output_and_ends_it() -> None:
    expected = oracle(prompt(6), 20)
    e = engine()
    a = request("a", prompt(6), params=SamplingParams(max_tokens=20, stop_token_ids=(7, expected[4])))
    e.add(a)
    outs = [out for output in steps(e) for out in output.tokens]
    assert [out.token for out in outs] == expected[:5]
    assert outs[-1].finish == "stop"
    assert state(a) is RequestState.FINISHED
    idle(e)


def test_a_stop_token_before_min_tokens_does_not_end_the_request() -> None:
    expected = oracle(prompt(6), 20)
    e = engine()
    e.add(request("a", prompt(6), params=SamplingParams(max_tokens=9, stop_token_ids=(expected[2],), min_tokens=4)))
    assert run(e) == {"a": expected[:9]}


def test_the_context_length_ends_a_request() -> None:
    e = engine(model_len=12)
    e.add(request("a", prompt(9), 100))
    outs = [out for output in steps(e) for out in output.tokens]
    assert [out.finish for out in outs] == [None, None, "length"]


@pytest.mark.parametrize("finish", ["stop", "length"])
def test_an_end_on_the_handed_over_token_leaves_nothing_held(finish: str) -> None:
    first = oracle(prompt(6), 1)
    params = SamplingParams(max_tokens=9, stop_token_ids=tuple(first)) if finish == "stop" else SamplingParams(1)
    e = engine()
    e.add(request("a", prompt(6), stop_after=1, hold=True, params=params))
    assert [out.finish for output in steps(e) for out in output.tokens] == [finish]
    idle(e)


def test_handoff_without_hold_finishes() -> None:
    e = engine()
    a = request("a", prompt(6), 9, stop_after=2)
    e.add(a)
    assert [out.finish for output in steps(e) for out in output.tokens] == [None, "handoff"]
    assert state(a) is RequestState.FINISHED
    idle(e)


def test_held_blocks_stay_until_release() -> None:
    e = engine()
    a = prefill("a", prompt(10))
    e.add(a)
    steps(e)
    assert state(a) is RequestState.HELD
    assert not e.has_work
    assert (e.load().held, e.load().held_blocks) == (1, 3)
    e.release("a")
    e.release("a")
    assert state(a) is RequestState.FINISHED
    idle(e)
    assert e.load().cached_blocks == 2


def test_release_does_not_end_a_running_request() -> None:
    e = engine()
    e.add(request("a", prompt(6), 5))
    e.step()
    e.release("a")
    assert run(e) == {"a": oracle(prompt(6), 5)[1:]}


@pytest.mark.parametrize("budget", [3, 64])
def test_prompt_logprobs_cover_the_prompt_whatever_the_chunks(budget: int) -> None:
    e = engine(budget=budget)
    for key in ("a", "b"):
        e.add(request(key, prompt(10), params=SamplingParams(max_tokens=2, prompt_logprobs=1)))
        outs = [out for output in steps(e) for out in output.tokens]
        first = outs[0].prompt_logprobs
        assert first[0] is None
        assert [entry.token for entry in first if entry is not None] == prompt(10)[1:]
        assert outs[1].prompt_logprobs == ()
        assert outs[0].request.num_cached_tokens == 0, "the prefix cache holds no log-probabilities"


def test_logprobs_have_the_shape_that_was_asked_for() -> None:
    e = engine()
    e.add(request("a", prompt(4), params=SamplingParams(max_tokens=1, logprobs=3)))
    (out,) = [out for output in steps(e) for out in output.tokens]
    assert out.logprob is not None
    assert (out.logprob.token, out.logprob.logprob, len(out.logprob.top_tokens)) == (out.token, 0.0, 3)


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    e = engine(model_len=10)
    with pytest.raises(CannotFit, match="10 tokens leave no room") as caught:
        e.add(request("a", prompt(10)))
    assert caught.value.code == "too_long"
    idle(e)


def test_a_request_that_never_fits_the_pool_is_refused_with_the_numbers() -> None:
    e = engine(num_blocks=4)
    with pytest.raises(CannotFit, match="18 tokens need 5 KV blocks; this worker has 4") as caught:
        e.add(request("a", prompt(10), 8))
    assert caught.value.code == "no_memory"
    with pytest.raises(ValueError, match="KV blocks"):
        e.expect(request("a", prompt(10), 8))
    e.add(request("a", prompt(10), 7))
    assert run(e) == {"a": oracle(prompt(10), 7)}
    assert e.capacity_tokens == 17


def test_a_prefill_needs_no_room_for_what_is_decoded_elsewhere() -> None:
    e = engine(num_blocks=4)
    e.add(prefill("a", prompt(16), 100))
    assert run(e) == {"a": oracle(prompt(16), 1)}


def test_a_key_is_taken_once() -> None:
    e = engine()
    e.add(request("a", prompt(4)))
    with pytest.raises(CannotFit, match="here already"):
        e.expect(request("a", prompt(4)))


def test_load_counts_requests_blocks_and_debt() -> None:
    seconds = map(float, range(1000))
    e = engine(seqs=1, budget=8, clock=lambda: next(seconds))
    e.add(request("a", prompt(12), 9))
    e.add(request("b", prompt(5, 1), 9))
    e.expect(request("c", prompt(5, 2), 9))
    e.step()
    load = e.load()
    assert (load.running, load.waiting, load.fetching, load.held) == (1, 1, 1, 0)
    assert (load.free_blocks, load.cached_blocks, load.held_blocks) == (62, 0, 2)
    assert load.owed_tokens == 4 + 5
    assert load.prefill_tokens_per_s == 8.0
    assert e.num_steps == 1


class BrokenRunner(SimRunner):
    def run(self, rows: Sequence[Row]) -> list[Sampled]:
        raise RuntimeError("the device is gone")


def test_a_runners_failure_leaves_step() -> None:
    e = Engine(BrokenRunner(8, 4), EngineConfig(1, 16, 32))
    e.add(request("a", prompt(4)))
    with pytest.raises(RuntimeError, match="device is gone"):
        e.step()
