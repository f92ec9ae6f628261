"""The gathered keys and values of decoding rows, kept from one step to the next.

Attention on a CPU reads keys and values that were gathered from their pages, and gathering costs as much as reading
them. While the same rows go on decoding, each step adds one token to what the step before had gathered.
"""

from __future__ import annotations

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.attention import AttentionMetadata, PaddedBatch

MAX_BYTES = 256 << 20
"""Of all layers. Rows that have more than this gather in every step, layer by layer into the same memory."""


class Place(NamedTuple):
    """Where a step's gathered keys and values are."""

    space: Tensor
    """One-dimensional."""
    stride: int
    """From one layer's to the next, in numbers; 0: they take turns."""
    offsets: list[int]
    """Within a layer's, one per batch."""
    slots: Tensor | None
    """`[rows * 2 * kv_heads]`: where the step's own keys and values go in a layer, seen as rows of `head_dim`; None:
    everything is to be gathered."""


class DenseKeys:
    """For layers without a window."""

    def __init__(self, num_layers: int) -> None:
        self._num_layers = num_layers
        self._space: Tensor | None = None
        self._first_slots = torch.empty(0)
        """`[rows, 2 * kv_heads]`: of each row's position 0."""
        self._shape: list[tuple[int, int]] = []
        self._step = -1
        """What lies here is that of the step with this number."""

    def place(self, metadata: AttentionMetadata, pool: Tensor) -> Place:
        """For a step with one token per row, which is then computed."""
        batches = metadata.batches[0]
        page = pool.shape[4] * pool.shape[5]
        sizes = [batch.pages.numel() * page for batch in batches]
        stride = sum(sizes)
        if self._num_layers * stride * pool.element_size() > MAX_BYTES:
            return take_turns(metadata, pool)
        shape = [(batch.rows, batch.pages.numel()) for batch in batches]
        goes_on = metadata.continues and self._step == metadata.number - 1 and self._shape == shape
        offsets = list(accumulate(sizes[:-1], initial=0))
        numbers = self._num_layers * stride
        if self._space is None or self._space.numel() < numbers:  # it grows by a page per row and block
            self._space = pool.new_empty(min(numbers * 3 // 2, MAX_BYTES // pool.element_size()))
        if not goes_on:
            self._first_slots = torch.cat([_first_slots(b, at, pool) for b, at in zip(batches, offsets, strict=True)])
        self._step, self._shape = metadata.number, shape
        slots = (self._first_slots + metadata.positions[:, None]).flatten() if goes_on else None
        return Place(self._space, stride, offsets, slots)


def take_turns(metadata: AttentionMetadata, pool: Tensor) -> Place:
    """All batches of all layers in the same memory."""
    pages = max(batch.pages.numel() for batches in metadata.batches.values() for batch in batches)
    space = metadata.workspace.space(pages * pool.shape[4] * pool.shape[5])
    return Place(space, 0, [0] * max(map(len, metadata.batches.values())), None)


def _first_slots(batch: PaddedBatch, offset: int, pool: Tensor) -> Tensor:
    kv_heads, block_tokens, dim = pool.shape[3:]
    keys = batch.pages.numel() // (2 * batch.rows * kv_heads) * block_tokens
    row = torch.arange(batch.rows)[:, None, None]
    kv = torch.arange(2)[:, None]
    head = torch.arange(kv_heads)
    return (offset // dim + ((kv * batch.rows + row) * kv_heads + head) * keys).flatten(1)
