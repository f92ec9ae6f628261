"""Rotary embedding and the KV write in one pass: what attention needs of a projection's output, read once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.metadata import PagedMetadata


@triton.jit
def _finite(x):
    """Zero where `x` is not finite, NaN included; see `kernels.attention.write_kv`."""
    return tl.where(tl.abs(x) < float("inf"), x, 0.0)


@triton.jit
def _halves(start, cos, sin, half, mask, HALF: tl.constexpr):
    """The rotated lower and upper halves of heads that begin at `start`, in float32."""
    lower = tl.load(start + half, mask=mask, other=0.0).to(tl.float32)
    upper = tl.load(start + half + HALF, mask=mask, other=0.0).to(tl.float32)
    return lower * cos - upper * sin, upper * cos + lower * sin


@triton.jit(do_not_specialize=["layer"])
def _rotate_and_write(
    qkv,
    cos,
    sin,
    slots,
    queries,
    pool,
    qkv_stride,
    layer,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
):
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    HALF: tl.constexpr = DIM // 2
    half = tl.arange(0, PADDED_DIM // 2)
    inside = half < HALF
    cosine = tl.load(cos + token * DIM + half, mask=inside, other=0.0).to(tl.float32)
    sine = tl.load(sin + token * DIM + HALF + half, mask=inside, other=0.0).to(tl.float32)

    member = tl.arange(0, PADDED_GROUP)
    head = kv_head * GROUP + member
    mask = (member < GROUP)[:, None] & inside[None, :]
    source = qkv + token * qkv_stride
    lower, upper = _halves(source + head[:, None] * DIM, cosine[None, :], sine[None, :], half[None, :], mask, HALF)
    target = queries + (token * (KV_HEADS * GROUP) + head[:, None]) * DIM + half[None, :]
    tl.store(target, lower.to(queries.dtype.element_ty), mask=mask)
    tl.store(target + HALF, upper.to(queries.dtype.element_ty), mask=mask)

    slot = tl.load(slots + token)
    if slot < 0:
        return
    page = pool + (slot // BLOCK_TOKENS).to(tl.int64) * BLOCK_STRIDE
    page += (layer * 2 * KV_HEADS + kv_head) * (BLOCK_TOKENS * DIM) + (slot % BLOCK_TOKENS) * DIM
    source += (KV_HEADS * GROUP + kv_head) * DIM
    lower, upper = _halves(source, cosine, sine, half, inside, HALF)
    # Rounding to the pool's dtype first: what is too large for it becomes infinite there.
    tl.store(page + half, _finite(lower.to(pool.dtype.element_ty)), mask=inside)
    tl.store(page + half + HALF, _finite(upper.to(pool.dtype.element_ty)), mask=inside)

    lane = tl.arange(0, PADDED_DIM)
    source += KV_HEADS * DIM
    value = tl.load(source + lane, mask=lane < DIM, other=0.0)
    page += KV_HEADS * BLOCK_TOKENS * DIM
    tl.store(page + lane, _finite(value.to(pool.dtype.element_ty)), mask=lane < DIM)


def rotate_and_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, pool: Tensor, layer: int, metadata: PagedMetadata
) -> Tensor:
    """See `kernels.attention.rotate_and_write`; `qkv` stays as it is."""
    _, layers, _, kv_heads, block_tokens, dim = pool.shape
    tokens, heads = qkv.shape[0], qkv.shape[1] - 2 * kv_heads
    queries = torch.empty((tokens, heads, dim), dtype=qkv.dtype, device=pool.device)
    _rotate_and_write[(tokens, kv_heads)](
        qkv,
        cos,
        sin,
        metadata.slots,
        queries,
        pool,
        qkv.stride(0),
        layer,
        BLOCK_STRIDE=layers * 2 * kv_heads * block_tokens * dim,
        BLOCK_TOKENS=block_tokens,
        KV_HEADS=kv_heads,
        GROUP=heads // kv_heads,
        PADDED_GROUP=triton.next_power_of_2(heads // kv_heads),
        DIM=dim,
        PADDED_DIM=triton.next_power_of_2(dim),
        num_warps=1,
    )
    return queries
