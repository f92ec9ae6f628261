"""The parts of a decoder layer. Shapes are `[tokens, dim]`: a step's tokens stand one after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.model.config import ModelConfig
from kernels.linear import GatedLinear, Linear
from kernels.operators import Metadata, Operators


@dataclass(frozen=True, slots=True)
class Step:
    """What every layer of one forward pass needs besides the hidden states."""

    pool: Tensor
    """`[blocks, layers, 2, kv_heads, block_tokens, head_dim]`."""
    metadata: Metadata
    cos: Tensor
    sin: Tensor
    """`[tokens, 1, head_dim]` both; see `RotaryEmbedding`."""


@dataclass(frozen=True, slots=True)
class RmsNorm:
    weight: Tensor
    eps: float
    ops: Operators[Any]

    def __call__(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps)

    def in_place(self, x: Tensor) -> None:
        self.ops.rms_norm_(x, self.weight, self.eps)


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention with one fused projection: the query heads, then the key heads, then the value heads."""

    layer: int
    config: ModelConfig
    qkv: Linear
    output: Linear
    qk_norm: RmsNorm | None
    """Over each query and key head; the weight is `[heads + kv_heads, head_dim]`."""
    ops: Operators[Any]

    def __call__(self, x: Tensor, residual: Tensor, step: Step) -> Tensor:
        config = self.config
        qkv = self.qkv(x).view(len(x), -1, config.head_dim)
        if self.qk_norm is not None:
            self.qk_norm.in_place(qkv[:, : config.num_heads + config.num_kv_heads])
        queries = self.ops.rotate_and_write(qkv, step.cos, step.sin, step.pool, self.layer, step.metadata)
        window = config.windows[self.layer]
        mixed = self.ops.paged_attention(queries, step.pool, self.layer, step.metadata, window)
        return self.output(mixed.view(len(x), -1), residual)


@dataclass(frozen=True, slots=True)
class FeedForward:
    """SwiGLU."""

    gate_up: GatedLinear
    down: Linear

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.down(self.gate_up(x), residual)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    attention_norm: RmsNorm
    attention: Attention
    feed_forward_norm: RmsNorm
    feed_forward: FeedForward

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        x = self.attention(self.attention_norm(x), x, step)
        return self.feed_forward(self.feed_forward_norm(x), x)
