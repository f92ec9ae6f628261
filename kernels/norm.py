"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dimension (arXiv 1910.07467), with the sum of squares in float32.

    `x` is `[..., dim]`; `weight` is `[dim]` or broadcasts over `x`'s last dimensions. Returns `x`'s shape and dtype.
    """
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = norm.square_().mul_(1.0 / x.shape[-1]).add_(eps).rsqrt_()
    return (x * inverse.to(x.dtype)).mul_(weight)
