"""One token of each row's distribution, as its params shape it.

    logits ─ temperature ─ top_k ─ top_p ─ min_p ─ draw

By the inverse of the cumulative distribution over the kept tokens in token-id order, in float64: a row's token depends
on nothing but its logits, its params and its random number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DRAW_ELEMENTS = 1 << 23
"""Elements of the float64 work space of one draw (64 MiB); more rows are drawn in turns."""
TOP_P_CANDIDATES = 1024
"""Tried before a full sort: nearly every nucleus is smaller."""


@dataclass(slots=True)
class Draws:
    """One value per row. On the host: what is not asked for by any row is not computed."""

    temperature: Sequence[float]
    """0: the most likely token, of equally likely ones the first."""
    top_k: Sequence[int]
    """0: all."""
    top_p: Sequence[float]
    min_p: Sequence[float]
    """Relative to the most likely token."""
    uniform: Sequence[float]
    """The random number, in [0, 1)."""

    def of(self, rows: Sequence[int]) -> Draws:
        """Those of these rows."""
        return Draws(
            temperature=[self.temperature[row] for row in rows],
            top_k=[self.top_k[row] for row in rows],
            top_p=[self.top_p[row] for row in rows],
            min_p=[self.min_p[row] for row in rows],
            uniform=[self.uniform[row] for row in rows],
        )


Draw = Callable[[Tensor, Draws], Tensor]


def draw(logits: Tensor, draws: Draws) -> Tensor:
    """`[rows, vocab]` float32 to token ids `[rows]` int64."""
    random_rows = [row for row, temperature in enumerate(draws.temperature) if temperature > 0]
    if not random_rows:
        return _most_likely(logits)
    greedy = len(random_rows) < len(logits)
    tokens = _most_likely(logits) if greedy else torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    turn = max(1, DRAW_ELEMENTS // logits.shape[1])
    for start in range(0, len(random_rows), turn):
        rows = random_rows[start : start + turn]
        index = torch.tensor(rows, device=logits.device)
        tokens[index] = _draw_rows(logits[index], draws.of(rows))
    return tokens


def _most_likely(logits: Tensor) -> Tensor:
    """`argmax` over the vocabulary; on CPU numpy's, which is vectorised and some twenty times faster than torch's."""
    if logits.device.type == "cpu":
        return torch.from_numpy(logits.numpy().argmax(axis=1))
    return logits.argmax(dim=1)


def _draw_rows(logits: Tensor, draws: Draws) -> Tensor:
    """For rows whose temperature is not 0."""
    scaled = logits.double()
    scaled = scaled - scaled.amax(dim=1, keepdim=True)  # first: a tiny temperature must not overflow
    scaled = scaled / _column(draws.temperature, scaled)
    if any(0 < k < logits.shape[1] for k in draws.top_k):
        scaled = _keep_top_k(scaled, draws.top_k)
    weights = scaled.exp()
    if any(p < 1.0 for p in draws.top_p):
        weights = _keep_top_p(weights, draws.top_p)
    if any(p > 0.0 for p in draws.min_p):
        # the largest weight is exp(0) = 1, so a weight is its probability relative to the most likely token's
        weights = weights * (weights >= _column([min(p, 1.0) for p in draws.min_p], weights))
    cumulative = weights.cumsum(dim=1)
    # the random number is at most 1 - 2^-53, so the product stays below the total in float64 too and ends on a kept
    # token; only not-a-number logits would end behind the vocabulary
    token = torch.searchsorted(cumulative, _column(draws.uniform, weights) * cumulative[:, -1:], right=True)
    return token.clamp_(max=weights.shape[1] - 1).squeeze(1)


def _keep_top_k(scaled: Tensor, top_k: Sequence[int]) -> Tensor:
    """Keeps the k largest of each row and whatever equals the smallest of them; 0 keeps all."""
    vocab = scaled.shape[1]
    active = [k if 0 < k < vocab else 0 for k in top_k]
    largest = scaled.topk(max(active), dim=1).values
    index = torch.tensor([max(k, 1) - 1 for k in active], device=scaled.device)[:, None]
    off = torch.tensor([k == 0 for k in active], device=scaled.device)[:, None]
    return scaled.masked_fill((scaled < largest.gather(1, index)) & ~off, float("-inf"))


def _keep_top_p(weights: Tensor, top_p: Sequence[float]) -> Tensor:
    """Keeps the shortest run of most likely tokens whose probability reaches p, at least one; of equally likely tokens
    at its end those with the smaller ids."""
    wanted = [p if p < 1.0 else 0.0 for p in top_p]
    mass = weights.cumsum(dim=1)[:, -1:] * _column(wanted, weights)
    ranked, before = _ranked(weights, mass)
    num_kept = (before < mass).sum(dim=1, keepdim=True).clamp_(min=1)
    last = ranked.gather(1, num_kept - 1)
    num_equal = num_kept - (ranked > last).sum(dim=1, keepdim=True)
    equal = weights == last
    keep = (weights > last) | (equal & (equal.cumsum(dim=1) <= num_equal))
    keep |= torch.tensor([p >= 1.0 for p in top_p], device=weights.device)[:, None]
    return weights * keep


def _ranked(weights: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """The largest weights of each row in falling order, enough to reach `mass`, and the sum before each."""
    vocab = weights.shape[1]
    on_cpu = weights.device.type == "cpu"  # elsewhere looking at the values would wait for the device
    for count in (min(TOP_P_CANDIDATES, vocab),) if on_cpu else ():
        ranked = weights.topk(count, dim=1).values
        total = ranked.cumsum(dim=1)
        if count == vocab or bool((total[:, -1:] >= mass).all()):
            return ranked, total - ranked
    ranked = weights.sort(dim=1, descending=True).values
    return ranked, ranked.cumsum(dim=1) - ranked


def _column(values: Sequence[float], like: Tensor) -> Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device)[:, None]
