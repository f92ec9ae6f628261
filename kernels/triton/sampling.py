"""One token per row of logits, without sorting the vocabulary and without a look from the host.

A row is one program. It first writes down which tokens can be kept at all (`candidates`, in the order of their ids),
which are few as soon as a row asks for top-k or top-p; where exactly to cut is then found among those, bit by bit of a
logit's place in the order of all float32.
"""

from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from torch import Tensor

from kernels.sampling import Draws
from kernels.upload import upload

LANES = 2048
"""Tokens that a program looks at together."""
FIELDS = 5
"""Of `Draws`, per row."""


@triton.jit
def _rank(logits):
    """int64 in the order of the logits, from 0: the float's bits, turned round where it is negative."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)  # minus zero becomes zero
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64) + 0x80000000


@triton.jit
def _weights(logits, peak, temperature):
    """Relative to the most likely token's, in float64."""
    return tl.exp((logits.to(tl.float64) - peak) / temperature)


@triton.jit
def _taken(row, ids, chosen, peak, temperature, lowest, BY_WEIGHT: tl.constexpr):
    """Of these tokens, the number or the weight of those that rank `lowest` at least."""
    logits = tl.load(row + ids, mask=chosen, other=float("-inf"))
    chosen = chosen & (_rank(logits) >= lowest)
    if BY_WEIGHT:
        return tl.sum(tl.where(chosen, _weights(logits, peak, temperature), 0.0), 0)
    return tl.sum(chosen.to(tl.float64), 0)


@triton.jit
def _cut(row, candidates, count, peak, temperature, wanted, BY_WEIGHT: tl.constexpr, LANES: tl.constexpr):
    """The highest rank down to which the candidates reach `wanted`, by number or weight."""
    lane = tl.arange(0, LANES)
    lowest = tl.full([], 0, tl.int64)
    step = tl.full([], 0x80000000, tl.int64)
    for _ in tl.range(0, 32):
        reached = tl.full([], 0.0, tl.float64)
        for start in tl.range(0, count, LANES):
            there = start + lane < count
            ids = tl.load(candidates + start + lane, mask=there, other=0)
            reached += _taken(row, ids, there, peak, temperature, lowest + step, BY_WEIGHT)
        lowest = tl.where(reached >= wanted, lowest + step, lowest)
        step = step // 2
    return lowest


