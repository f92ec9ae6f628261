"""The Triton kernels as one implementation of the operators. Matrix products are left to torch, that is to cuBLAS."""

from __future__ import annotations

from torch import Tensor

from kernels.linear import DenseGatedLinear, GatedLinear, make_linear
from kernels.operators import Operators, StaticOperators
from kernels.triton.activation import silu_and_mul
from kernels.triton.attention import paged_attention
from kernels.triton.metadata import PagedMetadata, metadata_builder, static_metadata_builder
from kernels.triton.norm import rms_norm, rms_norm_
from kernels.triton.rotary import rotate_and_write
from kernels.triton.sampling import draw, draw_packed, pack_draws


def make_gated_linear(gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None) -> GatedLinear:
    """See `kernels.linear.make_gated_linear`."""
    return DenseGatedLinear(gate, up, gate_bias, up_bias, silu_and_mul)


TRITON: Operators[PagedMetadata] = Operators(
    metadata_builder=metadata_builder,
    make_linear=make_linear,
    make_gated_linear=make_gated_linear,
    rms_norm=rms_norm,
    rms_norm_=rms_norm_,
    rotate_and_write=rotate_and_write,
    paged_attention=paged_attention,
    draw=draw,
    static=StaticOperators(
        metadata_builder=static_metadata_builder,
        pack_draws=pack_draws,
        draw=draw_packed,
    ),
)
