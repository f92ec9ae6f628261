"""KV pages as bytes.

The pool is one contiguous tensor `[blocks, layers, 2, kv_heads, block_tokens, head_dim]` (2: keys, values), so a block
is one contiguous range of bytes whatever the number of layers.
"""

from __future__ import annotations

import math
import mmap
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor


def allocate_pool(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A pool of zeros. On a CPU the system hands its memory out page by page as it is first written, so that a large
    pool costs nothing until it is used. Raises `RuntimeError`, `OSError` or `MemoryError` when there is not enough."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def as_bytes(pool: Tensor) -> Tensor:
    """The same memory as `[blocks, block_bytes]` uint8."""
    return pool.view(pool.shape[0], -1).view(torch.uint8)


def gather_blocks(pool: Tensor, blocks: Tensor) -> Tensor:
    """Copies the pages `blocks` `[n]` int64 to a new `[n, block_bytes]` uint8 tensor on the pool's device."""
    return as_bytes(pool).index_select(0, blocks)


def scatter_blocks(pool: Tensor, blocks: Tensor, staged: Tensor) -> None:
    """Overwrites the pages `blocks` `[n]` int64 with `staged` `[n, block_bytes]` uint8."""
    as_bytes(pool).index_copy_(0, blocks, staged)


def copy_blocks(pool: Tensor, sources: Tensor, targets: Tensor) -> None:
    """Copies pages within the pool; both are `[n]` int64 and share no page."""
    pool.index_copy_(0, targets, pool.index_select(0, sources))


def read_block(pool: Tensor, block: int, valid_tokens: int) -> bytes:
    """A copy of the page's bytes, zero where a token position is not below `valid_tokens`."""
    page = pool[block]
    if valid_tokens < page.shape[-2]:
        page = page.clone()
        page[..., valid_tokens:, :] = 0
    data: bytes = page.reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
    return data


def write_block(pool: Tensor, block: int, payload: bytes | memoryview) -> None:
    """Overwrites the page. Raises `ValueError` when `payload` is not exactly one block."""
    target = as_bytes(pool)[block]
    data = np.frombuffer(payload, np.uint8)
    if len(data) != len(target):
        raise ValueError(f"a block is {len(target)} bytes, not {len(data)}")
    if pool.device.type == "cpu":
        target.numpy()[:] = data
    else:
        target.copy_(torch.from_numpy(data.copy()))
