"""From logits to tokens, for many requests at once.

    logits ─ penalties ─ logit_bias ─ min_tokens ─ bad_words ─ allowed_token_ids ─ grammar ─┬─ log-probabilities
                                                                                            └─ draw (kernels.sampling)

A row's result depends on its logits, its params and its tokens only, never on the rows beside it: the random number is
a pure function of (seed, choice, position), sums run over token ids in order, and ties are settled by token id. Nothing
waits for the device before the tokens are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.request import EngineRequest
from engine.step import Sampled
from kernels.sampling import Draw, Draws, draw
from kernels.upload import upload
from mesh.errors import GrammarError
from mesh.messages import TokenLogprob
from mesh.params import SamplingParams

MASKS_S = 0.5
"""Processor time for the masks of one step. A batch of JSON takes a hundredth; with more than this, every stream of
the worker would stutter, so requests with slow grammars end."""
SLOW_MASK_S = 0.005
FEW_ROWS = 16
"""For which Python draws their random numbers faster than numpy."""
MASK = (1 << 64) - 1


def sample(logits: Tensor, requests: Sequence[EngineRequest], draw: Draw = draw) -> list[Sampled]:
    """The next token of each row. `logits`: `[rows, vocab]` float32, not changed; one request per row, whose `tokens`
    end before the token to be sampled."""
    if logits.shape[0] != len(requests):
        raise ValueError(f"{logits.shape[0]} rows of logits for {len(requests)} requests")
    if not requests:
        return []
    logits, failures = _adjusted(logits, requests)
    tokens = draw(logits, draws(requests, [request.num_tokens for request in requests]))
    logprobs = _logprobs(logits, requests, tokens)
    results = [Sampled(token, logprob) for token, logprob in zip(tokens.tolist(), logprobs, strict=True)]
    for row, failure in failures.items():
        results[row] = Sampled(None, failure=failure)
    return results


def prompt_logprobs(logits: Tensor, next_tokens: Sequence[int], top: int) -> tuple[TokenLogprob, ...]:
    """Log-probability of each position's next token and the `top` most likely ones. `logits`: `[n, vocab]` float32."""
    if not next_tokens:
        return ()
    tokens = torch.tensor(next_tokens, dtype=torch.int64, device=logits.device)
    return tuple(_top_logprobs(logits, tokens, [top] * len(next_tokens)))


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number in [0, 1) for the token at absolute `position`: 53 bits, the same on every machine."""
    x = _splitmix64(seed)
    x = _splitmix64(x ^ choice)
    x = _splitmix64(x ^ position)
    return float(x >> 11) * 2.0**-53


def uniforms(params: Sequence[SamplingParams], positions: Sequence[int]) -> list[float]:
    """`uniform` of each."""
    if len(params) < FEW_ROWS:
        return [uniform(p.seed, p.choice, position) for p, position in zip(params, positions, strict=True)]
    x = _splitmix64(np.array([p.seed & MASK for p in params], np.uint64))
    x = _splitmix64(x ^ np.array([p.choice for p in params], np.uint64))
    x = _splitmix64(x ^ np.array(positions, np.uint64))
    numbers: list[float] = ((x >> 11) * 2.0**-53).tolist()
    return numbers


def _splitmix64(x: Any) -> Any:
    """Steele, Lea and Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014), of one number or of an
    array of uint64."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def _adjusted(logits: Tensor, requests: Sequence[EngineRequest]) -> tuple[Tensor, dict[int, str]]:
    """Logits after penalties, bias, suppression and grammars, the same tensor where no row asks for any; and the rows
    whose grammar cannot be followed, with the reason."""
    repeated, counted, biased, constrained = [], [], [], []
    for row, request in enumerate(requests):
        params = request.params
        if params.repetition_penalty != 1.0:
            repeated.append(row)
        if params.presence_penalty or params.frequency_penalty:
            counted.append(row)
        suppresses = request.num_output_tokens < params.min_tokens or params.bad_words or params.allowed_token_ids
        if params.logit_bias or suppresses:
            biased.append(row)
        if request.matcher is not None or request.thought is not None:
            constrained.append(row)
    if not repeated and not counted and not biased and not constrained:
        return logits, {}
    logits = logits.clone(memory_format=torch.contiguous_format)
    if repeated:
        _repetition(logits, repeated, requests)
    if counted:
        _presence_and_frequency(logits, counted, requests)
    if biased:
        _bias(logits, biased, requests)
    return logits, _constrain(logits, constrained, requests) if constrained else {}


