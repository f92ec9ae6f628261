"""The Qwen3 network for training: transformers' weight names, and one step that is fast on few CPU cores.

Matrices are multiplied in `dtype`; weights, the residual stream, norms and soft-maxima are float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
QUERY_BLOCK = 256
"""Queries that attend together; all keys up to the last of them are multiplied, so a long block wastes products."""
LOGIT_ROWS = 2048
"""Positions whose logits are alive at a time: [2048, vocab] stays in the cache."""


@dataclass(frozen=True, slots=True)
class Shape:
    vocab: int = 2048
    hidden: int = 256
    intermediate: int = 640
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    theta: float = 500_000.0
    epsilon: float = 1e-6
    positions: int = 8192
    gain: float = 1.5
    """What q_norm and k_norm start from: attention that can be sharp from the beginning."""


def linear(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return F.linear(x.to(dtype), weight.to(dtype))


class Norm(nn.Module):
    def __init__(self, size: int, epsilon: float, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), gain))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """[..., size] of any dtype -> float32."""
        x = x.float()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.epsilon) * self.weight


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[..., length, head_dim] by [length, head_dim / 2]; the halves of a head are the two coordinates."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def causal_bias(length: int) -> Tensor:
    """[block, length]: 0 where a query of a row's last block may see the key, else minus infinity."""
    size = min(QUERY_BLOCK, length)
    visible = torch.arange(length) <= torch.arange(length - size, length)[:, None]
    return torch.zeros(size, length).masked_fill(~visible, -math.inf)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Causal; q is scaled. q [rows, kv_heads, group, length, dim], k and v [rows, kv_heads, length, dim] -> like q.

    PyTorch's fused attention takes four times as long on a CPU: its backward multiplies matrices slowly.
    """
    rows, kv_heads, group, length, dim = q.shape
    size = min(QUERY_BLOCK, length)
    if length % size:
        raise ValueError(f"a row of {length} tokens is not a multiple of {size}")
    blocks = length // size
    queries = (
        q.reshape(rows, kv_heads, group, blocks, size, dim)
        .permute(3, 0, 1, 2, 4, 5)
        .reshape(blocks, -1, group * size, dim)
    )
    keys, values = k.reshape(-1, length, dim), v.reshape(-1, length, dim)
    outputs = []
    for i in range(blocks):
        end = (i + 1) * size
        scores = torch.bmm(queries[i], keys[:, :end].transpose(1, 2)).view(-1, group, size, end)
        weights = (scores.float() + bias[:, length - end :]).softmax(-1).to(v.dtype)
        outputs.append(torch.bmm(weights.view(-1, group * size, end), values[:, :end]))
    mixed = torch.stack(outputs).view(blocks, rows, kv_heads, group, size, dim)
    return mixed.permute(1, 2, 3, 0, 4, 5).reshape(q.shape)


def fused_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same, `bias` unread, by PyTorch's kernel, which is the faster one on a GPU."""
    mixed = F.scaled_dot_product_attention(q.flatten(1, 2), k, v, is_causal=True, scale=1.0, enable_gqa=True)
    return mixed.view(q.shape)


@dataclass(frozen=True, slots=True)
class Places:
    """What the positions of a row of some length have to do with each other."""

    cos: Tensor
    sin: Tensor
    """[length, head_dim / 2]"""
    bias: Tensor
    """[block, length]"""


class Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.q_proj = nn.Linear(shape.hidden, shape.heads * shape.head_dim, bias=False)
        self.k_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.v_proj = nn.Linear(shape.hidden, shape.kv_heads * shape.head_dim, bias=False)
        self.o_proj = nn.Linear(shape.heads * shape.head_dim, shape.hidden, bias=False)
        self.q_norm = Norm(shape.head_dim, shape.epsilon, shape.gain)
        self.k_norm = Norm(shape.head_dim, shape.epsilon, shape.gain)

    def forward(self, x: Tensor, places: Places, dtype: torch.dtype) -> Tensor:
        """[rows, length, hidden] -> same."""
        s = self.shape
        weight = torch.cat((self.q_proj.weight, self.k_proj.weight, self.v_proj.weight))
        heads = linear(x, weight, dtype).reshape(*x.shape[:2], -1, s.head_dim).transpose(1, 2)
        q, k, v = torch.split(heads, [s.heads, s.kv_heads, s.kv_heads], 1)
        q = rotate(self.q_norm(q), places.cos, places.sin) * s.head_dim**-0.5
        k = rotate(self.k_norm(k), places.cos, places.sin)
        q = q.unflatten(1, (s.kv_heads, -1))
        attend = fused_attention if x.is_cuda else blockwise_attention
        mixed = attend(q.to(dtype), k.to(dtype), v, places.bias)
        return linear(mixed.flatten(1, 2).transpose(1, 2).flatten(2), self.o_proj.weight, dtype)


class Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.up_proj = nn.Linear(shape.hidden, shape.intermediate, bias=False)
        self.down_proj = nn.Linear(shape.intermediate, shape.hidden, bias=False)

    def forward(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[rows, length, hidden] -> same."""
        gate, up = linear(x, torch.cat((self.gate_proj.weight, self.up_proj.weight)), dtype).float().chunk(2, -1)
        return linear(F.silu(gate) * up, self.down_proj.weight, dtype)


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape.hidden, shape.epsilon)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape.hidden, shape.epsilon)
        self.mlp = Mlp(shape)


def layer_forward(layer: Layer, x: Tensor, places: Places, dtype: torch.dtype) -> Tensor:
    """[rows, length, hidden] float32 -> same. A function, so that all layers share what is compiled."""
    x = x + layer.self_attn(layer.input_layernorm(x), places, dtype)
    changed: Tensor = x + layer.mlp(layer.post_attention_layernorm(x), dtype)
    return changed


def logit_gradient(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the weighted cross entropy. logits [n, vocab], targets and weights [n] -> gradient, losses [n], hits [n]."""
    wide = logits.float()
    top = wide.amax(-1)
    powers = (wide - top[:, None]).exp()
    total = powers.sum(-1)
    chosen = wide.gather(1, targets[:, None])[:, 0]
    right = torch.arange(logits.shape[1], device=logits.device) == targets[:, None]
    gradient = (powers / total[:, None] - right.float()) * weights[:, None]
    return gradient.to(logits.dtype), top + total.log() - chosen, chosen >= top


GradientOf = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]


class TiedLoss(torch.autograd.Function):
    """Weighted sum of cross entropies under logits `hidden @ table.T`, in chunks that make their gradient at once.

    All logits together would be the largest tensor of a step, several times over.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, weights: Tensor, gradient_of: GradientOf
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden [n, size], table [vocab, size], targets and weights [n] -> sum, losses [n], hits [n]."""
        low = table.to(hidden.dtype)
        to_hidden, to_table = torch.empty_like(hidden), torch.zeros_like(table)
        losses, hits = [], []
        for at in range(0, len(hidden), LOGIT_ROWS):
            chunk = slice(at, at + LOGIT_ROWS)
            gradient, loss, hit = gradient_of(F.linear(hidden[chunk], low), targets[chunk], weights[chunk])
            torch.mm(gradient, low, out=to_hidden[chunk])
            to_table += gradient.t() @ hidden[chunk]
            losses.append(loss)
            hits.append(hit)
        ctx.save_for_backward(to_hidden, to_table)
        each, right = torch.cat(losses), torch.cat(hits)
        ctx.mark_non_differentiable(each, right)
        return (each * weights).sum(), each, right

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        to_hidden, to_table = ctx.saved_tensors
        return to_hidden * grads[0].to(to_hidden.dtype), to_table * grads[0], None, None, None


Watch = Callable[[int, "Layer", Tensor, Places], None]


