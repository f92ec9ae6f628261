"""Decoding ahead: what is begun before it is asked for, what is used of it, and what is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from engine import decoding as decoding_module
from engine.decode_step import LADDER, ladder
from engine.engine import Engine, EngineConfig
from engine.places import Places
from engine.request import EngineRequest
from engine.sampler import needs_host
from engine.step import Row
from mesh.params import SamplingParams
from tests.engine.sim_decoding import AheadRunner
from tests.engine.sim_requests import BLOCK, VOCAB, idle, oracle, prompt, request, run, steps


def ahead(num_blocks: int = 64, budget: int = 16) -> tuple[Engine, AheadRunner]:
    runner = AheadRunner(num_blocks, BLOCK, VOCAB)
    return Engine(runner, EngineConfig(8, budget, 200)), runner


def test_every_token_but_the_first_is_computed_ahead() -> None:
    engine, runner = ahead()
    for i in range(5):
        engine.add(request(str(i), prompt(3 * i + 2, i), 9))
    assert run(engine) == {str(i): oracle(prompt(3 * i + 2, i), 9) for i in range(5)}
    assert runner.decoding.num_ahead == 5 * 8
    idle(engine)


def test_the_next_step_is_begun_before_this_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    read_later = decoding_module._read_later

    def noted(tokens: Tensor) -> Callable[[], list[int]]:
        number = len([event for event in events if event.startswith("begin")])
        events.append(f"begin {number}")
        read = read_later(tokens)

        def reading() -> list[int]:
            events.append(f"read {number}")
            return read()

        return reading

    monkeypatch.setattr(decoding_module, "_read_later", noted)
    engine, _ = ahead()
    engine.add(request("a", prompt(5), 5))
    assert run(engine) == {"a": oracle(prompt(5), 5)}
    assert events == ["begin 0", "begin 1", "read 0", "begin 2", "read 1", "begin 3", "read 2", "read 3"]


def test_prompts_in_chunks_do_not_hold_up_those_that_decode() -> None:
    engine, runner = ahead(budget=8)
    engine.add(request("a", prompt(4), 20))
    engine.step()
    engine.add(request("b", prompt(40, 1), 5))
    assert run(engine) == {"a": oracle(prompt(4), 20)[1:], "b": oracle(prompt(40, 1), 5)}
    assert runner.decoding.num_ahead == 19 + 4


def test_a_request_that_arrives_with_one_token_to_compute_is_computed_at_once() -> None:
    engine, runner = ahead()
    engine.add(request("a", prompt(4), 12))
    for _ in range(4):
        engine.step()
    engine.add(request("one", prompt(1, 7), 6))
    assert run(engine) == {"a": oracle(prompt(4), 12)[4:], "one": oracle(prompt(1, 7), 6)}
    assert runner.decoding.num_ahead == 11 + 5


def test_what_was_begun_for_a_row_that_stops_is_dropped() -> None:
    engine, runner = ahead()
    stop = oracle(prompt(6), 4)[3]
    engine.add(request("stops", prompt(6), params=SamplingParams(max_tokens=20, stop_token_ids=(stop,))))
    engine.add(request("goes on", prompt(5, 1), 20))
    assert run(engine) == {"stops": oracle(prompt(6), 4), "goes on": oracle(prompt(5, 1), 20)}
    assert runner.decoding.num_ahead == 3 + 19
    idle(engine)


def test_what_was_begun_for_a_row_that_is_aborted_or_preempted_is_dropped() -> None:
    engine, _ = ahead(num_blocks=10, budget=30)
    for i in range(4):
        engine.add(request(str(i), prompt(6, i), 18))
    for _ in range(3):
        engine.step()
    engine.abort("0")
    tokens = run(engine)
    assert engine.num_preemptions > 0
    assert all(tokens[str(i)] == oracle(prompt(6, i), 18)[-len(tokens[str(i)]) :] for i in range(1, 4))
    idle(engine)


def test_a_preempted_request_is_computed_again_into_its_new_page() -> None:
    """Found in the prefix cache but for its last page, it owes what had been begun, which only the old page has."""
    runner, again = AheadRunner(8, BLOCK, VOCAB), request("a", prompt(2 * BLOCK))
    again.block_table = [0, 1, 2]

    def step(num_tokens: int) -> None:
        (one,) = runner.run([Row(again, num_tokens)])
        assert one.token is not None
        again.num_computed_tokens += num_tokens
        again.tokens.append(one.token)

    step(2 * BLOCK)
    again.num_preemptions, again.block_table = 1, [0, 1, 5]
    for _ in range(3):
        step(1)
    assert again.tokens[2 * BLOCK :] == oracle(prompt(2 * BLOCK), 4)


def test_without_a_page_to_spare_a_row_is_not_computed_ahead() -> None:
    engine, runner = ahead(num_blocks=3)
    engine.add(request("a", prompt(5), 8))
    assert run(engine) == {"a": oracle(prompt(5), 8)}
    assert runner.decoding.num_ahead == 7
    engine, runner = ahead(num_blocks=4)
    for i in range(2):
        engine.add(request(str(i), prompt(3, i), 7))
    assert run(engine) == {str(i): oracle(prompt(3, i), 7) for i in range(2)}
    assert 0 < runner.decoding.num_ahead < 12


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 0},
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": ((1, 2.0),)},
        {"bad_words": ((1,),)},
        {"allowed_token_ids": (1,)},
        {"min_tokens": 1},
    ],
)
def test_what_only_the_host_can_sample_is_not_computed_ahead(params: dict[str, object]) -> None:
    plain = request("a", [1], params=SamplingParams(max_tokens=3, temperature=1.0, top_k=3, top_p=0.5, min_p=0.1))
    assert not needs_host(plain)
    assert needs_host(request("a", [1], params=SamplingParams(max_tokens=3, **params)))  # type: ignore[arg-type]
    engine, runner = ahead()
    engine.add(request("plain", prompt(4), 3))
    engine.add(request("asks", prompt(4, 1), params=SamplingParams(max_tokens=3, temperature=0.0, logprobs=0)))
    steps(engine)
    assert runner.decoding.num_ahead == 0


def requests(*keys: str) -> list[EngineRequest]:
    return [request(key, [1]) for key in keys]


def test_places_have_no_gaps_and_nobody_moves_but_into_one() -> None:
    places, (a, b, c, d, e) = Places(), requests("a", "b", "c", "d", "e")
    assert places.arrange([a, b, c, d]) == {"a": 0, "b": 1, "c": 2, "d": 3}
    assert places.arrange([d, c, a]) == {"a": 0, "d": 1, "c": 2}
    assert places.arrange([a, e, c, d]) == {"a": 0, "d": 1, "c": 2, "e": 3}
    assert places.arrange([e]) == {"e": 0}
    assert len(places) == 1


def test_only_pages_that_the_device_lacks_are_told() -> None:
    places, (a, b) = Places(), requests("a", "b")
    a.block_table, b.block_table = [7, 8, 9], [4, 5]
    places.arrange([a, b])
    assert places.untold_pages([(0, 2), (1, 1)]) == ([0, 0, 1], [0, 1, 0], [7, 8, 4])
    assert places.untold_pages([(0, 3), (1, 1)]) == ([0], [2], [9])
    places.arrange([b])
    assert places.untold_pages([(0, 2)]) == ([0, 0], [0, 1], [4, 5])
    b.num_preemptions, b.block_table = 1, [1]
    places.arrange([b])
    assert places.untold_pages([(0, 1)]) == ([0], [0], [1])


def test_the_ladder_ends_at_the_largest_batch() -> None:
    assert ladder(1) == (1,)
    assert ladder(5) == (1, 2, 4, 5)
    assert ladder(256) == (*LADDER, 256)
    assert ladder(300) == (*LADDER, 256, 300)
