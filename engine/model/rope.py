"""Rotary position embedding: the angle of every position, for the scalings that `RopeConfig` names.

The frequencies are those of transformers' `modeling_rope_utils`, with one difference by design. "dynamic" (NTK by
length) there depends on the length of the whole sequence at the time of the call. Here the frequencies of position
`p` are those of a sequence of length `p + 1`, so that the key written for a token depends on nothing after it; a
block's bytes could not be named by its content otherwise. For prompts up to `max_position_embeddings` both agree,
however far decoding goes on; the prompt of a longer one is rotated differently.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.model.config import RopeConfig

TABLE_POSITIONS = 8192
"""Whose angles are kept on a CPU, 1 KiB each where heads have 128 dimensions: looked up, they cost a sixth."""


class RotaryEmbedding:
    """`cos` and `sin` of a step's positions."""

    def __init__(self, rope: RopeConfig, head_dim: int, device: torch.device) -> None:
        self.rope = rope
        self.head_dim = head_dim
        self.inv_freq = inverse_frequencies(rope, head_dim).to(device)
        self.scale = attention_scale(rope)
        self._table: Tensor | None = None
        if device.type == "cpu":
            self._table = self._cos_sin(torch.arange(min(TABLE_POSITIONS, rope.max_context)))

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`[tokens]` positions to cos and sin, each `[tokens, 1, head_dim]`.

        The first half of `sin` is negated: rotating is then `x * cos + swap_halves(x) * sin`.
        """
        both = self._look_up(positions)
        if both is None:
            both = self._cos_sin(positions)
        cos, sin = both.to(dtype)[:, :, None]
        return cos, sin

    def _look_up(self, positions: Tensor) -> Tensor | None:
        if self._table is None:
            return None
        lowest, highest = positions.aminmax()
        inside = int(lowest) >= 0 and int(highest) < self._table.shape[1]
        return self._table.index_select(1, positions) if inside else None

    def _cos_sin(self, positions: Tensor) -> Tensor:
        """`[2, tokens, head_dim]` float32."""
        angles = positions.to(torch.float32)[:, None] * self._frequencies(positions)
        cos, sin = angles.cos() * self.scale, angles.sin() * self.scale
        return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)))

    def _frequencies(self, positions: Tensor) -> Tensor:
        """`[head_dim / 2]`, or `[tokens, head_dim / 2]` where they depend on the position."""
        if self.rope.type != "dynamic":
            return self.inv_freq
        rope, dim = self.rope, self.head_dim
        length = (positions + 1).clamp(min=rope.max_positions).to(torch.float32)[:, None]
        stretch = (rope.factor * length / rope.max_positions) - (rope.factor - 1)
        exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
        return 1.0 / (rope.theta * stretch ** _ntk_exponent(dim)) ** exponents


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """`[head_dim / 2]` float32, in radians per position; for "dynamic" those of an unstretched sequence."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope.type == "linear":
        return 1.0 / powers / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, 1.0 / powers)
    if rope.type == "yarn":
        return _yarn(rope, powers, head_dim)
    return 1.0 / powers


def attention_scale(rope: RopeConfig) -> float:
    """What cos and sin are multiplied with (YaRN, arXiv 2309.00071, section 3.4)."""
    if rope.type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return _mscale(rope.factor, rope.mscale) / _mscale(rope.factor, rope.mscale_all_dim)
    return _mscale(rope.factor, 1.0)


def _ntk_exponent(dim: int) -> float:
    return dim / (dim - 2) if dim > 2 else 1.0


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(rope: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Long wavelengths are divided by the factor, short ones kept, those between interpolated."""
    wavelength = 2 * math.pi / inv_freq
    low, high = rope.low_freq_factor, rope.high_freq_factor
    smooth = (rope.original_max_positions / wavelength - low) / (high - low)
    between = (1 - smooth) * inv_freq / rope.factor + smooth * inv_freq
    scaled = torch.where(wavelength > rope.original_max_positions / low, inv_freq / rope.factor, between)
    return torch.where(wavelength < rope.original_max_positions / high, inv_freq, scaled)


def _yarn(rope: RopeConfig, powers: Tensor, dim: int) -> Tensor:
    """Interpolates the dimensions that turn seldom within the original length and keeps those that turn often."""

    def dimension(rotations: float) -> float:
        turns = rope.original_max_positions / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low if high != low else 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    keep = 1 - ramp
    return (1 / (rope.factor * powers)) * (1 - keep) + (1 / powers) * keep
