"""Single operators against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from kernels import blocks
from kernels.activation import silu_and_mul
from kernels.dispatch import operators
from kernels.linear import (
    DenseGatedLinear,
    DenseLinear,
    PackedGatedLinear,
    PackedLinear,
    can_pack,
    make_linear,
)
from kernels.norm import rms_norm
from kernels.rotary import apply_rotary_

CPU = torch.device("cpu")


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def test_rms_norm_is_its_formula() -> None:
    x, weight = random(5, 16), random(16)
    wanted = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 1e-3).double(), wanted, atol=1e-6, rtol=1e-5)


def test_rms_norm_of_large_bfloat16_does_not_overflow() -> None:
    x = torch.full((1, 8), 1e18, dtype=torch.bfloat16)
    torch.testing.assert_close(rms_norm(x, torch.ones(8, dtype=torch.bfloat16), 1e-6), torch.ones_like(x))


def test_rotary_turns_each_pair_by_its_angle() -> None:
    x, angle = random(3, 2, 8), random(3, 1, 4)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.view_as_complex(torch.stack((x[..., :4], x[..., 4:]), -1)) * torch.polar(
        torch.ones_like(angle), angle
    )
    out = apply_rotary_(x.clone(), torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))
    torch.testing.assert_close(out, torch.cat((turned.real, turned.imag), -1))


def test_silu_and_mul_gates_the_second_half() -> None:
    x = random(3, 10)
    torch.testing.assert_close(silu_and_mul(x), x[:, :5] * torch.sigmoid(x[:, :5]) * x[:, 5:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 70])
@pytest.mark.parametrize("biased", [False, True])
def test_packed_linear_equals_dense(dtype: torch.dtype, rows: int, biased: bool) -> None:
    if not can_pack(CPU, dtype):
        pytest.skip("oneDNN does not multiply this dtype here")
    weight, x, residual = (
        random(24, 16, dtype=dtype),
        random(rows, 16, dtype=dtype),
        random(rows, 24, dtype=dtype),
    )
    bias = random(24, dtype=dtype) if biased else None
    packed, exact = (
        PackedLinear(weight, bias),
        DenseLinear(weight.double(), None if bias is None else bias.double()),
    )
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    for extra in (None, residual):
        wanted = exact(x.double(), None if extra is None else extra.double())
        torch.testing.assert_close(packed(x, extra).double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layer", [DenseGatedLinear, PackedGatedLinear])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 9])
@pytest.mark.parametrize("biased", [False, True])
def test_gated_linear_is_its_formula(
    layer: type[DenseGatedLinear] | type[PackedGatedLinear], dtype: torch.dtype, rows: int, biased: bool
) -> None:
    if layer is PackedGatedLinear and not can_pack(CPU, dtype):
        pytest.skip("oneDNN does not multiply this dtype here")
    gate, up, x = random(24, 16, dtype=dtype), random(25, 16, dtype=dtype)[1:], random(rows, 16, dtype=dtype)
    gate_bias, up_bias = (random(24, dtype=dtype), random(25, dtype=dtype)[1:]) if biased else (None, None)
    wanted = functional.silu(functional.linear(x, gate, gate_bias)) * functional.linear(x, up, up_bias)
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(layer(gate, up, gate_bias, up_bias)(x), wanted, atol=tolerance, rtol=tolerance)


def test_dtypes_that_cannot_be_packed_stay_dense() -> None:
    layer = make_linear(random(4, 4, dtype=torch.float64))
    assert isinstance(layer, DenseLinear)
    x = random(2, 4, dtype=torch.float64)
    torch.testing.assert_close(layer(x, x.clone()), functional.linear(x, layer.weight) + x)


def test_every_device_has_operators() -> None:
    assert operators(CPU, torch.float32).rms_norm(random(1, 4), torch.ones(4), 1e-6).shape == (1, 4)


def pool(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return random(6, 3, 2, 2, 4, 8, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_block_survives_the_way_through_bytes(dtype: torch.dtype) -> None:
    source, target = pool(dtype), torch.zeros_like(pool(dtype))
    payload = blocks.read_block(source, 2, 4)
    blocks.write_block(target, 5, memoryview(payload))
    assert len(payload) == source[0].numel() * source.element_size()
    assert torch.equal(target[5], source[2])
    assert not target[:5].any()


def test_reading_a_partly_filled_block_hides_the_rest() -> None:
    source = pool(torch.float32)
    page = torch.frombuffer(bytearray(blocks.read_block(source, 1, 3)), dtype=torch.float32).view(source[1].shape)
    assert torch.equal(page[..., :3, :], source[1][..., :3, :])
    assert not page[..., 3:, :].any()
    assert torch.equal(source, pool(torch.float32))


def test_a_payload_of_another_size_is_refused() -> None:
    target = pool()
    with pytest.raises(ValueError, match="a block is"):
        blocks.write_block(target, 0, b"\0" * 7)
    assert torch.equal(target, pool())


def test_gather_scatter_and_copy_move_whole_blocks() -> None:
    source, target = pool(), torch.zeros_like(pool())
    staged = blocks.gather_blocks(source, torch.tensor([4, 1]))
    blocks.scatter_blocks(target, torch.tensor([0, 3]), staged)
    blocks.copy_blocks(target, torch.tensor([3]), torch.tensor([5]))
    assert torch.equal(target[[0, 3, 5]], source[[4, 1, 1]])
    assert not target[[1, 2, 4]].any()
