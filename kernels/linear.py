"""Linear layers with weights in the order that the device multiplies fastest."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from kernels import few_rows
from kernels.activation import silu_and_mul

PACK_ROWS = 64
"""The number of rows that packed weights are laid out for. Layouts for 16 to 512 rows measured alike at every batch
size; one for a single row lost up to a fifth on larger batches."""
FEW_ROWS = 4
"""oneDNN reads packed weights up to half again as fast for four rows as for fewer, which are padded to four."""


class Linear(Protocol):
    """`x @ weight.T + bias`."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x` `[tokens, in]` and `residual` `[tokens, out]`, which is added, to `[tokens, out]`. Neither is looked at
        again by the caller: the result may lie where `residual` was."""


class DenseLinear:
    """Any device and dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return functional.linear(x, self.weight, self.bias)
        y = residual.addmm_(x, self.weight.t())  # the product adds it: no pass of its own over the result
        return y if self.bias is None else y.add_(self.bias)


class PackedLinear(torch.nn.Module):
    """CPU through oneDNN with prepacked weights: reads them at up to twice the speed of `functional.linear` when
    there are few rows, and adds bias and residual before rounding. `kernels.few_rows` for one or two, which may be
    float32 whatever the weights are; the result then is too."""

    def __init__(self, weight: Tensor, bias: Tensor | None, roomy: bool = True) -> None:
        super().__init__()
        self.weight = _pack(weight)
        self.bias = bias
        self.few_rows = few_rows.make_few_rows_linear(weight, bias) if roomy else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.few_rows is not None:  # noqa: SIM102 - TorchScript leaves out what follows None only so
            if x.shape[0] <= self.few_rows.max_rows:
                few: Tensor = self.few_rows(x)
                return few.to(x.dtype) if residual is None else few.add_(residual).to(residual.dtype)
        if residual is None:
            wide = _padded(x.to(self.weight.dtype))
            y: Tensor = torch.ops.mkldnn._linear_pointwise(wide, self.weight, self.bias, "none", [], "")
        else:
            y = torch.ops.mkldnn._linear_pointwise(_padded(x), _padded(residual), self.weight, self.bias, "add")
        return y[: x.shape[0]]


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
    return packed


def _padded(x: Tensor, rows: int = FEW_ROWS) -> Tensor:
    missing = rows - x.shape[0]
    return functional.pad(x, [0, 0, 0, missing]) if 0 < missing < rows else x


class GatedLinear(Protocol):
    """`silu(x @ gate.T + gate_bias) * (x @ up.T + up_bias)` (SwiGLU, arXiv 2002.05202)."""

    def __call__(self, x: Tensor) -> Tensor:
        """`[tokens, in]` to `[tokens, out]`."""


class DenseGatedLinear:
    """One product for both halves, then the activation."""

    def __init__(
        self,
        gate: Tensor,
        up: Tensor,
        gate_bias: Tensor | None,
        up_bias: Tensor | None,
        activation: Callable[[Tensor], Tensor] = silu_and_mul,
    ) -> None:
        self.both = DenseLinear(torch.cat((gate, up)), _both(gate_bias, up_bias))
        self.activation = activation

    def __call__(self, x: Tensor) -> Tensor:
        return self.activation(self.both(x))


class PackedGatedLinear(torch.nn.Module):
    """Two products with the activation applied before the results leave the cache: a tenth of a long prompt's time."""

    def __init__(
        self, gate: Tensor, up: Tensor, gate_bias: Tensor | None, up_bias: Tensor | None, roomy: bool = True
    ) -> None:
        super().__init__()
        self.gate, self.gate_bias = _pack(gate), gate_bias
        self.up, self.up_bias = _pack(up), up_bias
        self.few_rows = None
        if roomy:
            self.few_rows = few_rows.make_few_rows_linear(torch.cat((gate, up)), _both(gate_bias, up_bias))

    def forward(self, x: Tensor) -> Tensor:
        if self.few_rows is not None:  # noqa: SIM102 - as above
            if x.shape[0] <= self.few_rows.max_rows:
                return silu_and_mul(self.few_rows(x)).to(x.dtype)
        wide = _padded(x)
        gate = torch.ops.mkldnn._linear_pointwise(wide, self.gate, self.gate_bias, "swish", [], "")
        y: Tensor = torch.ops.mkldnn._linear_pointwise(wide, gate, self.up, self.up_bias, "mul")
        return y[: x.shape[0]]


def _both(gate_bias: Tensor | None, up_bias: Tensor | None) -> Tensor | None:
    return None if gate_bias is None or up_bias is None else torch.cat((gate_bias, up_bias))


@cache
def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype natively here."""
    if device.type != "cpu" or not torch._C._has_mkldnn:
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def make_linear(weight: Tensor, bias: Tensor | None = None, *, roomy: bool = True) -> Linear:
    """The fastest layer for where `weight` `[out, in]` lies; `bias` is `[out]`. `roomy`: weights may be kept twice."""
    if can_pack(weight.device, weight.dtype):
        return PackedLinear(weight, bias, roomy)
    return DenseLinear(weight, bias)


def make_gated_linear(
    gate: Tensor, up: Tensor, gate_bias: Tensor | None = None, up_bias: Tensor | None = None, *, roomy: bool = True
) -> GatedLinear:
    """The fastest layer for where `gate` and `up`, both `[out, in]`, lie; the biases are `[out]`. `roomy`: as above."""
    if can_pack(gate.device, gate.dtype):
        return PackedGatedLinear(gate, up, gate_bias, up_bias, roomy)
    return DenseGatedLinear(gate, up, gate_bias, up_bias)
