"""Thinking before the answer: marks, budget and grammar, in the sampler and in the engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from engine.sampler import sample
from engine.thinking import Thought
from mesh.params import Thinking
from tests.engine.sim_requests import engine, run
from tests.engine.test_grammar import AB, EOS, OTHER_EOS, TOKENS, A, B, C, request

OPEN, CLOSE = 8, OTHER_EOS


def state(output: Sequence[int], **fields: Any) -> tuple[int | None, int | None]:
    """Where the answer begins, and what must follow; the same however the output comes."""
    whole = Thought(Thinking(CLOSE, **fields))
    whole.follow(output)
    piecewise = Thought(Thinking(CLOSE, **fields))
    for end in range(len(output) + 1):
        piecewise.follow(output[:end])
    assert (whole.answer_at, whole.forced) == (piecewise.answer_at, piecewise.forced)
    return whole.answer_at, whole.forced


@pytest.mark.parametrize(
    ("output", "fields", "expected"),
    [
        ([], {}, (None, None)),
        ([A, B], {}, (None, None)),
        ([A, CLOSE], {}, (2, None)),
        ([A, CLOSE, B, CLOSE], {}, (2, None)),
        ([CLOSE], {"budget": 0}, (1, None)),
        ([], {"budget": 0}, (None, CLOSE)),
        ([A], {"budget": 2}, (None, None)),
        ([A, A], {"budget": 2}, (None, CLOSE)),
        ([A, A, CLOSE, A, A], {"budget": 2}, (3, None)),
        ([], {"open": OPEN}, (None, None)),
        ([], {"open": OPEN, "budget": 0}, (None, None)),
        ([A], {"open": OPEN}, (0, None)),
        ([CLOSE, OPEN], {"open": OPEN}, (0, None)),
        ([OPEN, A], {"open": OPEN}, (None, None)),
        ([OPEN], {"open": OPEN, "budget": 0}, (None, CLOSE)),
        ([OPEN, A], {"open": OPEN, "budget": 1}, (None, CLOSE)),
        ([OPEN, A, CLOSE], {"open": OPEN, "budget": 1}, (3, None)),
    ],
)
def test_where_the_thinking_ends(
    output: list[int], fields: dict[str, Any], expected: tuple[int | None, int | None]
) -> None:
    assert state(output, **fields) == expected


def drawn(output: Sequence[int], grammar: str | None, thinking: Thinking) -> set[int | None]:
    logits = torch.zeros(60, len(TOKENS))
    rows = [request(grammar, output, seed=i, thinking=thinking) for i in range(60)]
    return {sampled.token for sampled in sample(logits, rows)}


def test_the_grammar_begins_after_the_thinking() -> None:
    thinking = Thinking(CLOSE)
    assert {A, B, C, CLOSE} <= drawn([], 'start: "ab"', thinking)
    assert {A, B, C, CLOSE} <= drawn([C, C], 'start: "ab"', thinking)
    assert drawn([C, CLOSE], 'start: "ab"', thinking) == {A, AB}
    assert drawn([C, CLOSE, AB], 'start: "ab"', thinking) == {EOS}


def test_an_output_may_think_or_begin_with_its_grammar() -> None:
    thinking = Thinking(CLOSE, open=OPEN)
    assert drawn([], 'start: "ab"', thinking) == {A, AB, OPEN}
    assert drawn([A], 'start: "ab"', thinking) == {B}
    assert {A, B, C, CLOSE} <= drawn([OPEN], 'start: "ab"', thinking)


def test_a_spent_budget_forces_the_mark_whatever_else_is_asked_for() -> None:
    thinking = Thinking(CLOSE, budget=2)
    assert drawn([A, A], None, thinking) == {CLOSE}
    assert drawn([A, A], 'start: "ab"', thinking) == {CLOSE}
    assert {A, B, C} <= drawn([A, A, CLOSE], None, thinking)


def test_an_engine_goes_on_from_any_token_of_the_thinking() -> None:
    def fresh(given: Sequence[int]) -> Any:
        made = request("start: /[abc]{6}/", given, thinking=Thinking(CLOSE, budget=5))
        made.tokens[0] = 9
        return made

    whole = engine()
    whole.add(fresh([]))
    (tokens,) = run(whole).values()
    at = tokens.index(CLOSE)
    assert at <= 5
    assert b"".join(TOKENS[t] for t in tokens[at + 1 : -1]).decode().strip("abc") == ""
    for given in range(len(tokens)):
        replica = engine()
        replica.add(fresh(tokens[:given]))
        assert run(replica) == {"r": tokens[given:]}
