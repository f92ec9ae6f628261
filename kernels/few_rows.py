"""Products of one or two rows with bfloat16 weights on a CPU.

Such a product only reads its weights. FBGEMM, which torch brings for x86, keeps them as float16, multiplies in float32
and reads a fifth to a half faster than oneDNN does, nine tenths of what memory gives where weights are large.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX_ROWS = 2
"""oneDNN reads as fast for three."""
MAX_BYTES = 64 << 20
"""Of weights that are kept a second time: those of larger ones would cost more memory than one row's speed is worth."""
LARGEST = torch.finfo(torch.float16).max
MIN_RMS = 2.0**-13
"""float16 keeps eight bits of what is not below 2^-17 and is at most 2^-25 wrong below that: 2^-12 of such a root mean
square, where bfloat16 itself is 2^-9 wrong."""


class FewRowsLinear(torch.nn.Module):
    """`x @ weight.T + bias` in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.max_rows = MAX_ROWS
        self.packed = torch.ops.quantized.linear_prepack_fp16(
            weight.float(), None if bias is None else bias.float().contiguous()
        )

    def forward(self, x: Tensor) -> Tensor:
        """bfloat16 `[rows, in]` to float32 `[rows, out]`."""
        y: Tensor = torch.ops.quantized.linear_dynamic_fp16(x.float(), self.packed)
        return y


def make_few_rows_linear(weight: Tensor, bias: Tensor | None) -> FewRowsLinear | None:
    """None where it would be no faster, not worth its memory, or not as exact as `weight` `[out, in]` is."""
    if weight.dtype != torch.bfloat16 or weight.nbytes > MAX_BYTES:
        return None
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        return None
    rms = float(torch.linalg.vector_norm(weight, dtype=torch.float32)) / weight.numel() ** 0.5
    largest = max(abs(float(edge)) for edge in weight.aminmax())
    return FewRowsLinear(weight, bias) if rms >= MIN_RMS and largest <= LARGEST else None
