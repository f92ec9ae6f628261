"""Attention of decoded tokens: one query per row, over keys that are split among programs (Flash-Decoding).

The query heads that share a key head are the rows of one matrix, so the keys are read once for all of them. Each split
leaves its normalised output and the logarithm of its sum of weights; a second kernel joins them. How many splits there
are is settled at the launch, how long they are by each row's length on the device: a CUDA graph fixes the former only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.metadata import MIN_SPLIT, PagedMetadata
from kernels.triton.softmax import INTERPRETED, LOG2_E, attend, key_rows, load_rows

KEYS = 64
"""In a tile."""
MIN_ROWS = 16
"""The smallest height that the tensor cores multiply."""
COMBINED = 8
"""Splits that are joined at a time."""


@triton.jit
def _split_tokens(visible, num_splits, MIN_SPLIT: tl.constexpr, KEYS: tl.constexpr):
    """In each split of a row but the last: whole tiles, and no fewer than are worth it."""
    return tl.maximum(tl.cdiv(tl.cdiv(visible, num_splits), KEYS) * KEYS, MIN_SPLIT)


@triton.jit(do_not_specialize=["layer", "table_stride", "num_splits"])
def _attend_split(
    q,
    pool,
    tables,
    kv_tokens,
    out,
    partial,
    weight,
    q_stride,
    layer,
    table_stride,
    num_splits,
    scale,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    IS_SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    row, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    stop = tl.load(kv_tokens + row)
    start = 0
    if WINDOW:
        start = tl.maximum(stop - WINDOW, 0)
    split_tokens = _split_tokens(stop - start, num_splits, MIN_SPLIT, KEYS)
    start += split * split_tokens
    if start >= stop:
        return
    stop = tl.minimum(start + split_tokens, stop)

    member = tl.arange(0, PADDED_GROUP)
    head = kv_head * GROUP + member
    queries = load_rows(q + row * q_stride, head * DIM, member < GROUP, DIM, PADDED_DIM, UPCAST)
    total = tl.zeros([PADDED_GROUP], tl.float32)
    peak = tl.full([PADDED_GROUP], float("-inf"), tl.float32)
    mixed = tl.zeros([PADDED_GROUP, PADDED_DIM], tl.float32)
    keys = pool + (layer * 2 * KV_HEADS + kv_head) * (BLOCK_TOKENS * DIM)
    values = keys + KV_HEADS * BLOCK_TOKENS * DIM
    for tile in tl.range(start, stop, KEYS):
        position = tile + tl.arange(0, KEYS)
        there = position < stop
        rows = key_rows(tables + row * table_stride, position, there, BLOCK_STRIDE, BLOCK_TOKENS, DIM)
        k = load_rows(keys, rows, there, DIM, PADDED_DIM, UPCAST)
        v = load_rows(values, rows, there, DIM, PADDED_DIM, UPCAST)
        mixed, total, peak = attend(queries, k, v, there[None, :], scale, mixed, total, peak)
    mixed = mixed / total[:, None]

    lane = tl.arange(0, PADDED_DIM)
    mask = (member < GROUP)[:, None] & (lane < DIM)[None, :]
    place = row * (KV_HEADS * GROUP) + head
    if IS_SPLIT:
        place = place.to(tl.int64) * num_splits + split
        tl.store(partial + place[:, None] * DIM + lane[None, :], mixed, mask=mask)
        tl.store(weight + place, peak + tl.log2(total), mask=member < GROUP)
    else:
        tl.store(out + place[:, None] * DIM + lane[None, :], mixed.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_splits"])
def _combine(
    partial,
    weight,
    kv_tokens,
    out,
    num_splits,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    COMBINED: tl.constexpr,
):
    row, head = tl.program_id(0), tl.program_id(1)
    visible = tl.load(kv_tokens + row)
    if WINDOW:
        visible = tl.minimum(visible, WINDOW)
    used = tl.cdiv(visible, _split_tokens(visible, num_splits, MIN_SPLIT, KEYS))
    first = (row * HEADS + head).to(tl.int64) * num_splits
    lane = tl.arange(0, PADDED_DIM)
    mixed = tl.zeros([PADDED_DIM], tl.float32)
    total, peak = 0.0, float("-inf")
    for start in tl.range(0, used, COMBINED):
        split = start + tl.arange(0, COMBINED)
        logs = tl.load(weight + first + split, mask=split < used, other=float("-inf"))
        parts = tl.load(
            partial + (first + split)[:, None] * DIM + lane[None, :],
            mask=(split < used)[:, None] & (lane < DIM)[None, :],
            other=0.0,
        )
        highest = tl.maximum(peak, tl.max(logs, 0))
        shares = tl.exp2(logs - highest)
        fade = tl.exp2(peak - highest)
        total = total * fade + tl.sum(shares, 0)
        mixed = mixed * fade + tl.sum(parts * shares[:, None], 0)
        peak = highest
    place = (row * HEADS + head) * DIM + lane
    tl.store(out + place, (mixed / total).to(out.dtype.element_ty), mask=lane < DIM)


def decode_attention(q: Tensor, pool: Tensor, layer: int, metadata: PagedMetadata, window: int, out: Tensor) -> None:
    """`kernels.attention.paged_attention` for the rows of one token, into the first tokens of `out`."""
    rows, splits = metadata.decode_rows, metadata.splits[window]
    _, layers, _, kv_heads, block_tokens, dim = pool.shape
    heads = q.shape[1]
    group, padded_dim = heads // kv_heads, triton.next_power_of_2(dim)
    is_split = splits > 1
    if is_split:
        partial = torch.empty((rows, heads, splits, dim), dtype=torch.float32, device=q.device)
        weight = torch.empty((rows, heads, splits), dtype=torch.float32, device=q.device)
    else:
        partial = weight = out
    _attend_split[(rows, kv_heads, splits)](
        q,
        pool,
        metadata.tables,
        metadata.kv_tokens,
        out,
        partial,
        weight,
        q.stride(0),
        layer,
        metadata.tables.stride(0),
        splits,
        dim**-0.5 * LOG2_E,
        BLOCK_STRIDE=layers * 2 * kv_heads * block_tokens * dim,
        BLOCK_TOKENS=block_tokens,
        KV_HEADS=kv_heads,
        GROUP=group,
        PADDED_GROUP=max(MIN_ROWS, triton.next_power_of_2(group)),
        DIM=dim,
        PADDED_DIM=padded_dim,
        WINDOW=window,
        KEYS=KEYS,
        MIN_SPLIT=MIN_SPLIT,
        IS_SPLIT=is_split,
        UPCAST=INTERPRETED,
        num_warps=4,
        num_stages=3,
    )
    if is_split:
        _combine[(rows, heads)](
            partial,
            weight,
            metadata.kv_tokens,
            out,
            splits,
            HEADS=heads,
            DIM=dim,
            PADDED_DIM=padded_dim,
            WINDOW=window,
            KEYS=KEYS,
            MIN_SPLIT=MIN_SPLIT,
            COMBINED=COMBINED,
            num_warps=4,
        )
