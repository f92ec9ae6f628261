"""Root-mean-square normalisation, alone and joined with the addition before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WARP_ELEMENTS = 1024
"""Of one program's tile, per warp."""


@triton.jit
def _rms_norm(
    x,
    residual,
    weight,
    total,
    out,
    x_stride,
    out_stride,
    eps,
    HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    ADDS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head, lane = tl.arange(0, PADDED_HEADS), tl.arange(0, PADDED_DIM)
    place = head[:, None] * DIM + lane[None, :]
    mask = (head < HEADS)[:, None] & (lane < DIM)[None, :]
    packed = token * (HEADS * DIM) + place
    values = tl.load(x + token * x_stride + place, mask=mask, other=0.0).to(tl.float32)
    if ADDS:
        values += tl.load(residual + packed, mask=mask, other=0.0).to(tl.float32)
        tl.store(total + packed, values.to(total.dtype.element_ty), mask=mask)
    inverse = tl.rsqrt(tl.sum(values * values, 1) / DIM + eps)
    scale = tl.load(weight + place, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * out_stride + place, (values * inverse[:, None] * scale).to(out.dtype.element_ty), mask=mask)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.norm.rms_norm`; `weight` has the shape of `x` without its first dimension."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, x, weight, out, out, eps, adds=False)
    return out


def rms_norm_(x: Tensor, weight: Tensor, eps: float) -> None:
    """`rms_norm` in place."""
    _launch(x, x, weight, x, x, eps, adds=False)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`x + residual`, both `[tokens, dim]`, and its `kernels.norm.rms_norm`, the sum never leaving the registers."""
    total, normed = torch.empty_like(residual), torch.empty_like(residual)
    _launch(x, residual, weight, total, normed, eps, adds=True)
    return total, normed


def _launch(x: Tensor, residual: Tensor, weight: Tensor, total: Tensor, out: Tensor, eps: float, adds: bool) -> None:
    dim = x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    padded_heads, padded_dim = triton.next_power_of_2(heads), triton.next_power_of_2(dim)
    _rms_norm[(len(x),)](
        x,
        residual,
        weight,
        total,
        out,
        x.stride(0),
        out.stride(0),
        eps,
        HEADS=heads,
        PADDED_HEADS=padded_heads,
        DIM=dim,
        PADDED_DIM=padded_dim,
        ADDS=adds,
        num_warps=min(16, max(1, padded_heads * padded_dim // WARP_ELEMENTS)),
    )
