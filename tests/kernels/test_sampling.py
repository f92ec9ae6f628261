"""The Triton draw against the torch one, row by row."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from engine.sampler import uniform
from kernels import sampling
from kernels.sampling import Draws
from kernels.triton import sampling as triton_sampling
from tests.triton_interpreter import DEVICE

TOP_K, TOP_P, MIN_P = (0, 1, 7), (1.0, 0.9, 0.2), (0.0, 0.3)
MIXES = [(0.0, 0, 1.0, 0.0), *((0.7, *rest) for rest in product(TOP_K, TOP_P, MIN_P))]


def draws(mixes: list[tuple[float, int, float, float]], uniforms: list[float] | None = None) -> Draws:
    temperature, top_k, top_p, min_p = zip(*mixes, strict=True)
    return Draws(temperature, top_k, top_p, min_p, uniforms or [uniform(seed, 0, 9) for seed in range(len(mixes))])


def random_logits(rows: int, vocab: int, seed: int = 0) -> Tensor:
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.to(DEVICE)


def check(logits: Tensor, how: Draws) -> None:
    assert triton_sampling.draw(logits, how).tolist() == sampling.draw(logits, how).tolist()


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small vocabulary has several."""
    monkeypatch.setattr(triton_sampling, "LANES", 64)


def test_every_mix_of_params_draws_the_same_token() -> None:
    check(random_logits(len(MIXES), 200), draws(MIXES))


@pytest.mark.parametrize("number", [0.0, 1.0 - 2.0**-53])
def test_the_smallest_and_the_largest_random_number(number: float) -> None:
    mixes = MIXES[1:10]
    check(random_logits(len(mixes), 130), draws(mixes, [number] * len(mixes)))


def test_equal_logits_are_settled_by_id() -> None:
    mixes = [(1.0, 0, 0.5, 0.0), (1.0, 2, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (1.0, 3, 0.3, 0.0)] * 2
    check(torch.zeros(len(mixes), 72, device=DEVICE), draws(mixes))
    rounded = random_logits(len(mixes), 200).round()
    rounded[:, 7] = -0.0
    check(rounded, draws(mixes))


def test_more_than_a_lane_s_worth_of_top_k_and_all_of_the_vocabulary() -> None:
    mixes = [(1.0, 100, 1.0, 0.0), (1.0, 100, 0.8, 0.0), (1.0, 200, 1.0, 0.0), (1.0, 10**6, 0.5, 0.1)]
    check(random_logits(len(mixes), 200), draws(mixes))


def test_masked_tokens_are_never_drawn() -> None:
    mixes = [(1.0, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (2.0, 0, 0.99, 0.0), (0.0, 0, 1.0, 0.0)]
    logits = random_logits(len(mixes), 130)
    logits[:, [*range(60), *range(62, 130)]] = float("-inf")
    check(logits, draws(mixes, [1.0 - 2.0**-53] * len(mixes)))


@pytest.mark.parametrize("temperature", [1e-300, 1e-3, 1e3])
def test_extreme_temperatures(temperature: float) -> None:
    mixes = [(temperature, 0, 1.0, 0.0), (temperature, 0, 0.9, 0.0), (temperature, 3, 1.0, 0.0)]
    check(random_logits(len(mixes), 100), draws(mixes))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_not_a_number_stays_inside_the_vocabulary() -> None:
    mixes = [(1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0), (1.0, 3, 0.5, 0.1)]
    logits = torch.full((len(mixes), 70), float("nan"), device=DEVICE)
    assert all(0 <= token < 70 for token in triton_sampling.draw(logits, draws(mixes)).tolist())


def test_a_vocabulary_of_128k_in_tiles_as_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    mixes = [(0.7, 0, 0.95, 0.0), (1.0, 50, 1.0, 0.0), (1.0, 0, 1.0, 0.0), (0.0, 0, 1.0, 0.0)]
    check(random_logits(len(mixes), 128_256), draws(mixes))