def _repetition(logits: Tensor, rows: Sequence[int], requests: Sequence[EngineRequest]) -> None:
    """Divides positive and multiplies negative logits of every token seen (Keskar et al. 2019, as transformers)."""
    flat = logits.view(-1)
    places = upload(np.unique(_places(rows, [requests[row].tokens for row in rows], logits)), logits.device)
    penalty = _per_row(rows, [requests[row].params.repetition_penalty for row in rows], places, logits)
    seen = flat[places]
    flat[places] = torch.where(seen > 0, seen / penalty, seen * penalty)


def _presence_and_frequency(logits: Tensor, rows: Sequence[int], requests: Sequence[EngineRequest]) -> None:
    """Subtracts `presence` once and `frequency` per occurrence in the output, as OpenAI defines them."""
    outputs = [requests[row].tokens[requests[row].num_prompt_tokens :] for row in rows]
    unique, occurrences = np.unique(_places(rows, outputs, logits), return_counts=True)
    places, counts = upload(unique, logits.device), upload(occurrences, logits.device)
    presence = _per_row(rows, [requests[row].params.presence_penalty for row in rows], places, logits)
    frequency = _per_row(rows, [requests[row].params.frequency_penalty for row in rows], places, logits)
    logits.view(-1)[places] -= counts * frequency + presence


def _bias(logits: Tensor, rows: Sequence[int], requests: Sequence[EngineRequest]) -> None:
    vocab = logits.shape[1]
    at: list[tuple[int, int, float]] = []
    suppressed: list[tuple[int, int]] = []
    for row in rows:
        request = requests[row]
        at += [(row, token, bias) for token, bias in request.params.logit_bias if 0 <= token < vocab]
        if request.num_output_tokens < request.params.min_tokens and request.matcher is None:
            suppressed += [(row, token) for token in request.params.stop_token_ids if 0 <= token < vocab]
        suppressed += [(row, token) for token in _completing(request) if 0 <= token < vocab]
    if at:
        row_ids, tokens, values = zip(*at, strict=True)
        logits.index_put_(
            _positions(row_ids, tokens, logits), upload(np.array(values, np.float32), logits.device), accumulate=True
        )
    if suppressed:
        row_ids, tokens = zip(*suppressed, strict=True)
        nothing = torch.full((1,), float("-inf"), device=logits.device)
        logits.index_put_(_positions(row_ids, tokens, logits), nothing)
    for row in rows:
        allowed = [token for token in requests[row].params.allowed_token_ids if 0 <= token < vocab]
        if allowed:
            ids = _ids(allowed, logits)
            kept = logits[row, ids]
            logits[row] = float("-inf")
            logits[row, ids] = kept


def _completing(request: EngineRequest) -> list[int]:
    """The tokens with which the output would end on a bad word."""
    tokens, num_output = request.tokens, request.num_output_tokens
    completing = []
    for *before, last in request.params.bad_words:
        begins = len(tokens) - len(before)
        if len(before) <= num_output and tokens[begins:] == before:
            completing.append(last)
    return completing


def _constrain(logits: Tensor, rows: Sequence[int], requests: Sequence[EngineRequest]) -> dict[int, str]:
    """Leaves only what each row's thinking and grammar allow; the rows that fail, with the reason."""
    failures: dict[int, str] = {}
    spent = 0.0
    for row in rows:
        request = requests[row]
        if spent > MASKS_S and request.matcher is not None and request.matcher.cost_s > SLOW_MASK_S:
            failures[row] = "its grammar takes too much time"
            continue
        try:
            flags = request.allowed()
        except GrammarError as error:
            failures[row] = str(error)  # something is drawn for it too, and thrown away
            continue
        finally:
            spent += 0.0 if request.matcher is None else request.matcher.cost_s
        if flags is None:
            continue
        banned = upload(~flags[: logits.shape[1]], logits.device)
        logits[row, : len(banned)].masked_fill_(banned, float("-inf"))
        logits[row, len(banned) :] = float("-inf")
    return failures


