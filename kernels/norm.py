"""Root-mean-square normalisation."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / rms(x) * weight` over the last dimension (arXiv 1910.07467), with the sum of squares in float32.

    `x` is `[..., dim]`; `weight` is `[dim]` or broadcasts over `x`'s last dimensions. Returns `x`'s shape and dtype.
    """
    return rms_norm_with(x, weight, torch.full((), eps, device=x.device))


def rms_norm_with(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """`rms_norm` for who has `eps` as a float32 tensor: one operator less."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    inverse = torch.addcmul(eps, norm, norm, value=1.0 / x.shape[-1]).rsqrt_()
    return (x * inverse.to(x.dtype)).mul_(weight)


def rms_norm_(x: Tensor, weight: Tensor, eps: float) -> None:
    """`rms_norm` in place."""
    x.copy_(rms_norm(x, weight, eps))
