"""One decode step in device memory that stays where it is: tokens, positions and page tables in, logits out.

    place       0     1     2     3 ...
    tokens    [ 17 ][ 4  ][    ][    ]     the last of each row, drawn by the step before
    positions [ 80 ][ 31 ][ -1 ][ -1 ]     -1: nobody; nothing is written for it, what comes out is not looked at
    tables    [ pages of its request ]     told only what has changed

A step runs over the first `size` places, for the few sizes of a ladder: each is one CUDA graph, captured at the start.
A graph replays hundreds of launches as one, where launching them takes longer than a small batch's computing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.model.transformer import Decoder
from engine.model.weights import Progress
from kernels.operators import StaticOperators
from kernels.upload import upload

NOBODY = -1
LADDER = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192)
"""Batch sizes; beyond them every multiple of 64."""
LADDER_STEP = 64


def ladder(max_rows: int) -> tuple[int, ...]:
    """The sizes that steps of up to `max_rows` rows are padded to, the smallest first."""
    beyond = range(LADDER[-1] + LADDER_STEP, max_rows + LADDER_STEP, LADDER_STEP)
    sizes = [size for size in (*LADDER, *beyond) if size < max_rows]
    return (*sizes, max_rows)


class DecodeStep:
    """The buffers of up to `max_rows` rows of up to `max_blocks` pages, and the step over them."""

    def __init__(
        self,
        model: Decoder,
        static: StaticOperators[Any],
        pool: Tensor,
        windows: Collection[int],
        max_rows: int,
        max_blocks: int,
        vocab_size: int,
    ) -> None:
        device = pool.device
        self.sizes = ladder(max_rows)
        self.device = device
        self.static = static
        self._model = model
        self._pool = pool
        self._build_metadata = static.metadata_builder(pool, windows)
        self._tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._positions = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        self._tables = torch.zeros((max_rows, max_blocks), dtype=torch.int32, device=device)
        self._logits = torch.empty((max_rows, vocab_size), dtype=torch.float32, device=device)
        self._replay: Callable[[int], None] = self._compute

    @property
    def max_blocks(self) -> int:
        """Pages that a place has room for."""
        return self._tables.shape[1]

    def capture(self, progress: Progress | None) -> None:
        """From now on, steps are replayed. Every page stays as it is."""
        graphs: dict[int, torch.cuda.CUDAGraph] = {}
        memory = None
        for done, size in enumerate(reversed(self.sizes)):  # the largest first: the others fit into its memory
            self._compute(size)  # compiles what is launched
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=memory):
                self._compute(size)
            memory = graph.pool()
            graphs[size] = graph
            if progress is not None:
                progress("capturing decode steps", (done + 1) / len(self.sizes))
        self._replay = lambda size: graphs[size].replay()

    def tell_pages(self, places: Sequence[int], indices: Sequence[int], pages: Sequence[int]) -> None:
        """Writes `pages[i]` as the page `indices[i]` of the row at `places[i]`."""
        where = np.array(places, np.int64) * self.max_blocks + np.array(indices, np.int64)
        told = upload(np.stack((where, np.array(pages, np.int64))), self.device)
        self._tables.view(-1).index_copy_(0, told[0], told[1].to(torch.int32))

    def run(self, inputs: NDArray[np.int64], drawn: Tensor | None) -> Tensor:
        """Computes a step over `inputs` `[3, rows]` and returns the logits `[rows, vocab]`, valid until the next one.

        Per place: its position or -1, its token, and, unless that is -1, the place in `drawn` (the tokens of an earlier
        step, which the host need not know yet) that has its token instead.
        """
        rows = inputs.shape[1]
        size = next(size for size in self.sizes if size >= rows)
        positions, tokens, sources = upload(inputs, self.device)
        if drawn is not None:
            tokens = torch.where(sources >= 0, drawn.index_select(0, sources.clamp(min=0)), tokens)
        self._tokens[:rows].copy_(tokens)
        self._positions[:rows].copy_(positions)
        self._positions[rows:size].fill_(-1)
        self._replay(size)
        return self._logits[:rows]

    def _compute(self, size: int) -> None:
        metadata = self._build_metadata(self._positions[:size], self._tables[:size])
        hidden = self._model.forward(self._tokens[:size], self._pool, metadata)
        self._logits[:size].copy_(self._model.logits(hidden))
