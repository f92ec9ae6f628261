"""Masks against brute force over a tiny vocabulary, and what the sampler and the engine make of them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from engine import sampler
from engine.errors import CannotFit
from engine.grammar import Matcher
from engine.request import EngineRequest, RequestState
from engine.sampler import sample
from mesh.errors import GrammarError
from mesh.grammar import Vocabulary, compile_grammar
from mesh.params import SamplingParams
from tests.engine.sim_requests import engine, idle, run

TOKENS = (b"", b"</s>", b"a", b"b", b"c", b"ab", b"abc", b"ba", b"cc", b"\xc3", b"\xa9", "é".encode(), b"<x>", b"")
SPECIAL, EOS, OTHER_EOS = 12, 1, 12
VOCABULARY = Vocabulary(TOKENS, (EOS, SPECIAL), (EOS,))
A, B, C, AB, BA = 2, 3, 4, 5, 7


def matcher(grammar: str, vocabulary: Vocabulary = VOCABULARY) -> Matcher:
    compiled = compile_grammar(vocabulary.tokenizer(), grammar)
    return Matcher(compiled, len(vocabulary.tokens), frozenset(vocabulary.eos))


def params(**fields: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 100, "stop_token_ids": (EOS,), **fields})


def allowed(grammar: str, output: Sequence[int], settings: SamplingParams | None = None) -> set[int]:
    flags = matcher(grammar).allowed(output, settings or params())
    return set(np.flatnonzero(flags).tolist())


def words(pattern: str, longest: int) -> set[bytes]:
    """Every text of the alphabet that the pattern matches."""
    letters = ("a", "b", "c", "é")
    texts = ("".join(t) for n in range(longest + 1) for t in itertools.product(letters, repeat=n))
    return {text.encode() for text in texts if re.fullmatch(pattern, text)}


@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        ("start: /(ab|c)*b?/", "(ab|c){0,6}b?"),
        ("start: /a{2,4}[bc]/", "a{2,4}[bc]"),
        ('start: "é" | "abc" | "ab" | ""', "é|abc|ab|"),
        ('start: x x\nx: "a" "c"? "b" | "c"', "(c|ac?b){2}"),
        ("start: /é+c?|ba*/", "é+c?|ba*"),
    ],
)
def test_masks_are_what_trying_every_token_gives(grammar: str, pattern: str) -> None:
    language = words(pattern, 6)
    prefixes = {word[:i] for word in language for i in range(len(word) + 1)}
    checked = 0
    todo: list[tuple[bytes, list[int]]] = [(b"", [])]
    while todo and checked < 150:
        text, output = todo.pop(0)
        follows = {
            i for i, token in enumerate(TOKENS) if token and i not in (EOS, SPECIAL) and text + token in prefixes
        }
        if len(text) < 3:  # farther on, the language that was listed is cut off
            ends = {EOS} if text in language else set()
            assert allowed(grammar, output) == follows | ends, (text, output)
            todo += [(text + TOKENS[i], [*output, i]) for i in sorted(follows)]
            checked += 1
    assert checked >= 3


def test_special_tokens_and_ids_without_text_match_nothing_but_their_names() -> None:
    assert allowed("start: /(.|\\n)*/", []) == {i for i, token in enumerate(TOKENS) if token} - {SPECIAL, 10}
    assert allowed(f"start: <[{SPECIAL}]>", []) == {SPECIAL}


def test_every_end_of_sequence_token_ends_a_grammar_and_only_where_it_may_end() -> None:
    both = replace(VOCABULARY, eos=(EOS, OTHER_EOS))
    settings = params(stop_token_ids=(EOS, OTHER_EOS))
    assert set(np.flatnonzero(matcher('start: "a"', both).allowed([A], settings)).tolist()) == {EOS, OTHER_EOS}
    assert allowed('start: "ab"', [A]) == {B}


@pytest.mark.parametrize("settings", [params(stop_token_ids=()), params(min_tokens=5)])
def test_an_end_that_would_not_end_the_request_waits_until_nothing_else_is_left(settings: SamplingParams) -> None:
    assert allowed("start: /a{1,3}/", [A], settings) == {A}
    assert allowed("start: /a{1,3}/", [A, A, A], settings) == {EOS}


def test_a_stop_token_of_the_client_waits_for_min_tokens_too() -> None:
    grammar = "start: /[ab]{9}/"
    assert allowed(grammar, [], params(stop_token_ids=(A,), min_tokens=3)) == {B, AB, BA}
    assert A in allowed(grammar, [B, B, B], params(stop_token_ids=(A,), min_tokens=3))


def test_tokens_that_do_not_fit_are_an_error_for_good() -> None:
    place = matcher('start: "ab"')
    with pytest.raises(GrammarError):
        place.allowed([C], params())
    with pytest.raises(GrammarError):
        place.allowed([C], params())


def test_a_vocabulary_that_cannot_spell_the_grammar_is_an_error() -> None:
    with pytest.raises(GrammarError, match="no t"):
        matcher('start: "z"').allowed([], params())


def test_a_copy_starts_at_the_beginning_and_goes_its_own_way() -> None:
    first = matcher('start: "ab" | "c"')
    second = first.copy()
    assert set(np.flatnonzero(first.allowed([A], params()))) == {B}
    assert set(np.flatnonzero(second.allowed([C], params()))) == {EOS}


def request(grammar: str | None, output: Sequence[int] = (), **fields: Any) -> EngineRequest:
    settings = params(grammar=grammar, **fields)
    made = EngineRequest("r", [7, *output], 1, settings, b"")
    made.matcher = None if grammar is None else matcher(grammar)
    return made


MIXES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.5, "top_k": 2},
    {"top_p": 0.1},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7, "presence_penalty": 2.0, "frequency_penalty": 2.0},
    {"logit_bias": ((C, 100.0), (SPECIAL, 100.0), (A, -100.0))},
    {"min_tokens": 9},
]


@pytest.mark.parametrize("mix", MIXES)
def test_whatever_is_asked_for_only_allowed_tokens_are_drawn(mix: dict[str, Any]) -> None:
    logits = torch.randn(40, len(TOKENS), generator=torch.Generator().manual_seed(1)) * 3
    requests = [request("start: /(ab)*a?/", [A] * (i % 2), seed=i, **mix) for i in range(40)]
    drawn = [sampled.token for sampled in sample(logits, requests)]
    assert {t for t in drawn[::2]} <= {A, AB, EOS}
    assert {t for t in drawn[1::2]} <= {B, BA, EOS}
    assert len(set(drawn)) > 1


def test_rows_without_a_grammar_do_not_notice_their_neighbours() -> None:
    logits = torch.randn(6, len(TOKENS), generator=torch.Generator().manual_seed(2))
    mixed = [request('start: "c"' if i % 2 else None, seed=i, logprobs=3) for i in range(6)]
    alone = [request(None, seed=i, logprobs=3) for i in range(6)]
    before = logits.clone()
    assert sample(logits, mixed)[::2] == sample(logits, alone)[::2]
    assert [sampled.token for sampled in sample(logits, mixed)[1::2]] == [C] * 3
    assert torch.equal(logits, before)


def test_logprobs_are_of_what_the_grammar_leaves() -> None:
    logits = torch.zeros(1, len(TOKENS))
    (sampled,) = sample(logits, [request('start: "a" | "b"', logprobs=5)])
    assert sampled.logprob is not None
    assert sampled.logprob.logprob == pytest.approx(np.log(0.5))
    assert sorted(sampled.logprob.top_tokens) == [A, B]


def test_a_row_that_fails_says_so_beside_rows_that_do_not() -> None:
    logits = torch.zeros(2, len(TOKENS))
    bad, good = sample(logits, [request('start: "ab"', [C]), request('start: "c"')])
    assert (bad.token, good.token) == (None, C)
    assert bad.failure


def test_slow_grammars_end_when_a_steps_masks_take_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [request("start: /[ab]*/") for _ in range(3)]
    logits = torch.zeros(3, len(TOKENS))
    monkeypatch.setattr(sampler, "MASKS_S", 0.0)
    assert [sampled.failure for sampled in sample(logits, requests)] == [None] * 3
    monkeypatch.setattr(sampler, "SLOW_MASK_S", 0.0)
    first, *others = [sampled.failure for sampled in sample(logits, requests)]
    assert first is None
    assert all(others)


def in_engine(grammar: str, output: Sequence[int] = (), **fields: Any) -> EngineRequest:
    made = request(grammar, output, **fields)
    made.tokens[0] = 9
    return made


def test_an_engine_stops_where_the_grammar_does_even_when_eos_is_ignored() -> None:
    for fields in ({}, {"stop_token_ids": ()}, {"min_tokens": 50}):
        replica = engine()
        replica.add(in_engine('start: "a" "b"', **fields))
        (tokens,) = run(replica).values()
        assert tokens[-1] == EOS
        assert b"".join(TOKENS[t] for t in tokens[:-1]) == b"ab"
        idle(replica)


def test_an_engine_goes_on_from_any_token() -> None:
    whole = engine()
    whole.add(in_engine("start: /[abc]{12}/"))
    (tokens,) = run(whole).values()
    for given in range(len(tokens)):
        replica = engine()
        replica.add(in_engine("start: /[abc]{12}/", tokens[:given]))
        assert run(replica) == {"r": tokens[given:]}


def test_a_first_token_from_elsewhere_counts() -> None:
    replica = engine()
    wanted = in_engine('start: "ab" "c"')
    replica.expect(wanted)
    assert replica.ready("r", [A])
    assert run(replica)["r"][0] == B
    other = in_engine('start: "a"')
    replica.expect(other)
    assert replica.ready("r", [A, EOS]) == 0
    assert other.state is RequestState.FINISHED


def test_a_grammar_that_nobody_compiled_is_refused() -> None:
    naked = in_engine('start: "a"')
    naked.matcher = None
    with pytest.raises(CannotFit):
        engine().add(naked)


def test_a_failed_request_ends_alone_and_leaves_nothing() -> None:
    replica = engine()
    replica.add(in_engine('start: "ab"', [C]))
    healthy = in_engine('start: "ab"')
    healthy.key = "healthy"
    replica.add(healthy)
    output = replica.step()
    assert [failed.request.key for failed in output.failed] == ["r"]
    assert run(replica).keys() == {"healthy"}
    idle(replica)
