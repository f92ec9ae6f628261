"""Blocks of one number format in pages of another: every bit pattern against plain torch, nothing beside the part."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.conversion import numbers_of, write_part

CPU = torch.device("cpu")
FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn]
WORDS = {4: torch.int32, 2: torch.int16, 1: torch.uint8}
SHAPE = (2, 2, 4, 16, 256)
"""As many numbers as two bytes have patterns."""
WHOLE = (slice(0, 4), slice(0, 16))


def every(dtype: torch.dtype) -> Tensor:
    """All bit patterns of `dtype`, or for float32 all upper halves, each with random lower bits; NaN and infinity are
    among them."""
    numbers = torch.arange(1 << 16).view(SHAPE)
    if dtype.itemsize == 4:
        lower = torch.randint(0, 1 << 16, SHAPE, generator=torch.Generator().manual_seed(3))
        numbers = (numbers << 16 | lower) - (1 << 32) * (numbers >> 15)
    elif dtype.itemsize == 2:
        numbers -= (1 << 16) * (numbers >> 15)
    return numbers.remainder(256).to(torch.uint8).view(dtype) if dtype.itemsize == 1 else as_dtype(numbers, dtype)


def as_dtype(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    return numbers.to(WORDS[dtype.itemsize]).view(dtype)


def payload(numbers: Tensor) -> memoryview:
    return memoryview(numbers.contiguous().view(torch.uint8).numpy().tobytes()).toreadonly()


def converted(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """What the pool of a worker of `dtype` holds after taking `numbers` in."""
    pool = torch.zeros((3, *SHAPE), dtype=dtype)
    write_part(pool, 1, WHOLE, numbers_of(payload(numbers), SHAPE, numbers.dtype, CPU), WHOLE)
    assert not pool[0].float().any()
    assert not pool[2].float().any()
    return pool[1]


def reference(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Every format's numbers are float32 numbers, so there is one rounding."""
    limit = torch.finfo(dtype).max
    narrower = limit < torch.finfo(numbers.dtype).max
    return (numbers.float().clamp(-limit, limit) if narrower else numbers.float()).to(dtype)


@pytest.mark.parametrize(("theirs", "own"), list(product(FLOATS, FLOATS)))
def test_every_number_is_what_torch_makes_of_it(theirs: torch.dtype, own: torch.dtype) -> None:
    numbers = every(theirs)
    torch.testing.assert_close(
        converted(numbers, own).float(), reference(numbers, own).float(), rtol=0, atol=0, equal_nan=True
    )


@pytest.mark.parametrize(
    ("theirs", "own"), [(a, b) for a, b in product(FLOATS, FLOATS) if torch.finfo(a).max > torch.finfo(b).max]
)
def test_what_is_too_large_becomes_the_largest_finite_number(theirs: torch.dtype, own: torch.dtype) -> None:
    limit = torch.finfo(own).max
    numbers = torch.zeros(SHAPE)
    numbers[0, 0, 0, 0, :4] = torch.tensor([torch.finfo(theirs).max, -torch.finfo(theirs).max, np.inf, -np.inf])
    found = converted(numbers.to(theirs), own).float()
    assert found[0, 0, 0, 0, :4].tolist() == [limit, -limit, limit, -limit]


def test_float16_agrees_with_numpy() -> None:
    numbers = every(torch.float32)
    wanted = np.clip(numbers.numpy(), -65504, 65504).astype(np.float16)
    np.testing.assert_array_equal(converted(numbers, torch.float16).numpy(), wanted)


@pytest.mark.parametrize(
    ("own", "loss"),
    [(torch.float32, 0.0), (torch.bfloat16, 2**-8), (torch.float16, 2**-11), (torch.float8_e4m3fn, 2**-4)],
)
def test_the_loss_is_half_of_the_last_bit_that_remains(own: torch.dtype, loss: float) -> None:
    numbers = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) * 400 + 1
    assert float(((converted(numbers, own).float() - numbers) / numbers).abs().max()) <= loss


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16, torch.float16])
def test_what_was_widened_comes_back_as_it_was(wide: torch.dtype) -> None:
    narrow = torch.float8_e4m3fn if wide != torch.float32 else torch.bfloat16
    numbers = every(narrow)
    back = converted(converted(numbers, wide), narrow)
    finite = numbers.float().isfinite()
    assert torch.equal(back.float()[finite], numbers.float()[finite])


def test_only_the_part_is_written() -> None:
    numbers = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    pool = torch.full((2, 2, 2, 2, 4, 256), 7.0, dtype=torch.float32)
    write_part(pool, 0, (slice(1, 2), slice(0, 3)), numbers, (slice(3, 4), slice(13, 16)))
    assert torch.equal(pool[0, :, :, 1, :3], numbers[:, :, 3, 13:16])
    pool[0, :, :, 1, :3] = 7.0
    assert bool((pool == 7.0).all())


def test_whole_numbers_are_copied() -> None:
    """The simulated model's bytes have no format."""
    numbers = torch.arange(8, dtype=torch.uint8).view(1, 2, 1, 2, 2)
    pool = torch.zeros((1, 1, 2, 1, 2, 2), dtype=torch.uint8)
    write_part(pool, 0, (slice(0, 1), slice(0, 2)), numbers, (slice(0, 1), slice(0, 2)))
    assert torch.equal(pool[0], numbers)


@pytest.mark.parametrize("size", [0, 1, 1 << 17, (1 << 18) + 4])
def test_bytes_of_another_size_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="another size"):
        numbers_of(bytes(size), SHAPE, torch.float32, CPU)
