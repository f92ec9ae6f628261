"""Parts of another worker's blocks into pages of this pool, in the pool's own number format.

A number that the pool's format cannot hold becomes the largest finite one of its sign, never infinite: one infinite key
would make every later token of the sequence NaN. NaN stays NaN. Otherwise a number is rounded to the nearest, so
float32 -> bfloat16 loses 16 bits of 24, float32 -> float16 loses 13 and what is below 3e-8, and to float8_e4m3fn, which
is not scaled, 4 bits of mantissa remain of numbers up to 448 and nothing of those below 1e-3.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Slices = tuple[slice, slice]
"""Heads and tokens within a block."""


def numbers_of(payload: bytes | memoryview, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The block in `payload`, `[layers, 2, heads, block_tokens, head_dim]`. Raises `ValueError` when it is not exactly
    one of this shape."""
    # A copy: torch reads no memory that it might not write, and what arrived is read-only.
    data = torch.from_numpy(np.frombuffer(payload, np.uint8).copy())
    try:
        return data.view(dtype).view(shape).to(device)
    except RuntimeError as error:
        raise ValueError(f"a block of another size: {error}") from None


def write_part(pool: Tensor, block: int, target: Slices, numbers: Tensor, source: Slices) -> None:
    """Writes the part `source` of `numbers` to the part `target` of the page."""
    part = numbers[:, :, source[0], source[1]]
    page = pool[block, :, :, target[0], target[1]]
    if not pool.dtype.is_floating_point or torch.finfo(part.dtype).max <= torch.finfo(pool.dtype).max:
        page.copy_(part)
        return
    limit = torch.finfo(pool.dtype).max
    if pool.dtype == torch.float8_e4m3fn:  # has no infinity to recognize afterwards; its limit is exact in all others
        page.copy_(part.clamp(-limit, limit))
    else:  # in the page's format, since not every other has its limit
        page.copy_(part).clamp_(-limit, limit)
