"""The sampler against a plain reference in numpy, one row at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from engine.request import EngineRequest
from engine.sampler import prompt_logprobs, sample, uniform, uniforms
from engine.sim_engine import splitmix64
from mesh.messages import TokenLogprob
from mesh.params import SamplingParams

VOCAB = 97
Array = npt.NDArray[np.float64]


def asks(tokens: Sequence[int] = (1, 2, 3), num_prompt: int | None = None, **params: Any) -> EngineRequest:
    settings = SamplingParams(max_tokens=1000, **params)
    return EngineRequest("r", list(tokens), len(tokens) if num_prompt is None else num_prompt, settings, b"")


def random_logits(rows: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def adjusted(logits: Array, request: EngineRequest) -> Array:
    """Penalties, bias and suppression by their definitions."""
    p, out = request.params, logits.astype(np.float64).copy()
    for token in set(request.tokens):
        out[token] = out[token] / p.repetition_penalty if out[token] > 0 else out[token] * p.repetition_penalty
    output = request.tokens[request.num_prompt_tokens :]
    for token in set(output):
        out[token] -= p.presence_penalty + p.frequency_penalty * output.count(token)
    for token, bias in p.logit_bias:
        if 0 <= token < len(out):
            out[token] += bias
    if len(output) < p.min_tokens:
        out[[t for t in p.stop_token_ids if t < len(out)]] = -np.inf
    for word in p.bad_words:
        if (*output, word[-1])[-len(word) :] == word:
            out[word[-1]] = -np.inf
    if p.allowed_token_ids:
        out[[t for t in range(len(out)) if t not in p.allowed_token_ids]] = -np.inf
    return out


def probabilities(logits: Array, params: SamplingParams) -> Array:
    """The distribution that is drawn from: temperature, top_k, top_p, min_p, one after the other."""
    p = np.exp((logits - logits.max()) / params.temperature)
    if 0 < params.top_k < len(p):
        p[p < np.sort(p)[-params.top_k]] = 0
    p /= p.sum()
    if params.top_p < 1:
        order = sorted(range(len(p)), key=lambda i: (-p[i], i))
        mass = 0.0
        for rank, i in enumerate(order):
            if rank and mass >= params.top_p:
                p[i] = 0
            else:
                mass += p[i]
    p[p < params.min_p * p.max()] = 0
    result: Array = p / p.sum()
    return result


def reference(logits: torch.Tensor, request: EngineRequest) -> int:
    values = adjusted(logits.double().numpy(), request)
    if request.params.temperature == 0:
        return int(values.argmax())
    u = uniform(request.params.seed, request.params.choice, len(request.tokens))
    p = probabilities(values, request.params)
    return int(np.searchsorted(np.cumsum(p), u, side="right"))


def tokens_of(logits: torch.Tensor, requests: Sequence[EngineRequest]) -> list[int]:
    found = [sampled.token for sampled in sample(logits, requests)]
    assert None not in found
    return [token for token in found if token is not None]


MIXES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 2.5},
    {"top_k": 1},
    {"top_k": 5},
    {"top_k": VOCAB},
    {"top_k": 10 * VOCAB},
    {"top_p": 0.9},
    {"top_p": 0.1},
    {"top_p": 0.0},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
    {"repetition_penalty": 1.5},
    {"repetition_penalty": 0.7, "temperature": 0.0},
    {"presence_penalty": 1.5, "frequency_penalty": 0.4},
    {"presence_penalty": -2.0, "frequency_penalty": -1.0, "temperature": 0.0},
    {"logit_bias": ((4, 50.0), (200, 100.0), (-1, 100.0)), "temperature": 0.0},
    {"logit_bias": ((4, 2.0), (5, -3.0))},
    {"min_tokens": 9, "stop_token_ids": (*range(60), 1000)},
    {"min_tokens": 2, "stop_token_ids": tuple(range(60))},
    {"allowed_token_ids": (9, 4, 70, 4, 500)},
    {"allowed_token_ids": (9, 4), "logit_bias": ((5, 100.0),), "temperature": 0.0, "repetition_penalty": 1.5},
    {"bad_words": tuple((token,) for token in range(80))},
    {"bad_words": tuple((60, 70, token) for token in range(80))},
    {"bad_words": tuple((61, 70, token) for token in range(80))},
    {"bad_words": ((70, 7),), "allowed_token_ids": (7, 8), "min_tokens": 9, "stop_token_ids": (11,)},
    {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "logit_bias": ((7, 3.0),),
        "min_tokens": 50,
        "stop_token_ids": (3, 7),
        "temperature": 0.9,
        "top_k": 40,
        "top_p": 0.95,
        "min_p": 0.01,
    },
]


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: ",".join(mix) + str(len(str(mix))))
def test_every_rule_agrees_with_the_reference(mix: dict[str, Any]) -> None:
    logits = random_logits(100)
    requests = [asks([1, 2, 3, 5, 8, 5, 5, 60, 70], 4, seed=i, **mix) for i in range(100)]
    assert tokens_of(logits, requests) == [reference(row, r) for row, r in zip(logits, requests, strict=True)]


def test_a_mixed_batch_gives_each_row_what_it_gets_alone() -> None:
    requests = [asks([1, 2, 3, 5, 8, 5], 4, seed=i, **mix) for i, mix in enumerate(MIXES * 3)]
    logits = random_logits(len(requests), 1)
    alone = [tokens_of(logits[i : i + 1], [r])[0] for i, r in enumerate(requests)]
    assert tokens_of(logits, requests) == alone
    backwards = tokens_of(logits.flip(0), requests[::-1])
    assert backwards[::-1] == alone


def test_a_nucleus_beyond_the_candidates_needs_the_full_sort() -> None:
    logits = random_logits(4, 2, vocab=5000) * 0.1
    requests = [asks(seed=i, top_p=p) for i, p in enumerate((0.9, 0.1, 0.99, 1.0))]
    assert tokens_of(logits, requests) == [reference(row, r) for row, r in zip(logits, requests, strict=True)]


def test_more_rows_than_the_work_space_are_drawn_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [asks(seed=i) for i in range(10)]
    logits = random_logits(10)
    at_once = tokens_of(logits, requests)
    monkeypatch.setattr("kernels.sampling.DRAW_ELEMENTS", 3 * VOCAB)
    assert tokens_of(logits, requests) == at_once


def test_equal_logits_at_the_nucleus_end_are_settled_by_id() -> None:
    logits = torch.zeros(200, 8)
    drawn = set(tokens_of(logits, [asks(seed=i, top_p=0.5) for i in range(200)]))
    assert drawn == {0, 1, 2, 3}


def test_equal_logits_at_top_k_are_all_kept() -> None:
    logits = torch.zeros(200, 4)
    assert set(tokens_of(logits, [asks(seed=i, top_k=2) for i in range(200)])) == {0, 1, 2, 3}


def test_drawn_tokens_follow_the_distribution() -> None:
    """Chi-square over 6,000 draws with 9 degrees of freedom: 27.9 is exceeded once in a thousand."""
    logits, rows = random_logits(1, 3, vocab=10)[0] / 3, 6_000
    mixes: list[dict[str, Any]] = [
        {"temperature": 0.8},
        {"temperature": 1.5, "top_p": 0.9},
        {"top_k": 6, "min_p": 0.1},
    ]
    for mix in mixes:
        p = probabilities(logits.double().numpy(), asks(**mix).params)
        requests = [asks([1] * (1 + i % 50), seed=i // 50, **mix) for i in range(rows)]
        counts = np.bincount(tokens_of(logits.expand(rows, 10), requests), minlength=10)
        assert counts[p == 0].sum() == 0
        kept = p > 0
        assert (((counts - rows * p) ** 2)[kept] / (rows * p)[kept]).sum() < 27.9


def test_the_random_number_is_a_function_of_seed_choice_and_position() -> None:
    grid = {(s, c, p): uniform(s, c, p) for s in range(12) for c in range(6) for p in range(12)}
    assert len(set(grid.values())) == len(grid)
    assert all(0 <= u < 1 for u in grid.values())
    word = splitmix64(splitmix64(splitmix64(7) ^ 1) ^ 100)
    assert uniform(7, 1, 100) == (word >> 11) / 2**53 == 0.383729909613153, "peers of other versions must agree"


@pytest.mark.parametrize("rows", [1, 15, 16, 100])
def test_the_random_numbers_of_many_rows_are_those_of_each(rows: int) -> None:
    params = [asks(seed=2**63 + 12345 * i, choice=i).params for i in range(rows)]
    positions = list(range(7, 7 + rows))
    each = [uniform(p.seed, p.choice, position) for p, position in zip(params, positions, strict=True)]
    assert uniforms(params, positions) == each


def test_random_numbers_of_neighbours_are_not_correlated() -> None:
    u = np.array([[uniform(seed, 0, p) for p in range(200)] for seed in range(100)])
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(u[:, :-1].ravel(), u[:, 1:].ravel())[0, 1]) < 0.03
    assert abs(np.corrcoef(u[:-1].ravel(), u[1:].ravel())[0, 1]) < 0.03


def test_the_next_position_draws_anew_and_a_repetition_does_not() -> None:
    logits = torch.zeros(1, VOCAB)
    drawn = [tokens_of(logits, [asks([1] * n, seed=5)])[0] for n in range(1, 40)]
    assert len(set(drawn)) > 20
    assert drawn == [tokens_of(logits, [asks([1] * n, seed=5)])[0] for n in range(1, 40)]


def test_the_split_of_prompt_and_output_does_not_change_a_draw() -> None:
    logits = random_logits(1)
    assert tokens_of(logits, [asks([1, 2, 3, 4], 1, seed=3)]) == tokens_of(logits, [asks([1, 2, 3, 4], 4, seed=3)])


@pytest.mark.parametrize("temperature", [1e-300, 1e-6, 1e-3])
def test_a_tiny_temperature_is_greedy_not_a_crash(temperature: float) -> None:
    logits = random_logits(20) * 1000
    assert tokens_of(logits, [asks(temperature=temperature)] * 20) == logits.argmax(1).tolist()


def test_the_largest_random_number_draws_the_last_kept_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.sampler.uniforms", lambda params, _: [1.0 - 2.0**-53] * len(params))
    logits = random_logits(50)
    requests = [asks(top_k=3)] * 50
    last_kept = [max(row.topk(3).indices.tolist()) for row in logits]
    assert tokens_of(logits, requests) == last_kept


def test_the_smallest_random_number_draws_the_first_kept_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.sampler.uniforms", lambda params, _: [0.0] * len(params))
    logits = random_logits(50)
    assert tokens_of(logits, [asks(top_k=3)] * 50) == [min(row.topk(3).indices.tolist()) for row in logits]


def test_not_a_number_stays_inside_the_vocabulary() -> None:
    logits = torch.full((2, VOCAB), float("nan"))
    assert all(0 <= token < VOCAB for token in tokens_of(logits, [asks(), asks(temperature=0.0)]))


def test_a_bad_word_is_not_completed_by_its_beginning_in_the_prompt() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 7] = 5.0
    word = {"bad_words": ((5, 6, 7),), "temperature": 0.0}
    assert tokens_of(logits, [asks([1, 5, 6], 2, **word)]) == [7]
    assert tokens_of(logits, [asks([1, 5, 6], 1, **word)]) != [7]


def test_a_continued_request_obeys_as_the_uninterrupted_one() -> None:
    """Whoever has prompt and output knows what is forbidden next: here every second token of three."""
    params: dict[str, Any] = {"allowed_token_ids": (1, 2, 3), "bad_words": ((1, 1), (2, 2), (3, 3)), "seed": 4}
    logits, tokens = random_logits(1), [50]
    for _ in range(30):
        tokens += tokens_of(logits, [asks(tokens, 1, **params)])
    assert set(tokens[1:]) <= {1, 2, 3}
    assert all(a != b for a, b in pairwise(tokens))


def test_logits_are_not_changed() -> None:
    logits = random_logits(len(MIXES))
    before = logits.clone()
    sample(logits, [asks([1, 2, 3, 5], 2, **mix) for mix in MIXES])
    assert torch.equal(logits, before)


def test_logprobs_are_taken_after_bias_and_before_temperature() -> None:
    logits = random_logits(2, 4)
    r = asks([1, 2, 3], 1, logprobs=4, temperature=0.2, top_k=2, logit_bias=((9, 5.0),), presence_penalty=1.0)
    plain = replace(r.params, logprobs=None)
    with_, without = sample(logits, [r, EngineRequest("x", [1, 2, 3], 1, plain, b"")])
    assert without.logprob is None
    values = adjusted(logits[0].double().numpy(), r)
    expected = values - np.log(np.exp(values - values.max()).sum()) - values.max()
    assert with_.logprob is not None
    assert with_.logprob.token == with_.token
    assert with_.logprob.logprob == pytest.approx(expected[with_.token or 0], abs=1e-5)
    assert with_.logprob.top_tokens == tuple(np.argsort(-expected)[:4].tolist())
    assert with_.logprob.top_logprobs == pytest.approx(np.sort(expected)[::-1][:4], abs=1e-5)


def test_zero_logprobs_gives_the_token_alone_and_many_give_no_more_than_there_are() -> None:
    none, all_ = sample(random_logits(2), [asks(logprobs=0), asks(logprobs=500)])
    assert none.logprob is not None
    assert all_.logprob is not None
    assert none.logprob.top_tokens == ()
    assert len(all_.logprob.top_tokens) == VOCAB


def test_a_suppressed_token_is_no_alternative() -> None:
    r = asks(logprobs=VOCAB, min_tokens=5, stop_token_ids=(3, 4))
    (sampled,) = sample(random_logits(1), [r])
    assert sampled.logprob is not None
    assert len(sampled.logprob.top_tokens) == VOCAB - 2
    assert min(sampled.logprob.top_logprobs) > float("-inf")


def test_prompt_logprobs_of_each_position() -> None:
    logits = random_logits(5, 6)
    entries = prompt_logprobs(logits, [9, 8, 7, 6, 5], 2)
    expected = torch.log_softmax(logits, 1)
    assert [entry.token for entry in entries] == [9, 8, 7, 6, 5]
    for row, entry in enumerate(entries):
        assert entry.logprob == pytest.approx(float(expected[row, entry.token]), abs=1e-6)
        assert entry.top_tokens == tuple(expected[row].topk(2).indices.tolist())
        assert entry.rank == 1 + expected[row].argsort(descending=True).tolist().index(entry.token)
    assert prompt_logprobs(logits[:0], [], 2) == ()
    assert prompt_logprobs(logits[:1], [9], 0) == (TokenLogprob(9, entries[0].logprob, (), (), entries[0].rank),)


def test_rows_and_requests_must_match() -> None:
    with pytest.raises(ValueError, match="2 rows of logits for 1 requests"):
        sample(random_logits(2), [asks()])
    assert sample(random_logits(0), []) == []
