"""A step's ragged rows, cut into padded batches.

    rows      |q q q q q q q q q|q|q|q|q|     tokens of the step, row by row
    tiles     |q q q q|q q q q|q|q|q|q|q|     a long row is cut into tiles of at most `TILE_QUERIES` queries
    batches   |       |       | |       |     consecutive tiles of like size are padded to one another

A tile sees only the keys up to its last query, and with a window only those from its first query's window on. The
batches' memory is bounded whatever the lengths: one tile's keys, or `Limits.batch_bytes` of several tiles' keys.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.attention import AttentionMetadata, PaddedBatch, Workspace
from kernels.operators import Builder

TILE_QUERIES = 256
"""Long enough to amortise gathering the keys, short enough that the masked half of the last keys costs little."""
LARGE_TILE = 1 << 16
"""Scores per head from which a tile is a batch of its own, with a mask that needs no memory."""
PADDING_TOKENS = 512
"""Padded keys below which one call with padding is cheaper than two calls."""
CPU_BATCH_BYTES = 4 << 20
"""Keys and values of one batch stay in a cache between gathering and use; smaller ones cost more calls."""
GPU_BATCH_BYTES = 256 << 20
"""A launch costs more than padding; bounds the workspace."""

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class _Row:
    """One row: its tokens in the step and its pages."""

    start: int
    queries: int
    kv_tokens: int
    """After this step."""
    table: Ints


@dataclass(frozen=True, slots=True)
class _Tile:
    """Queries at positions `[first, last]` of a row, the step's tokens from `start` on; keys from `first_block` on."""

    row: _Row
    start: int
    first: int
    last: int
    first_block: int
    blocks: int

    @property
    def queries(self) -> int:
        return self.last - self.first + 1


def metadata_builder(pool: Tensor, heads: int, windows: Collection[int]) -> Builder[AttentionMetadata]:
    """`build_metadata` for steps over `pool`; the number of query heads plays no part in it."""
    workspace = Workspace(pool.dtype, pool.device)
    return partial(build_metadata, pool=pool, windows=windows, workspace=workspace)


