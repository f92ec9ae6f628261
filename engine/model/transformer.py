"""The decoder of the Llama family: Llama 2 and 3, Mistral, Qwen2 and Qwen3 differ only in `ModelConfig`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from engine.model.config import ModelConfig
from engine.model.layers import Attention, DecoderLayer, FeedForward, RmsNorm, Step
from engine.model.rope import RotaryEmbedding
from engine.model.scripted import script
from engine.model.weights import Checkpoint
from kernels import few_rows
from kernels.attention import AttentionMetadata
from kernels.dispatch import operators
from kernels.linear import Linear, PackedGatedLinear, PackedLinear
from kernels.operators import Metadata, Operators
from kernels.products import limits


class Decoder:
    """Token ids in, logits out; keys and values go to the pages that the metadata names."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        device: torch.device,
        dtype: torch.dtype,
        *,
        roomy: bool = True,
    ) -> None:
        """Reads the weights; with `roomy`, weights may be kept twice. Raises `StartupError` when one is missing or has
        another shape."""
        self.dtype = dtype
        self.ops = operators(device, dtype, roomy=roomy)
        build = _Builder(config, checkpoint, device, dtype, self.ops)
        self.embedding = build.tensor("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.layers = [build.layer(i) for i in range(config.num_layers)]
        self.norm = build.norm("model.norm.weight")
        self.head = build.head(self.embedding)
        self.rotary = RotaryEmbedding(config.rope, config.head_dim, device)
        self.scripted = script(self.layers, self.norm, limits(device, dtype))
        self.float32_rows = few_rows.MAX_ROWS if all(map(_takes_float32, self.layers)) else 0
        """Steps of up to so many tokens are float32 between products, which are so too: rounding is what would cost."""

    def forward(self, tokens: Tensor, pool: Tensor, metadata: Metadata) -> Tensor:
        """`[tokens]` int64 to hidden states `[tokens, hidden]`, after the last norm."""
        x = functional.embedding(tokens, self.embedding)
        if len(tokens) <= self.float32_rows:
            x = x.float()
        cos, sin = self.rotary(metadata.positions, x.dtype)
        if self.scripted is not None and isinstance(metadata, AttentionMetadata):
            return self.scripted(x, pool, cos, sin, metadata)
        step = Step(pool, metadata, cos, sin)
        for layer in self.layers:
            x = layer(x, step)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, hidden]` from `forward` to `[n, vocab]` float32."""
        return self.head(hidden).to(torch.float32)


def _takes_float32(layer: DecoderLayer) -> bool:
    attention, feed_forward = layer.attention, layer.feed_forward
    linears = (attention.qkv, attention.output, feed_forward.gate_up, feed_forward.down)
    return all(isinstance(one, PackedLinear | PackedGatedLinear) and one.few_rows is not None for one in linears)


@dataclass(frozen=True, slots=True)
class _Builder:
    """Makes layers of a checkpoint's tensors."""

    config: ModelConfig
    checkpoint: Checkpoint
    device: torch.device
    dtype: torch.dtype
    ops: Operators[Any]

    def tensor(self, name: str, *shape: int) -> Tensor:
        """A copy, so that nothing refers to the mapped file once loading is done."""
        return self.checkpoint.load(name, *shape).to(self.device, self.dtype, copy=True)

    def norm(self, name: str) -> RmsNorm:
        return RmsNorm(self.tensor(name, self.config.hidden_size), self.config.norm_eps, self.ops)

    def linear(self, prefix: str, outputs: dict[str, int], inputs: int, bias: bool) -> Linear:
        """One layer that holds the projections `outputs` (name to width) one after another."""
        weights = [self.tensor(f"{prefix}{name}.weight", width, inputs) for name, width in outputs.items()]
        biases = [self.tensor(f"{prefix}{name}.bias", width) for name, width in outputs.items() if bias]
        return self.ops.make_linear(torch.cat(weights), torch.cat(biases) if bias else None)

    def head(self, embedding: Tensor) -> Linear:
        if self.config.tie_word_embeddings:
            return self.ops.make_linear(embedding, None)
        return self.linear("", {"lm_head": self.config.vocab_size}, self.config.hidden_size, False)

    def layer(self, index: int) -> DecoderLayer:
        prefix = f"model.layers.{index}"
        return DecoderLayer(
            attention_norm=self.norm(f"{prefix}.input_layernorm.weight"),
            attention=self.attention(f"{prefix}.self_attn.", index),
            feed_forward_norm=self.norm(f"{prefix}.post_attention_layernorm.weight"),
            feed_forward=self.feed_forward(f"{prefix}.mlp."),
        )

    def attention(self, prefix: str, index: int) -> Attention:
        config = self.config
        queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        widths = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
        return Attention(
            layer=index,
            config=config,
            qkv=self.linear(prefix, widths, config.hidden_size, config.qkv_bias),
            output=self.linear(prefix, {"o_proj": config.hidden_size}, queries, config.output_bias),
            qk_norm=self.qk_norm(prefix) if config.qk_norm else None,
            ops=self.ops,
        )

    def qk_norm(self, prefix: str) -> RmsNorm:
        config = self.config
        query = self.tensor(f"{prefix}q_norm.weight", config.head_dim).expand(config.num_heads, -1)
        key = self.tensor(f"{prefix}k_norm.weight", config.head_dim).expand(config.num_kv_heads, -1)
        return RmsNorm(torch.cat((query, key)), config.norm_eps, self.ops)

    def feed_forward(self, prefix: str) -> FeedForward:
        hidden, inner, bias = self.config.hidden_size, self.config.intermediate_size, self.config.mlp_bias
        gate, up = (self.tensor(f"{prefix}{name}.weight", inner, hidden) for name in ("gate_proj", "up_proj"))
        gate_bias, up_bias = (
            self.tensor(f"{prefix}{name}.bias", inner) if bias else None for name in ("gate_proj", "up_proj")
        )
        return FeedForward(
            gate_up=self.ops.make_gated_linear(gate, up, gate_bias, up_bias),
            down=self.linear(prefix, {"down_proj": hidden}, inner, bias),
        )
