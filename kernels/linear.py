"""Linear layers with weights in the order that the device multiplies fastest."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

PACK_ROWS = 64
"""The number of rows that packed weights are laid out for. Layouts for 16 to 512 rows measured alike at every batch
size; one for a single row lost up to a fifth on larger batches."""


class Linear(Protocol):
    """`x @ weight.T + bias`."""

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """`x` `[tokens, in]` and `residual` `[tokens, out]`, which is added, to `[tokens, out]`."""


class DenseLinear:
    """Any device and dtype."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = functional.linear(x, self.weight, self.bias)
        return y if residual is None else y.add_(residual)


class PackedLinear:
    """CPU through oneDNN with prepacked weights: reads them at up to twice the speed of `functional.linear` when
    there are few rows, and adds bias and residual before rounding."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), PACK_ROWS)
        self.bias = bias

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor
        if residual is None:
            y = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        else:
            y = torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")
        return y


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies this dtype natively here."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def make_linear(weight: Tensor, bias: Tensor | None = None) -> Linear:
    """The fastest layer for where `weight` `[out, in]` lies; `bias` is `[out]`."""
    if can_pack(weight.device, weight.dtype):
        return PackedLinear(weight, bias)
    return DenseLinear(weight, bias)
