"""The part that decode and prefill attention share: one tile of keys, joined to a softmax that is still running."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED: bool = triton.knobs.runtime.interpret
"""The interpreter multiplies the bit patterns of bfloat16 matrices, so kernels convert first."""
LOG2_E = 1.4426950408889634
"""Scores are scaled by it as well: the hardware computes powers of two."""


@triton.jit
def key_rows(table, positions, there, BLOCK_STRIDE: tl.constexpr, BLOCK_TOKENS: tl.constexpr, DIM: tl.constexpr):
    """Where the rows of these positions begin in the pool, counted from layer 0's first key head."""
    block = tl.load(table + positions // BLOCK_TOKENS, mask=there, other=0)
    return block.to(tl.int64) * BLOCK_STRIDE + (positions % BLOCK_TOKENS) * DIM


@triton.jit
def load_rows(start, rows, there, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, UPCAST: tl.constexpr):
    """`[rows, PADDED_DIM]`, zero beyond `DIM` and where `there` is false."""
    lane = tl.arange(0, PADDED_DIM)
    mask = there[:, None]
    if PADDED_DIM != DIM:
        mask = mask & (lane < DIM)[None, :]
    loaded = tl.load(start + rows[:, None] + lane[None, :], mask=mask, other=0.0)
    if UPCAST:
        loaded = loaded.to(tl.float32)
    return loaded


@triton.jit
def attend(q, keys, values, seen, scale, out, total, peak):
    """One step of the running softmax (FlashAttention-2, arXiv 2307.08691): the weighted sum `out`, the sum of weights
    `total` and the highest score `peak` of the tiles so far, with this one added. `seen` is `[queries, keys]`."""
    scores = tl.where(seen, tl.dot(q, tl.trans(keys), input_precision="ieee") * scale, float("-inf"))
    highest = tl.maximum(peak, tl.max(scores, 1))
    # With a window a query may have seen nothing yet: minus infinity less itself would be no number.
    base = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - base[:, None])
    fade = tl.exp2(peak - base)
    total = total * fade + tl.sum(weights, 1)
    out = out * fade[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return out, total, highest