def _places(rows: Sequence[int], tokens: Sequence[Sequence[int]], logits: Tensor) -> npt.NDArray[np.int64]:
    """Where each row's tokens lie in the flattened logits, repeats included."""
    vocab = logits.shape[1]
    ids = [np.array(row_tokens, np.int64) for row_tokens in tokens]
    return np.concatenate([part[part < vocab] + row * vocab for row, part in zip(rows, ids, strict=True)])


def _per_row(rows: Sequence[int], values: Sequence[float], places: Tensor, logits: Tensor) -> Tensor:
    """The value of the row that each place lies in."""
    by_row = np.zeros(logits.shape[0], np.float32)
    by_row[rows] = values
    return upload(by_row, logits.device)[places // logits.shape[1]]


def needs_host(request: EngineRequest) -> bool:
    """Sampling its next token takes more than logits and a draw: something that only the host knows, or wants."""
    params = request.params
    return (
        params.logprobs is not None
        or request.matcher is not None
        or request.thought is not None
        or params.repetition_penalty != 1.0
        or bool(params.presence_penalty or params.frequency_penalty)
        or bool(params.logit_bias or params.bad_words or params.allowed_token_ids)
        or request.num_output_tokens < params.min_tokens
    )


def draws(requests: Sequence[EngineRequest], positions: Sequence[int]) -> Draws:
    """How each request's token at the absolute position is drawn."""
    params = [request.params for request in requests]
    return Draws(
        temperature=[p.temperature for p in params],
        top_k=[p.top_k for p in params],
        top_p=[p.top_p for p in params],
        min_p=[p.min_p for p in params],
        uniform=uniforms(params, positions) if any(p.temperature > 0 for p in params) else [0.0] * len(params),
    )


def _logprobs(logits: Tensor, requests: Sequence[EngineRequest], tokens: Tensor) -> list[TokenLogprob | None]:
    found: list[TokenLogprob | None] = [None] * len(requests)
    wanted = [(row, r.params.logprobs) for row, r in enumerate(requests) if r.params.logprobs is not None]
    if wanted:
        rows = [row for row, _ in wanted]
        index = _ids(rows, logits)
        chosen = _top_logprobs(logits[index], tokens[index], [top for _, top in wanted])
        for row, logprob in zip(rows, chosen, strict=True):
            found[row] = logprob
    return found


def _top_logprobs(logits: Tensor, tokens: Tensor, tops: Sequence[int]) -> list[TokenLogprob]:
    """`logits`: `[n, vocab]`, `tokens`: `[n]`, one number of alternatives per row. A token that cannot be drawn at
    all is no alternative."""
    logprobs = torch.log_softmax(logits.float(), dim=1)
    own = logprobs.gather(1, tokens[:, None])
    ranks = ((logprobs > own).sum(dim=1) + 1).tolist()
    best = logprobs.topk(min(max(tops), logits.shape[1]), dim=1)
    rows = zip(
        tokens.tolist(), own.squeeze(1).tolist(), best.indices.tolist(), best.values.tolist(), tops, ranks, strict=True
    )
    result = []
    for token, logprob, ids, values, top, rank in rows:
        kept = [(i, v) for i, v in zip(ids[:top], values[:top], strict=True) if v > float("-inf")]
        result.append(TokenLogprob(token, logprob, tuple(i for i, _ in kept), tuple(v for _, v in kept), rank))
    return result


def _positions(rows: Sequence[int], tokens: Sequence[int], like: Tensor) -> tuple[Tensor, Tensor]:
    return _ids(rows, like), _ids(tokens, like)


def _ids(values: Sequence[int], like: Tensor) -> Tensor:
    return upload(np.array(values, np.int64), like.device)
