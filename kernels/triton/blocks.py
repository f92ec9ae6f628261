"""KV pages to and from a staging buffer, and within the pool: a page is one contiguous range of words."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.blocks import as_bytes

WIDTH = 4096
"""Words of one program: 16 KiB."""


@triton.jit
def _copy(source, target, sources, targets, words, TAKES: tl.constexpr, PUTS: tl.constexpr, WIDTH: tl.constexpr):
    """Row `sources[i]` (`i` itself unless it `TAKES` by index) to row `targets[i]` (likewise, `PUTS`)."""
    i = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = lane < words
    taken = tl.load(sources + i) if TAKES else i
    put = tl.load(targets + i) if PUTS else i
    tl.store(target + put * words + lane, tl.load(source + taken * words + lane, mask=mask), mask=mask)


def gather_blocks(pool: Tensor, blocks: Tensor) -> Tensor:
    """See `kernels.blocks.gather_blocks`."""
    page = as_bytes(pool)
    staged = torch.empty((len(blocks), page.shape[1]), dtype=torch.uint8, device=pool.device)
    _launch(page, staged, blocks, None)
    return staged


def scatter_blocks(pool: Tensor, blocks: Tensor, staged: Tensor) -> None:
    """See `kernels.blocks.scatter_blocks`."""
    _launch(staged, as_bytes(pool), None, blocks)


def copy_blocks(pool: Tensor, sources: Tensor, targets: Tensor) -> None:
    """See `kernels.blocks.copy_blocks`."""
    _launch(as_bytes(pool), as_bytes(pool), sources, targets)


def _launch(source: Tensor, target: Tensor, sources: Tensor | None, targets: Tensor | None) -> None:
    index = sources if sources is not None else targets
    if index is None or not len(index):
        return
    words = source.shape[1] // 4
    _copy[(len(index), triton.cdiv(words, WIDTH))](
        source.view(torch.int32),
        target.view(torch.int32),
        index if sources is None else sources,
        index if targets is None else targets,
        words,
        TAKES=sources is not None,
        PUTS=targets is not None,
        WIDTH=WIDTH,
        num_warps=8,
    )
