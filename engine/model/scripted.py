"""Steps on a CPU: the layers compiled by TorchScript, and when they decode, over keys and values that stay gathered.

A decoder layer is some forty operators, and another ten for every 64 queries of a prompt. A step of a few rows waits
more for Python than for most of them, one with a prompt for a twentieth of its time; what is compiled calls them from
C++, without the interpreter and its lock, which the I/O thread has meanwhile. The functions are those that `layers.py`
calls, and so are the results, bit for bit. Other devices go by `layers.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from engine.model.dense import DenseKeys, take_turns
from engine.model.layers import DecoderLayer, RmsNorm
from kernels.attention import AttentionMetadata, PaddedBatch, attend, gather, rotate, rows_from
from kernels.linear import PackedGatedLinear, PackedLinear
from kernels.norm import rms_norm_with
from kernels.products import Limits

# In the functional form, because TorchScript does not resolve annotations that are strings in a class.
Inputs = NamedTuple(  # noqa: UP014
    "Inputs",
    [
        ("pool", Tensor),
        ("heads", list[Tensor]),
        ("pages", list[Tensor]),
        ("cos", Tensor),
        ("sin", Tensor),
        ("slots", Tensor),
        ("space", Tensor),
        ("limits", Limits),
        ("offsets", list[int]),
        ("stride", int),
        ("space_slots", Optional[Tensor]),  # noqa: UP045
    ],
)
"""What every layer needs besides the hidden states and the batches: see `Step`, `AttentionMetadata`, `dense.Place`.
`heads` and `pages` are the pool's rows from each layer on, of `head_dim` and of a page."""


class _Norm(torch.nn.Module):
    """One `RmsNorm`, with its weight in the dtype of what it norms: a product of two dtypes makes a copy first."""

    def __init__(self, norm: RmsNorm) -> None:
        super().__init__()
        self.weight = norm.weight
        self.float32 = norm.weight.float()
        self.eps = torch.tensor(norm.eps)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm_with(x, self.float32 if x.dtype == torch.float32 else self.weight, self.eps)


class _Layer(torch.nn.Module):
    """One `DecoderLayer`."""

    def __init__(self, layer: DecoderLayer, windows: Sequence[int]) -> None:
        super().__init__()
        attention, feed_forward = layer.attention, layer.feed_forward
        config = attention.config
        self.layer = attention.layer
        self.window = windows.index(config.windows[attention.layer])
        """Which of the step's lists of batches is this layer's."""
        self.head_dim = config.head_dim
        self.rotated = config.num_heads + config.num_kv_heads
        self.attention_norm = _Norm(layer.attention_norm)
        self.qkv = attention.qkv
        self.qk_norm = None if attention.qk_norm is None else _Norm(attention.qk_norm)
        self.output = attention.output
        self.feed_forward_norm = _Norm(layer.feed_forward_norm)
        self.gate_up = feed_forward.gate_up
        self.down = feed_forward.down

    def forward(self, x: Tensor, step: Inputs, batches: list[list[PaddedBatch]]) -> Tensor:
        qkv = self.qkv(self.attention_norm(x)).view(x.shape[0], -1, self.head_dim)
        if self.qk_norm is not None:
            queries_keys = qkv[:, : self.rotated]
            queries_keys.copy_(self.qk_norm(queries_keys))
        q, rows = rotate(qkv, step.cos, step.sin, step.pool)
        step.heads[self.layer].index_copy_(0, step.slots, rows)
        own = step.space[self.layer * step.stride :]
        space_slots = step.space_slots  # by this name, TorchScript knows that it is not None
        if space_slots is not None:
            own[: step.stride].view(-1, self.head_dim).index_copy_(0, space_slots, rows)
        mixed: list[Tensor] = []
        for i, batch in enumerate(batches[self.window]):
            gathered = own[step.offsets[i] :]
            if space_slots is None:
                gather(step.pages[self.layer], batch.pages, gathered)
            mixed.append(attend(q[batch.start : batch.stop], gathered, step.pool, batch, step.limits))
        whole = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        x = self.output(whole.view(x.shape[0], -1), x)
        y: Tensor = self.down(self.gate_up(self.feed_forward_norm(x)), x)
        return y


class _Layers(torch.nn.Module):
    def __init__(self, layers: Sequence[_Layer], norm: RmsNorm) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)
        self.norm = _Norm(norm)

    def forward(self, x: Tensor, step: Inputs, batches: list[list[PaddedBatch]]) -> Tensor:
        for layer in self.layers:
            x = layer(x, step, batches)
        y: Tensor = self.norm(x)
        return y


class ScriptedLayers:
    """All decoder layers and the norm after them."""

    def __init__(self, layers: Sequence[DecoderLayer], norm: RmsNorm, limits: Limits) -> None:
        self._limits = limits
        self._windows = sorted(set(layers[0].attention.config.windows))
        self._pool = torch.empty(0)
        self._heads: list[Tensor] = []
        self._pages: list[Tensor] = []
        self.dense = DenseKeys(len(layers)) if self._windows == [0] else None
        modules = _Layers([_Layer(layer, self._windows) for layer in layers], norm)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # what is to follow it needs a C++ compiler on the host
            self._compiled: Any = torch.jit.script(modules.eval())

    def __call__(self, x: Tensor, pool: Tensor, cos: Tensor, sin: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Hidden states `[rows, hidden]` before the layers to those after the norm; see `engine.model.layers`."""
        batches = [list(metadata.batches[window]) for window in self._windows]
        decodes = all(batch.queries == 1 for batch in batches[0])
        place = self.dense.place(metadata, pool) if decodes and self.dense is not None else take_turns(metadata, pool)
        self._look_at(pool)
        step = Inputs(
            pool=pool,
            heads=self._heads,
            pages=self._pages,
            cos=cos,
            sin=sin,
            slots=metadata.slots,
            limits=self._limits,
            space=place.space,
            offsets=place.offsets,
            stride=place.stride,
            space_slots=place.slots,
        )
        y: Tensor = self._compiled(x, step, batches)
        return y

    def _look_at(self, pool: Tensor) -> None:
        if pool is not self._pool:
            dim, layers = pool.shape[5], range(pool.shape[1])
            self._pool = pool
            self._heads = [rows_from(pool, layer, dim) for layer in layers]
            self._pages = [rows_from(pool, layer, pool.shape[4] * dim) for layer in layers]


def script(layers: Sequence[DecoderLayer], norm: RmsNorm, limits: Limits) -> ScriptedLayers | None:
    """None where the layers' products are not those of oneDNN."""
    for layer in layers:
        linears = (layer.attention.qkv, layer.attention.output, layer.feed_forward.down)
        if not all(isinstance(linear, PackedLinear) for linear in linears):
            return None
        if not isinstance(layer.feed_forward.gate_up, PackedGatedLinear):
            return None
    return ScriptedLayers(layers, norm, limits)
