"""The gated activation of the feed-forward layers."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` (SwiGLU, arXiv 2002.05202): `[tokens, 2 * dim]`, gate first, to `[tokens, dim]`."""
    dim = gate_up.shape[-1] // 2
    return functional.silu(gate_up[..., :dim]).mul_(gate_up[..., dim:])
