"""The gated activation of the feed-forward layers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WIDTH = 1024
"""Elements of one program."""


@triton.jit
def _silu_and_mul(gate_up, out, dim, WIDTH: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    mask = lane < dim
    gate = tl.load(gate_up + token * 2 * dim + lane, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up + token * 2 * dim + dim + lane, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + token * dim + lane, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """See `kernels.activation.silu_and_mul`."""
    tokens, both = gate_up.shape
    dim = both // 2
    out = torch.empty((tokens, dim), dtype=gate_up.dtype, device=gate_up.device)
    _silu_and_mul[(tokens, triton.cdiv(dim, WIDTH))](gate_up, out, dim, WIDTH=WIDTH, num_warps=4)
    return out
