"""Attention over the paged KV pool, for any mixture of prompt chunks and decoded tokens in one step.

The pool is `[blocks, layers, 2, kv_heads, block_tokens, head_dim]` (2: keys, values). A step's tokens stand one after
another, row by row (a row is one request's share of the step), in `[tokens, ...]` tensors; `AttentionMetadata` says
which positions they have and where their keys and values lie.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels import products
from kernels.rotary import apply_rotary


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Consecutive tokens of a step whose attention is one call; `kernels.ragged` builds them."""

    start: int
    stop: int
    """The step's tokens `[start, stop)`."""
    rows: int
    queries: int
    """Per row, padding included."""
    keys: slice
    """Which of the gathered keys are used: all of several rows', exactly the visible ones of a single row."""
    pages: Tensor
    """`[2 * rows * kv_heads * blocks]` int64: rows of the pool seen as `[-1, block_tokens * head_dim]`, for layer 0."""
    lead: int
    """Keys that stand before the first query's own, in the row that has the most: the query after it sees one more."""
    causal: bool
    """A query sees all keys up to its own: there is no window."""
    mask: Tensor | None
    """Added to the scores: `[rows, 1, queries, keys]`, `[queries, keys]` for a single row, None for a single query."""
    spread: Tensor | None
    """`[rows * queries]` int64: which of the batch's tokens stands there; None when nothing is padded."""
    collect: Tensor | None
    """`[stop - start]` int64: the inverse of `spread`."""


class Workspace:
    """Memory that outlives a step: gathering into fresh pages of the operating system is several times slower."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._space = torch.empty(0, dtype=dtype, device=device)
        self.few_keys = products.few_keys(device, dtype)
        self._masks: dict[int, Tensor] = {}

    def space(self, numbers: int) -> Tensor:
        """Uninitialised, one-dimensional, at least so many; valid until the next call."""
        if self._space.numel() < numbers:
            self._space = self._space.new_empty(numbers)
        return self._space

    def tile_mask(self, queries: int, keys: int, window: int, tile: int) -> Tensor:
        """`[queries, keys]` for the last `queries` of `keys` positions: causal, and within `window` unless that is 0.

        A view of one mask anchored at its lower right corner, which is the same for every tile of up to `tile` queries.
        """
        mask = self._masks.get(window)
        if mask is None or mask.shape[1] < keys:
            width = 1 << (keys - 1).bit_length()
            query = torch.arange(-tile, 0, device=self._space.device)[:, None]
            key = torch.arange(-width, 0, device=self._space.device)[None]
            hidden = key > query
            if window:
                hidden |= key <= query - window
            mask = torch.zeros(hidden.shape, dtype=self._space.dtype, device=hidden.device)
            self._masks[window] = mask.masked_fill_(hidden, float("-inf"))
            mask = self._masks[window]
        return mask[tile - queries :, mask.shape[1] - keys :]


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where a step's tokens stand; built once per step, the same for all layers."""

    positions: Tensor
    """`[tokens]` int64, within each token's own request."""
    slots: Tensor
    """`[tokens * 2 * kv_heads]` int64: rows of the pool seen as `[-1, head_dim]`, for layer 0."""
    batches: Mapping[int, tuple[PaddedBatch, ...]]
    """By window (0: none), covering all tokens in order."""
    workspace: Workspace


def rotate_and_write(
    queries_keys: Tensor,
    values: Tensor,
    cos: Tensor,
    sin: Tensor,
    pool: Tensor,
    layer: int,
    metadata: AttentionMetadata,
) -> Tensor:
    """See `rotate_and_write_to`."""
    return rotate_and_write_to(metadata.slots, queries_keys, values, cos, sin, pool, layer)


def rotate_and_write_to(
    slots: Tensor, queries_keys: Tensor, values: Tensor, cos: Tensor, sin: Tensor, pool: Tensor, layer: int
) -> Tensor:
    """Rotates the query and key heads `[tokens, heads + kv_heads, head_dim]`, stores keys and `values` `[tokens,
    kv_heads, head_dim]`, and returns the queries; see `apply_rotary` and `write_kv`."""
    rotated = apply_rotary(queries_keys, cos, sin)
    heads = rotated.shape[1] - values.shape[1]
    write_kv(pool, layer, torch.cat((rotated[:, heads:], values), 1), slots)
    return rotated[:, :heads]


