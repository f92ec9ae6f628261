"""Attention of prompt chunks: tiles of one row's queries over its pages.

A tile's rows are its queries times the query heads that share a key head, query by query, so that a short chunk fills a
tile too. Keys that every query of the tile sees are met first, without a mask; then those around the diagonal.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kernels.triton.metadata import PagedMetadata
from kernels.triton.softmax import INTERPRETED, LOG2_E, attend, key_rows, load_rows

KEYS = 64
"""In a tile of keys."""
MIN_ROWS = 16
"""The smallest height that the tensor cores multiply."""


@triton.jit(do_not_specialize=["layer", "table_stride"])
def _attend_tile(
    q,
    pool,
    tables,
    kv_tokens,
    row_starts,
    tile_rows,
    tile_starts,
    out,
    q_stride,
    layer,
    table_stride,
    scale,
    BLOCK_STRIDE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    QUERIES: tl.constexpr,
    ROWS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    KEYS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    tile, kv_head = tl.program_id(0), tl.program_id(1)
    row = tl.load(tile_rows + tile)
    begin = tl.load(tile_starts + tile)
    end = tl.load(row_starts + row + 1)
    offset = tl.load(kv_tokens + row) - end  # from a token's place in the step to its position
    end = tl.minimum(begin + QUERIES, end)

    place = tl.arange(0, ROWS)
    token = begin + place // GROUP
    head = kv_head * GROUP + place % GROUP
    valid = token < end
    if QUERIES * GROUP != ROWS:
        valid = valid & (place < QUERIES * GROUP)
    queries = load_rows(q, token.to(tl.int64) * q_stride + head * DIM, valid, DIM, PADDED_DIM, UPCAST)
    query = token + offset

    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    mixed = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    keys = pool + (layer * 2 * KV_HEADS + kv_head) * (BLOCK_TOKENS * DIM)
    values = keys + KV_HEADS * BLOCK_TOKENS * DIM
    table = tables + row * table_stride
    stop = end + offset
    if WINDOW:
        start = tl.maximum(begin + offset - WINDOW + 1, 0)
    else:
        start = (begin + offset + 1) // KEYS * KEYS
        for first in tl.range(0, start, KEYS):
            position = first + tl.arange(0, KEYS)
            there = position < start  # all of them; spares a second form of the helpers
            rows = key_rows(table, position, there, BLOCK_STRIDE, BLOCK_TOKENS, DIM)
            k = load_rows(keys, rows, there, DIM, PADDED_DIM, UPCAST)
            v = load_rows(values, rows, there, DIM, PADDED_DIM, UPCAST)
            mixed, total, peak = attend(queries, k, v, there[None, :], scale, mixed, total, peak)
    for first in tl.range(start, stop, KEYS):
        position = first + tl.arange(0, KEYS)
        there = position < stop
        rows = key_rows(table, position, there, BLOCK_STRIDE, BLOCK_TOKENS, DIM)
        k = load_rows(keys, rows, there, DIM, PADDED_DIM, UPCAST)
        v = load_rows(values, rows, there, DIM, PADDED_DIM, UPCAST)
        seen = position[None, :] <= query[:, None]
        if WINDOW:
            seen = seen & (position[None, :] > query[:, None] - WINDOW)
        mixed, total, peak = attend(queries, k, v, seen, scale, mixed, total, peak)
    mixed = mixed / total[:, None]

    lane = tl.arange(0, PADDED_DIM)
    target = (token.to(tl.int64) * (KV_HEADS * GROUP) + head) * DIM
    mask = valid[:, None] & (lane < DIM)[None, :]
    tl.store(out + target[:, None] + lane[None, :], mixed.to(out.dtype.element_ty), mask=mask)


def prefill_attention(q: Tensor, pool: Tensor, layer: int, metadata: PagedMetadata, window: int, out: Tensor) -> None:
    """`kernels.attention.paged_attention` for the rows behind the decoded ones, into their tokens of `out`."""
    _, layers, _, kv_heads, block_tokens, dim = pool.shape
    group = q.shape[1] // kv_heads
    _attend_tile[(len(metadata.tile_rows), kv_heads)](
        q,
        pool,
        metadata.tables,
        metadata.kv_tokens,
        metadata.row_starts,
        metadata.tile_rows,
        metadata.tile_starts,
        out,
        q.stride(0),
        layer,
        metadata.tables.stride(0),
        dim**-0.5 * LOG2_E,
        BLOCK_STRIDE=layers * 2 * kv_heads * block_tokens * dim,
        BLOCK_TOKENS=block_tokens,
        KV_HEADS=kv_heads,
        GROUP=group,
        QUERIES=metadata.tile_queries,
        ROWS=max(MIN_ROWS, triton.next_power_of_2(metadata.tile_queries * group)),
        DIM=dim,
        PADDED_DIM=triton.next_power_of_2(dim),
        WINDOW=window,
        KEYS=KEYS,
        UPCAST=INTERPRETED,
        num_warps=8,
        num_stages=3,
    )