@triton.jit(do_not_specialize=["vocab"])
def _draw(logits, numbers, candidates, tokens, row_stride, vocab, FIELDS: tl.constexpr, LANES: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row = logits + place * row_stride
    candidates += place * vocab
    numbers += place * FIELDS
    temperature, top_k = tl.load(numbers), tl.load(numbers + 1)
    top_p, min_p, uniform = tl.load(numbers + 2), tl.load(numbers + 3), tl.load(numbers + 4)
    lane = tl.arange(0, LANES)

    highest = tl.full([LANES], float("-inf"), tl.float32)
    for start in tl.range(0, vocab, LANES):
        highest = tl.maximum(highest, tl.load(row + start + lane, mask=start + lane < vocab, other=float("-inf")))
    peak = tl.max(highest, 0)
    if temperature == 0.0:
        first = vocab - 1
        for start in tl.range(0, vocab, LANES):
            found = tl.load(row + start + lane, mask=start + lane < vocab, other=float("-inf"))
            first = tl.minimum(first, tl.min(tl.where(found == peak, start + lane, vocab - 1), 0))
        tl.store(tokens + place, first.to(tl.int64))
        return

    # What cannot be kept: what ranks below the k-th highest of the lanes' highest, and what is so unlikely that all
    # tokens together, were they like it, would fit between `top_p` and 1 (by half, for rounding's sake).
    lowest = tl.full([], 0, tl.int64)
    if (top_k > 0.0) & (top_k <= LANES):
        step = tl.full([], 0x80000000, tl.int64)
        for _ in tl.range(0, 32):
            reached = tl.sum((_rank(highest) >= lowest + step).to(tl.float64), 0)
            lowest = tl.where(reached >= top_k, lowest + step, lowest)
            step = step // 2
    least = tl.full([], 0.0, tl.float64)
    if (top_k == 0.0) & (top_p < 1.0):
        total = tl.full([], 0.0, tl.float64)
        for start in tl.range(0, vocab, LANES):
            there = start + lane < vocab
            total += _taken(row, start + lane, there, peak, temperature, lowest, True)
        least = 0.5 * (1.0 - top_p) * total / vocab
    count = tl.full([], 0, tl.int32)
    for start in tl.range(0, vocab, LANES):
        there = start + lane < vocab
        found = tl.load(row + start + lane, mask=there, other=float("-inf"))
        weights = _weights(found, peak, temperature)
        there = there & (_rank(found) >= lowest) & (weights >= least) & (weights > 0.0)
        tl.store(candidates + count + tl.cumsum(there.to(tl.int32), 0) - 1, start + lane, mask=there)
        count += tl.sum(there.to(tl.int32), 0)
    tl.debug_barrier()  # what one thread has written down, others read

    if top_k > 0.0:
        lowest = _cut(row, candidates, count, peak, temperature, top_k, False, LANES)
    equals = vocab.to(tl.float64)
    if top_p < 1.0:
        total, above = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
        for start in tl.range(0, count, LANES):
            there = start + lane < count
            ids = tl.load(candidates + start + lane, mask=there, other=0)
            total += _taken(row, ids, there, peak, temperature, lowest, True)
        if top_k == 0.0:
            total = least * vocab / (0.5 * (1.0 - top_p))  # of all tokens, not only of the candidates
        wanted = top_p * total
        lowest = tl.maximum(_cut(row, candidates, count, peak, temperature, wanted, True, LANES), lowest)
        last = tl.full([], 0.0, tl.float64)
        for start in tl.range(0, count, LANES):
            there = start + lane < count
            ids = tl.load(candidates + start + lane, mask=there, other=0)
            above += _taken(row, ids, there, peak, temperature, lowest + 1, True)
            found = tl.load(row + ids, mask=there, other=float("-inf"))
            at_end = there & (_rank(found) == lowest)
            last = tl.maximum(last, tl.max(tl.where(at_end, _weights(found, peak, temperature), 0.0), 0))
        equals = tl.maximum(tl.ceil((wanted - above) / last), 1.0)

    # Twice over what is kept: for its weight, then for where the random number falls.
    mass, before = tl.full([], 0.0, tl.float64), tl.full([], 0.0, tl.float64)
    token = vocab - 1
    for looks in tl.static_range(2):
        met = tl.full([], 0.0, tl.float64)
        for start in tl.range(0, count, LANES):
            there = start + lane < count
            ids = tl.load(candidates + start + lane, mask=there, other=0)
            found = tl.load(row + ids, mask=there, other=float("-inf"))
            ranks, weights = _rank(found), _weights(found, peak, temperature)
            equal = there & (ranks == lowest)
            kept = equal & (met + tl.cumsum(equal.to(tl.float64), 0) <= equals)
            kept = (kept | (there & (ranks > lowest))) & (weights >= tl.minimum(min_p, 1.0))
            met += tl.sum(equal.to(tl.float64), 0)
            weights = tl.where(kept, weights, 0.0)
            if looks == 0:
                mass += tl.sum(weights, 0)
            else:
                reached = kept & (before + tl.cumsum(weights, 0) > uniform * mass)
                token = tl.minimum(token, tl.min(tl.where(reached, ids, vocab - 1), 0))
                before += tl.sum(weights, 0)
    tl.store(tokens + place, token.to(tl.int64))


def draw(logits: Tensor, draws: Draws) -> Tensor:
    """See `kernels.sampling.draw`. A row's result is the same but for the rounding of float64 sums, which here run
    over tiles of tokens."""
    return draw_packed(logits, upload(pack_draws(draws, logits.shape[1]), logits.device))


def pack_draws(draws: Draws, vocab: int) -> NDArray[np.float64]:
    """`[rows, FIELDS]`, without a top-k that keeps everything."""
    fields = (draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.uniform)
    numbers = np.array(fields, np.float64).T.copy()
    numbers[numbers[:, 1] >= vocab, 1] = 0.0
    return numbers


def draw_packed(logits: Tensor, numbers: Tensor) -> Tensor:
    """`draw`, with the draws on the device."""
    rows, vocab = logits.shape
    candidates = torch.empty((rows, vocab), dtype=torch.int32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    _draw[(rows,)](
        logits, numbers, candidates, tokens, logits.stride(0), vocab, FIELDS=FIELDS, LANES=LANES, num_warps=16
    )
    return tokens
