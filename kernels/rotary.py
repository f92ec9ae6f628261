"""Rotary position embedding applied to queries and keys."""

from __future__ import annotations

from torch import Tensor


def apply_rotary_(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs `(i, i + head_dim / 2)` of every head (RoFormer, arXiv 2104.09864, in Llama's half layout), in
    place.

    `x` is `[tokens, heads, head_dim]`; `cos` and `sin` are `[tokens, 1, head_dim]`, `sin` with its first half negated.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return x.mul_(cos).addcmul_(swapped, sin)
