"""Attention over the paged KV pool, for any mixture of prompt chunks and decoded tokens in one step.

The pool is `[blocks, layers, 2, kv_heads, block_tokens, head_dim]` (2: keys, values). A step's tokens stand one after
another, row by row (a row is one request's share of the step), in `[tokens, ...]` tensors; `AttentionMetadata` says
which positions they have and where their keys and values lie.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.nn import functional

from kernels import products
from kernels.products import Limits
from kernels.rotary import apply_rotary_

# In the functional form, because TorchScript does not resolve annotations that are strings in a class.
PaddedBatch = NamedTuple(  # noqa: UP014
    "PaddedBatch",
    [
        ("start", int),
        # The step's tokens `[start, stop)`.
        ("stop", int),
        ("rows", int),
        # Per row, padding included.
        ("queries", int),
        # Which of the gathered keys are used, `[first_key, stop_key)`: all of several rows', exactly the visible ones
        # of a single row.
        ("first_key", int),
        ("stop_key", int),
        # `[2 * rows * kv_heads * blocks]` int64: rows of the pool seen as `[-1, block_tokens * head_dim]`, for layer 0.
        ("pages", Tensor),
        # Keys that stand before the first query's own, in the row that has the most: the query after it sees one more.
        ("lead", int),
        # A query sees all keys up to its own: there is no window.
        ("causal", bool),
        # Added to the scores: `[rows, 1, queries, keys]`, `[queries, keys]` for a single row, None for a single query.
        ("mask", Optional[Tensor]),  # noqa: UP045
        # `[rows * queries]` int64: which of the batch's tokens stands there; None when nothing is padded.
        ("spread", Optional[Tensor]),  # noqa: UP045
        # `[stop - start]` int64: the inverse of `spread`.
        ("collect", Optional[Tensor]),  # noqa: UP045
    ],
)
"""Consecutive tokens of a step whose attention is one call; `kernels.ragged` builds them."""


class Workspace:
    """Memory that outlives a step: gathering into fresh pages of the operating system is several times slower."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._space = torch.empty(0, dtype=dtype, device=device)
        self._steps = 0
        self._rows: tuple[list[int], list[Sequence[int]]] = ([], [])
        """Tokens in all and pages of the last step's rows."""
        self.last: AttentionMetadata | None = None
        """Of the last step, where it had one token per row."""
        self.limits = products.limits(device, dtype)
        self._masks: dict[int, Tensor] = {}

    def follow(self, totals: Sequence[int], tables: Sequence[Sequence[int]]) -> tuple[int, bool]:
        """`number` and `continues` of the step with these rows, see `AttentionMetadata`. A row is known by its list of
        pages: the object, which is kept until the next step, so that no other row's can have come in its place."""
        before, self._rows = self._rows, (list(totals), list(tables))
        self._steps += 1
        if len(before[0]) != len(totals):
            return self._steps, False
        same = all(a is b for a, b in zip(before[1], tables, strict=True))
        return self._steps, same and all(a + 1 == b for a, b in zip(before[0], totals, strict=True))

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
    number: int
    """Of the step, counting all that the workspace served."""
    continues: bool
    """The rows are those of the step before, in the same order, each one token longer."""


def rotate_and_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, pool: Tensor, layer: int, metadata: AttentionMetadata
) -> Tensor:
    """Of `qkv` `[tokens, heads + 2 * kv_heads, head_dim]`, the query, key and value heads as they leave the projection,
    rotates queries and keys, in place, stores keys and values, and returns the queries `[tokens, heads, head_dim]`, in
    the pool's dtype; see `apply_rotary_` and `write_kv`."""
    queries, rows = rotate(qkv, cos, sin, pool)
    write_kv(pool, layer, rows, metadata.slots)
    return queries


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, pool: Tensor) -> tuple[Tensor, Tensor]:
    """The rotated queries, and what `write_kv` stores: see `rotate_and_write`."""
    kv_heads = pool.shape[3]
    heads = qkv.shape[1] - 2 * kv_heads
    apply_rotary_(qkv[:, : heads + kv_heads], cos, sin)
    return qkv[:, :heads].to(pool.dtype), storable(qkv[:, heads:].to(pool.dtype))


