"""Products of one or two rows with weights in float16: as exact as those with bfloat16 ones, or not made."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels import few_rows
from kernels.dispatch import operators
from kernels.few_rows import MIN_RMS, make_few_rows_linear
from kernels.linear import PackedGatedLinear, PackedLinear, can_pack

pytestmark = pytest.mark.skipif(
    "fbgemm" not in torch.backends.quantized.supported_engines or not can_pack(torch.device("cpu"), torch.bfloat16),
    reason="FBGEMM is for x86, oneDNN's bfloat16 for some of them",
)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).bfloat16()


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("scale", [1.0, 2 * MIN_RMS, 1e4])
def test_it_is_the_product_of_the_bfloat16_weights(rows: int, biased: bool, scale: float) -> None:
    weight, x, bias = random(40, 64) * scale, random(rows, 64), random(40) if biased else None
    linear = make_few_rows_linear(weight, bias)
    assert linear is not None
    wanted = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    error = (linear(x).double() - wanted).norm() / wanted.norm()
    assert error < 2.0**-11  # a quarter of bfloat16's own


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param(random(8, 8).float(), id="float32, which float16 cannot hold"),
        pytest.param(random(8, 8) * (MIN_RMS / 4), id="so small that float16 loses bits"),
        pytest.param(random(8, 8) + torch.full((8, 8), 7e4).bfloat16(), id="more than float16's largest"),
        pytest.param(torch.full((8, 8), -7e4).bfloat16(), id="less than its least"),
        pytest.param(torch.full((8, 8), torch.nan).bfloat16(), id="not a number"),
    ],
)
def test_weights_that_float16_does_not_hold_are_left_to_others(weight: Tensor) -> None:
    assert make_few_rows_linear(weight, None) is None
    if not weight.isnan().any():
        x = random(1, 8).to(weight.dtype)
        torch.testing.assert_close(PackedLinear(weight, None)(x), functional.linear(x, weight), atol=0.05, rtol=0.05)


def test_large_weights_are_kept_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random(24, 16), random(1, 16)
    assert make_few_rows_linear(weight, None) is not None
    monkeypatch.setattr(few_rows, "MAX_BYTES", weight.nbytes - 1)
    layer = PackedLinear(weight, None)
    assert layer.few_rows is None
    torch.testing.assert_close(layer(x), functional.linear(x, weight), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("roomy", [True, False])
def test_weights_are_kept_twice_only_where_there_is_room(roomy: bool) -> None:
    ops = operators(torch.device("cpu"), torch.bfloat16, roomy=roomy)
    linear, gated = (
        ops.make_linear(random(24, 16), None),
        ops.make_gated_linear(random(24, 16), random(24, 16), None, None),
    )
    assert isinstance(linear, PackedLinear)
    assert isinstance(gated, PackedGatedLinear)
    assert (linear.few_rows is not None, gated.few_rows is not None) == (roomy, roomy)


def test_a_row_is_the_same_alone_and_beside_another() -> None:
    x = random(2, 64)
    linear = PackedLinear(random(40, 64), None)
    gated = PackedGatedLinear(random(40, 64), random(41, 64)[1:], None, None)
    for layer in (linear, gated):
        torch.testing.assert_close(layer(x)[:1], layer(x[:1]), atol=0, rtol=2.0**-7)