def build_metadata(
    num_queries: Sequence[int],
    num_kv_tokens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    pool: Tensor,
    windows: Collection[int],
    workspace: Workspace,
) -> AttentionMetadata:
    """Metadata of a step over `pool` `[blocks, layers, 2, kv_heads, block_tokens, head_dim]`.

    Per row: tokens in this step, tokens in all once the step is done (this step's are the last), and pages. Rows are
    best sorted by both lengths: only neighbours share a batch. `windows` are those of the model's layers.
    """
    number, continues = workspace.follow(num_kv_tokens, block_tables)
    if continues and workspace.last is not None and _stays_in_pages(num_queries, num_kv_tokens, windows, pool):
        workspace.last = _advance(workspace.last, number)
        return workspace.last
    block_tokens = pool.shape[4]
    starts = [0, *np.cumsum(num_queries).tolist()]
    rows = [
        _Row(start, n, kv, np.asarray(table[: -(-kv // block_tokens)], dtype=np.int64))
        for start, n, kv, table in zip(starts[:-1], num_queries, num_kv_tokens, block_tables, strict=True)
    ]
    positions = _positions(rows)
    metadata = AttentionMetadata(
        positions=torch.from_numpy(positions).to(pool.device),
        slots=torch.from_numpy(_slots(rows, positions, pool)).to(pool.device),
        batches={window: _batches(rows, window, pool, workspace) for window in windows},
        workspace=workspace,
        number=number,
        continues=continues,
    )
    workspace.last = metadata if len(positions) == len(rows) else None
    return metadata


def _stays_in_pages(
    num_queries: Sequence[int], num_kv_tokens: Sequence[int], windows: Collection[int], pool: Tensor
) -> bool:
    """No row comes to a page, or leaves one behind, with the one token that it computes."""
    block_tokens = pool.shape[4]
    return (
        all(window == 0 for window in windows)
        and all(n == 1 for n in num_queries)
        and all((kv - 1) % block_tokens for kv in num_kv_tokens)
    )


def _advance(last: AttentionMetadata, number: int) -> AttentionMetadata:
    """That of the same rows one token further on, in the same pages: for a single row a fifth of building it anew."""
    positions = last.positions + 1
    batches = tuple(_advanced(batch, positions[batch.start : batch.stop]) for batch in last.batches[0])
    return replace(last, positions=positions, slots=last.slots + 1, batches={0: batches}, number=number, continues=True)


def _advanced(batch: PaddedBatch, positions: Tensor) -> PaddedBatch:
    if batch.mask is None:
        return batch._replace(stop_key=batch.stop_key + 1, lead=batch.lead + 1)
    batch.mask[torch.arange(batch.rows, device=positions.device), 0, 0, positions] = (
        0.0  # nobody looks at the step before any more
    )
    return batch._replace(lead=batch.lead + 1)


def _positions(rows: Sequence[_Row]) -> Ints:
    """`[tokens]`."""
    queries = np.array([row.queries for row in rows], dtype=np.int64)
    offsets = np.array([row.kv_tokens - row.queries - row.start for row in rows], dtype=np.int64)
    return np.repeat(offsets, queries) + np.arange(queries.sum())


def _slots(rows: Sequence[_Row], positions: Ints, pool: Tensor) -> Ints:
    """`[tokens * 2 * kv_heads]`: where each token's key and value heads go in layer 0."""
    _, layers, _, kv_heads, block_tokens, _ = pool.shape
    lengths = [len(row.table) for row in rows]
    first_page = np.repeat(np.cumsum([0, *lengths[:-1]]), [row.queries for row in rows])
    blocks = np.concatenate([row.table for row in rows])[first_page + positions // block_tokens]
    first = blocks * (layers * 2 * kv_heads * block_tokens) + positions % block_tokens
    slots: Ints = first[:, None] + np.arange(2 * kv_heads) * block_tokens
    return slots.reshape(-1)


def _batches(rows: Sequence[_Row], window: int, pool: Tensor, workspace: Workspace) -> tuple[PaddedBatch, ...]:
    tiles = [tile for row in rows for tile in _tiles(row, window, pool.shape[4])]
    page_bytes = pool[0, 0].numel() * pool.element_size()
    budget = CPU_BATCH_BYTES if pool.device.type == "cpu" else GPU_BATCH_BYTES
    cuts = _cuts(tiles, pool.shape[4], max(1, budget // page_bytes))
    return tuple(_pad(tiles[a:b], window, pool, workspace) for a, b in pairwise(cuts))


def _tiles(row: _Row, window: int, block_tokens: int) -> list[_Tile]:
    first = row.kv_tokens - row.queries
    size = TILE_QUERIES if row.queries * row.kv_tokens >= LARGE_TILE else row.queries
    tiles = []
    for offset in range(0, row.queries, size):
        lowest, last = first + offset, first + min(offset + size, row.queries) - 1
        first_block = max(0, lowest - window + 1) // block_tokens if window else 0
        blocks = last // block_tokens + 1 - first_block
        tiles.append(_Tile(row, row.start + offset, lowest, last, first_block, blocks))
    return tiles


def _cuts(tiles: Sequence[_Tile], block_tokens: int, max_blocks: int) -> list[int]:
    """Where batches begin, and the end."""
    cuts = [0]
    widest = blocks = 0
    for i, tile in enumerate(tiles):
        widest, blocks = max(widest, tile.blocks), blocks + tile.blocks
        padded = (i + 1 - cuts[-1]) * widest
        waste = padded - blocks
        if i > cuts[-1] and (
            (tile.queries - 1).bit_length() != (tiles[i - 1].queries - 1).bit_length()
            or _is_large(tile, block_tokens)
            or _is_large(tiles[i - 1], block_tokens)
            or padded > max_blocks
            or waste * block_tokens > max(PADDING_TOKENS, blocks * block_tokens)
        ):
            cuts.append(i)
            widest = blocks = tile.blocks
    return [*cuts, len(tiles)]


def _is_large(tile: _Tile, block_tokens: int) -> bool:
    return tile.queries > 1 and tile.queries * tile.blocks * block_tokens >= LARGE_TILE


def _pad(tiles: Sequence[_Tile], window: int, pool: Tensor, workspace: Workspace) -> PaddedBatch:
    start, stop = tiles[0].start, tiles[-1].start + tiles[-1].queries
    queries = max(tile.queries for tile in tiles)
    blocks = max(tile.blocks for tile in tiles)
    spread, collect = _padding(tiles, queries)
    if len(tiles) == 1:
        first_key, stop_key = _visible_keys(tiles[0], window, pool.shape[4])
        mask = None
        if queries > 1:
            mask = workspace.tile_mask(queries, stop_key - first_key, window, TILE_QUERIES)
    else:
        first_key, stop_key = 0, blocks * pool.shape[4]
        mask = _mask(tiles, queries, stop_key, window, pool)
    lead = max(tile.first - tile.first_block * pool.shape[4] for tile in tiles) - first_key
    return PaddedBatch(
        start=start,
        stop=stop,
        rows=len(tiles),
        queries=queries,
        first_key=first_key,
        stop_key=stop_key,
        lead=lead,
        causal=window == 0,
        pages=torch.from_numpy(_pages(tiles, blocks, pool)).to(pool.device),
        mask=mask,
        spread=None if spread is None else torch.from_numpy(spread).to(pool.device),
        collect=None if collect is None else torch.from_numpy(collect).to(pool.device),
    )


def _visible_keys(tile: _Tile, window: int, block_tokens: int) -> tuple[int, int]:
    """From the first key that the first query sees to the last query's own, counted from the tile's first page."""
    base = tile.first_block * block_tokens
    lowest = max(0, tile.first - window + 1) if window else 0
    return lowest - base, tile.last + 1 - base


def _pages(tiles: Sequence[_Tile], blocks: int, pool: Tensor) -> Ints:
    """`[2 * rows * kv_heads * blocks]`; padding is page 0, which the mask hides."""
    _, layers, _, kv_heads, _, _ = pool.shape
    table = np.zeros((len(tiles), blocks), dtype=np.int64)
    for i, tile in enumerate(tiles):
        table[i, : tile.blocks] = tile.row.table[tile.first_block : tile.first_block + tile.blocks]
    first = table * (layers * 2 * kv_heads)
    both = np.arange(2)[:, None, None, None] * kv_heads
    pages: Ints = first[None, :, None, :] + both + np.arange(kv_heads)[None, None, :, None]
    return pages.reshape(-1)


def _padding(tiles: Sequence[_Tile], queries: int) -> tuple[Ints | None, Ints | None]:
    """`spread` and `collect`: a missing query stands for the row's last one, so that no row of scores is all masked."""
    lengths = np.array([tile.queries for tile in tiles], dtype=np.int64)
    if (lengths == queries).all():
        return None, None
    within = np.minimum(np.arange(queries)[None], lengths[:, None] - 1)
    spread = (np.cumsum(lengths) - lengths)[:, None] + within
    collect = np.flatnonzero(np.arange(queries)[None] < lengths[:, None])
    return spread.reshape(-1), collect


def _mask(tiles: Sequence[_Tile], queries: int, keys: int, window: int, pool: Tensor) -> Tensor:
    """`[rows, 1, queries, keys]`."""
    first = np.array([tile.first for tile in tiles])[:, None, None]
    last = np.array([tile.last for tile in tiles])[:, None, None]
    base = np.array([tile.first_block * pool.shape[4] for tile in tiles])[:, None, None]
    query = np.minimum(first + np.arange(queries)[None, :, None], last)
    key = base + np.arange(keys)[None, None]
    hidden = key > query
    if window:
        hidden |= key <= query - window
    mask = torch.zeros(hidden.shape, dtype=pool.dtype, device=pool.device)
    return mask.masked_fill_(torch.from_numpy(hidden).to(pool.device), float("-inf"))[:, None]
