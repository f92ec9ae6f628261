"""Which implementation of the operators serves a device: the only place that decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import attention, linear, norm, rotary
from kernels.attention import AttentionMetadata
from kernels.linear import GatedLinear, Linear


@dataclass(frozen=True, slots=True)
class Operators:
    """One implementation of every operator; shapes are in the docstrings of the plain torch ones."""

    make_linear: Callable[[Tensor, Tensor | None], Linear]
    make_gated_linear: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], GatedLinear]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    apply_rotary: Callable[[Tensor, Tensor, Tensor], Tensor]
    write_kv: Callable[[Tensor, int, Tensor, AttentionMetadata], None]
    paged_attention: Callable[[Tensor, Tensor, int, AttentionMetadata, int], Tensor]


TORCH = Operators(
    make_linear=linear.make_linear,
    make_gated_linear=linear.make_gated_linear,
    rms_norm=norm.rms_norm,
    apply_rotary=rotary.apply_rotary,
    write_kv=attention.write_kv,
    paged_attention=attention.paged_attention,
)


def operators(device: torch.device) -> Operators:
    """Plain torch serves every device."""
    return TORCH