class Network(nn.Module):
    """`compiled` needs a C++ compiler and pays once per row length."""

    def __init__(self, shape: Shape, dtype: torch.dtype = torch.float32, compiled: bool = False) -> None:
        super().__init__()
        self.shape, self.dtype = shape, dtype
        self.embed_tokens = nn.Embedding(shape.vocab, shape.hidden)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.norm = Norm(shape.hidden, shape.epsilon)
        self._layer: Callable[..., Tensor] = layer_forward
        self._logit_gradient: GradientOf = logit_gradient
        self._places: dict[int, Places] = {}
        if compiled:
            self._layer = torch.compile(layer_forward, dynamic=False)
            self._logit_gradient = torch.compile(logit_gradient, dynamic=False)

    def initialise(self, generator: torch.Generator) -> None:
        """Variance-preserving; what writes to the residual stream starts smaller, the more layers write to it."""
        depth = (2 * self.shape.layers) ** -0.5
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                spread = 0.02 if name.startswith("embed") else weight.shape[1] ** -0.5
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=spread * (depth if writes else 1.0), generator=generator)

    def places(self, length: int) -> Places:
        if length not in self._places:
            half = self.shape.head_dim // 2
            speeds = self.shape.theta ** -(torch.arange(half, dtype=torch.float32) / half)
            turns = torch.outer(torch.arange(length, dtype=torch.float32), speeds)
            device = self.embed_tokens.weight.device
            made = (t.to(device) for t in (turns.cos(), turns.sin(), causal_bias(length)))
            self._places[length] = Places(*made)
        return self._places[length]

    def forward(self, ids: Tensor, watch: Watch | None = None) -> Tensor:
        """[rows, length] -> normalised states [rows, length, hidden] that the embedding turns into logits. `watch` is
        shown each layer with its input."""
        places = self.places(ids.shape[1])
        x = self.embed_tokens(ids)
        for number, layer in enumerate(self.layers):
            if watch is not None:
                watch(number, cast(Layer, layer), x, places)
            x = self._layer(layer, x, places, self.dtype)
        states: Tensor = self.norm(x)
        return states.to(self.dtype)

    def logits(self, ids: Tensor) -> Tensor:
        """[rows, length] -> [rows, length, vocab]."""
        return linear(self(ids), self.embed_tokens.weight, self.dtype)

    def loss(
        self, ids: Tensor, targets: Tensor, weights: Tensor, watch: Watch | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All [rows, length] -> weighted sum of losses, and losses and hits [rows * length] without gradient."""
        hidden = self(ids, watch).flatten(0, 1)
        sums: tuple[Tensor, Tensor, Tensor] = TiedLoss.apply(  # type: ignore[no-untyped-call]
            hidden, self.embed_tokens.weight, targets.flatten(), weights.flatten(), self._logit_gradient
        )
        return sums


def read_weights(network: Network, folder: Path) -> None:
    """Those that `write_model` wrote. A network with more layers gets the new ones in the middle, as identities: what
    they would add to the residual stream begins as nothing. Raises `ValueError` for weights of another shape."""
    saved_layers = json.loads((folder / CONFIG_FILE).read_text())["num_hidden_layers"]
    layers = network.shape.layers
    if saved_layers > layers:
        raise ValueError(f"{folder} has {saved_layers} layers, more than {layers}")
    before = saved_layers // 2
    new = range(before, before + layers - saved_layers)
    with safe_open(folder / WEIGHTS_FILE, "pt") as file, torch.no_grad():
        for name, p in network.named_parameters():
            parts = name.split(".")
            if parts[0] == "layers":
                at = int(parts[1])
                if at in new:
                    if name.endswith(("o_proj.weight", "down_proj.weight")):
                        p.zero_()
                    continue
                parts[1] = str(at if at < before else at - len(new))
            saved = file.get_tensor(".".join(("model", *parts)))
            if saved.shape != p.shape:
                raise ValueError(f"{folder}: {name} has the shape {tuple(saved.shape)}, not {tuple(p.shape)}")
            p.copy_(saved)


def write_model(network: Network, folder: Path, tokens: dict[str, int]) -> None:
    """`model.safetensors` in bfloat16 and `config.json`, with the `tokens` ids (bos_token_id, ...); each at once."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {f"model.{name}": p.detach().to("cpu", torch.bfloat16) for name, p in network.named_parameters()}
    s = network.shape
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "dtype": "bfloat16",
        "vocab_size": s.vocab,
        "hidden_size": s.hidden,
        "intermediate_size": s.intermediate,
        "num_hidden_layers": s.layers,
        "num_attention_heads": s.heads,
        "num_key_value_heads": s.kv_heads,
        "head_dim": s.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": s.epsilon,
        "rope_parameters": {"rope_type": "default", "rope_theta": s.theta},
        "max_position_embeddings": s.positions,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
        "use_cache": True,
        **tokens,
    }
    part = folder / "part"
    save_file(weights, part, metadata={"format": "pt"})
    part.chmod(0o644)
    part.replace(folder / WEIGHTS_FILE)
    part.write_text(json.dumps(config, indent=2) + "\n")
    part.replace(folder / CONFIG_FILE)