def write_kv(pool: Tensor, layer: int, kv: Tensor, slots: Tensor) -> None:
    """Stores a step's keys and values, `[tokens, 2 * kv_heads, head_dim]`, keys first, into the pages' `slots`, see
    `AttentionMetadata`.

    What is not finite is stored as zero: masked positions are multiplied with zero, and zero times a NaN that one
    request left in a page would be a NaN in the next request that uses the page.
    """
    head_dim = pool.shape[-1]
    finite = torch.nan_to_num(kv, nan=0.0, posinf=0.0, neginf=0.0).view(-1, head_dim)
    _from_layer(pool, layer, head_dim).index_copy_(0, slots, finite)


def paged_attention(q: Tensor, pool: Tensor, layer: int, metadata: AttentionMetadata, window: int) -> Tensor:
    """Causal attention of `q` `[tokens, heads, head_dim]` over each row's pages, to the same shape.

    A query sees the `window` positions up to and including its own; 0 means all. Query head `h` uses key-value head
    `h // (heads // kv_heads)`. Scores are scaled by `head_dim ** -0.5`.
    """
    batches = metadata.batches[window]
    if len(batches) == 1:
        return _attend(q, pool, layer, batches[0], metadata.workspace)
    out = torch.empty_like(q)
    for batch in batches:
        out[batch.start : batch.stop] = _attend(q[batch.start : batch.stop], pool, layer, batch, metadata.workspace)
    return out


def _attend(q: Tensor, pool: Tensor, layer: int, batch: PaddedBatch, workspace: Workspace) -> Tensor:
    """One padded batch: `q` `[its tokens, heads, head_dim]` to the same shape."""
    heads, dim = q.shape[1:]
    space = workspace.space(batch.pages.numel() * pool.shape[4] * dim)
    first, stop = batch.keys.start, batch.keys.stop
    if batch.queries == 1:
        return attend_one_query(q, pool, layer, batch.pages, first, stop, batch.mask, space, workspace.few_keys)
    keys, values = _gather(pool, layer, batch.pages, batch.rows, first, stop, space)
    if batch.spread is not None:
        q = q.index_select(0, batch.spread)
    out = _many_queries(q.view(batch.rows, batch.queries, heads, dim), keys, values, batch).reshape(-1, heads, dim)
    return out if batch.collect is None else out.index_select(0, batch.collect)


def attend_one_query(
    q: Tensor,
    pool: Tensor,
    layer: int,
    pages: Tensor,
    first: int,
    stop: int,
    mask: Tensor | None,
    space: Tensor,
    few_keys: int,
) -> Tensor:
    """A padded batch with one query per row: `q` `[rows, heads, head_dim]` over the gathered keys `[first, stop)`, to
    `q`'s shape. `space` is memory to gather into. Also compiled by `engine.model.scripted`."""
    rows = q.shape[0]
    keys, values = _gather(pool, layer, pages, rows, first, stop, space)
    # The query heads of one key-value head become the rows of one product: the keys are read once for all.
    packed = q.reshape(rows, keys.shape[1], -1, q.shape[2])
    if rows * keys.shape[1] * keys.shape[2] >= few_keys:
        out = products.decode_attention(packed, keys, values, mask)
    else:
        out = functional.scaled_dot_product_attention(packed, keys, values, attn_mask=mask)
    return out.reshape(q.shape)


def _many_queries(q: Tensor, keys: Tensor, values: Tensor, batch: PaddedBatch) -> Tensor:
    if batch.mask is not None and products.fits_prompt(q, keys):
        return products.prompt_attention(q, keys, values, batch.mask, batch.lead, batch.causal)
    grouped = q.shape[2] != keys.shape[1]
    return functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=batch.mask, enable_gqa=grouped
    ).transpose(1, 2)


def _gather(
    pool: Tensor, layer: int, pages: Tensor, rows: int, first: int, stop: int, space: Tensor
) -> tuple[Tensor, Tensor]:
    """Keys and values `[first, stop)` of `pages`, each `[rows, kv_heads, keys, head_dim]`, in `space`."""
    kv_heads, dim = pool.shape[3], pool.shape[5]
    width = pool.shape[4] * dim
    gathered = space[: pages.numel() * width].view(-1, width)
    torch.index_select(_from_layer(pool, layer, width), 0, pages, out=gathered)
    both = gathered.view(2, rows, kv_heads, -1, dim)[:, :, :, first:stop]
    return both[0], both[1]


def _from_layer(pool: Tensor, layer: int, width: int) -> Tensor:
    """The pool as rows of `width` from `layer` of its first block on: what an index names in layer 0, it names here
    in `layer`."""
    return pool.view(-1, width)[layer * (pool[0, 0].numel() // width) :]