def storable(kv: Tensor) -> Tensor:
    """A step's keys and values, `[tokens, 2 * kv_heads, head_dim]`, keys first, as `[tokens * 2 * kv_heads, head_dim]`.

    What is not finite becomes zero: masked positions are multiplied with zero, and zero times a NaN that one request
    left in a page would be a NaN in the next request that uses the page.
    """
    return torch.nan_to_num(kv, nan=0.0, posinf=0.0, neginf=0.0).reshape(-1, kv.shape[2])


def write_kv(pool: Tensor, layer: int, rows: Tensor, slots: Tensor) -> None:
    """Stores `storable` rows into the pages' `slots`, see `AttentionMetadata`."""
    rows_from(pool, layer, pool.shape[5]).index_copy_(0, slots, rows)


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
    width = pool.shape[4] * pool.shape[5]
    gathered = workspace.space(batch.pages.numel() * width)
    gather(rows_from(pool, layer, width), batch.pages, gathered)
    return attend(q, gathered, pool, batch, workspace.limits)


def attend(q: Tensor, space: Tensor, pool: Tensor, batch: PaddedBatch, limits: Limits) -> Tensor:
    """One padded batch, over what `gather` has put into `space`: `q` `[its tokens, heads, head_dim]` to the same
    shape."""
    heads, dim = q.shape[1], q.shape[2]
    keys, values = keys_values(space, batch, pool)
    if batch.queries == 1:
        return attend_one_query(q, keys, values, batch.mask, limits.decode_keys)
    spread, collect = batch.spread, batch.collect  # by these names, TorchScript knows that they are not None
    if spread is not None:
        q = q.index_select(0, spread)
    rows = q.view(batch.rows, batch.queries, heads, dim)
    out = _many_queries(rows, keys, values, batch, limits).reshape(-1, heads, dim)
    return out if collect is None else out.index_select(0, collect)


def attend_one_query(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, decode_keys: int) -> Tensor:
    """A padded batch with one query per row: `q` `[rows, heads, head_dim]` over keys and values `[rows, kv_heads, keys,
    head_dim]`, to `q`'s shape. `decode_keys`: see `products.Limits`."""
    rows, kv_heads, num_keys = keys.shape[0], keys.shape[1], keys.shape[2]
    # The query heads of one key-value head become the rows of one product: the keys are read once for all.
    packed = q.reshape(rows, kv_heads, -1, q.shape[2])
    if rows * kv_heads * num_keys >= decode_keys:
        out = products.decode_attention(packed, keys, values, mask)
    else:
        out = functional.scaled_dot_product_attention(packed, keys, values, attn_mask=mask)
    return out.reshape(q.shape)


def _many_queries(q: Tensor, keys: Tensor, values: Tensor, batch: PaddedBatch, limits: Limits) -> Tensor:
    mask = batch.mask
    if mask is not None and products.fits_prompt(q, keys, limits):
        return products.prompt_attention(q, keys, values, mask, batch.lead, batch.causal, limits)
    grouped = q.shape[2] != keys.shape[1]
    return functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=grouped
    ).transpose(1, 2)


def gather(rows: Tensor, pages: Tensor, space: Tensor) -> None:
    """Copies a batch's pages, of `rows_from` their layer, to the beginning of `space`, one-dimensional."""
    width = rows.shape[1]
    torch.index_select(rows, 0, pages, out=space[: pages.numel() * width].view(-1, width))


def keys_values(space: Tensor, batch: PaddedBatch, pool: Tensor) -> tuple[Tensor, Tensor]:
    """Of what `gather` has put there, the keys and values that the batch uses: each `[rows, kv_heads, keys,
    head_dim]`."""
    kv_heads, block_tokens, dim = pool.shape[3], pool.shape[4], pool.shape[5]
    both = space[: batch.pages.numel() * block_tokens * dim].view(2, batch.rows, kv_heads, -1, dim)
    both = both[:, :, :, batch.first_key : batch.stop_key]
    return both[0], both[1]


def rows_from(pool: Tensor, layer: int, width: int) -> Tensor:
    """The pool as rows of `width` from `layer` of its first block on: what an index names in layer 0, it names here
    in `layer`."""
    return pool.view(-1, width)[layer * (pool[0, 0].numel() // width) :]
