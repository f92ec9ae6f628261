"""Where a step's tokens stand, as the Triton kernels read it: page tables rather than padded batches.

rows    |q|q|q|q q q|q q q q q q q|     rows of one token first, as far as the caller sorted them so
decode  |0|1|2|                         one program per row, key head and split of the keys
tiles         |0    |1      |2    |     at most `tile_queries` of one row's tokens, one program per key head
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
from numpy.typing import NDArray
from torch import Tensor

from kernels.operators import Builder, StaticBuilder
from kernels.upload import upload

TILE_ROWS = 128
"""Query heads of one key head times queries: the height of a prefill tile."""
ALIGNMENT = 4
"""int32 words: every part begins at a multiple of 16 bytes, else Triton would compile each kernel anew for it."""
TARGET_PROGRAMS = 512
"""Programs that a decode step's keys are split into when its rows are too few: about four for each of an H200's 132
multiprocessors."""
MIN_SPLIT = 256
"""Keys below which a split costs more in being combined than it saves."""

MIN_STATIC_SPLITS = 8
"""Where the lengths are not known at the launch: one long row among many short ones."""

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PagedMetadata:
    """Built once per step, the same for all layers. All tensors are int32."""

    positions: Tensor
    """`[tokens]`, within each token's own request."""
    slots: Tensor
    """`[tokens]`: page times block size plus place in the block; below 0 for a token that stands for nothing."""
    row_starts: Tensor
    """`[rows + 1]`: each row's first token in the step, and the end."""
    kv_tokens: Tensor
    """`[rows]`: tokens in all once the step is done."""
    tables: Tensor
    """`[rows, widest]`: each row's pages, padded with page 0."""
    tile_rows: Tensor
    tile_starts: Tensor
    """`[tiles]`: the row of a tile, and its first token in the step."""
    tile_queries: int
    decode_rows: int
    """The first rows, which have one token each."""
    splits: Mapping[int, int]
    """By window (0: none): into how many parts a decoded token's keys are divided at most."""


def metadata_builder(pool: Tensor, heads: int, windows: Collection[int]) -> Builder[PagedMetadata]:
    """What builds the metadata of steps over `pool` for a model with `heads` query heads; see
    `kernels.ragged.build_metadata`, whose first three arguments it takes."""
    kv_heads, block_tokens = pool.shape[3:5]
    tile_queries = max(1, TILE_ROWS // (heads // kv_heads))

    def build(
        num_queries: Sequence[int], num_kv_tokens: Sequence[int], block_tables: Sequence[Sequence[int]]
    ) -> PagedMetadata:
        queries, kv_tokens = np.array(num_queries, np.int32), np.array(num_kv_tokens, np.int32)
        tables = _tables(block_tables, -(-kv_tokens // block_tokens))
        starts = np.concatenate(([0], np.cumsum(queries))).astype(np.int32)
        rows = np.repeat(np.arange(len(queries)), queries)
        positions = np.arange(starts[-1]) + (kv_tokens - starts[1:])[rows]
        slots = tables[rows, positions // block_tokens] * block_tokens + positions % block_tokens
        decode_rows = int((np.cumsum(queries != 1) == 0).sum())
        tile_rows, tile_starts = _tiles(starts, decode_rows, tile_queries)
        parts = (positions, slots, starts, kv_tokens, tables, tile_rows, tile_starts)
        moved = _to_device(parts, pool.device)
        return PagedMetadata(
            positions=moved[0],
            slots=moved[1],
            row_starts=moved[2],
            kv_tokens=moved[3],
            tables=moved[4],
            tile_rows=moved[5],
            tile_starts=moved[6],
            tile_queries=tile_queries,
            decode_rows=decode_rows,
            splits={window: _splits(kv_tokens[:decode_rows], kv_heads, window) for window in windows},
        )

    return build


def _tables(block_tables: Sequence[Sequence[int]], sizes: Ints) -> Ints:
    tables = np.zeros((len(sizes), sizes.max()), np.int32)
    for row, (table, size) in enumerate(zip(block_tables, sizes, strict=True)):
        tables[row, :size] = table[:size]
    return tables


def _tiles(starts: Ints, decode_rows: int, tile_queries: int) -> tuple[Ints, Ints]:
    """`tile_rows` and `tile_starts` of the rows that are not decoded."""
    begins, ends = starts[decode_rows:-1], starts[decode_rows + 1 :]
    counts = -(-(ends - begins) // tile_queries)
    first = np.repeat(np.cumsum(counts) - counts, counts)
    tile_starts = np.repeat(begins, counts) + (np.arange(counts.sum()) - first) * tile_queries
    tile_rows = np.repeat(np.arange(decode_rows, len(starts) - 1), counts)
    return tile_rows.astype(np.int32), tile_starts.astype(np.int32)


def static_metadata_builder(pool: Tensor, windows: Collection[int]) -> StaticBuilder[PagedMetadata]:
    """For decode steps over `pool` whose places stay where they are, so that a CUDA graph can replay them: nothing is
    read on the host, and what depends on lengths is settled for all of them."""
    kv_heads, block_tokens = pool.shape[3:5]

    def build(positions: Tensor, tables: Tensor) -> PagedMetadata:
        there = positions >= 0
        positions = positions.clamp(min=0)
        pages = tables.gather(1, (positions // block_tokens).long()[:, None]).squeeze(1)
        nothing = positions[:0]
        rows, longest = len(positions), tables.shape[1] * block_tokens
        wanted = max(MIN_STATIC_SPLITS, TARGET_PROGRAMS // (rows * kv_heads))
        return PagedMetadata(
            positions=positions,
            slots=torch.where(there, pages * block_tokens + positions % block_tokens, -1),
            row_starts=nothing,
            kv_tokens=positions + 1,
            tables=tables,
            tile_rows=nothing,
            tile_starts=nothing,
            tile_queries=1,
            decode_rows=rows,
            splits={w: min(wanted, triton.cdiv(min(w, longest) if w else longest, MIN_SPLIT)) for w in windows},
        )

    return build


def _splits(kv_tokens: Ints, kv_heads: int, window: int) -> int:
    if not len(kv_tokens):
        return 0
    visible = np.minimum(kv_tokens, window) if window else kv_tokens
    tokens = max(MIN_SPLIT, triton.cdiv(int(visible.sum()) * kv_heads, TARGET_PROGRAMS))
    return int(triton.cdiv(int(visible.max()), tokens))


def _to_device(parts: Sequence[Ints], device: torch.device) -> list[Tensor]:
    """All parts in one copy."""
    ends = np.cumsum([-(-part.size // ALIGNMENT) * ALIGNMENT for part in parts])
    packed = np.zeros(ends[-1], np.int32)
    for part, end in zip(parts, ends, strict=True):
        start = end - -(-part.size // ALIGNMENT) * ALIGNMENT
        packed[start : start + part.size] = part.reshape(-1)
    moved = upload(packed, device)
    starts = [0, *ends[:-1].tolist()]
    return [moved[a : a + part.size].view(part.shape) for a, part in zip(starts, parts, strict=True)]
