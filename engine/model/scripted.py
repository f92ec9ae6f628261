"""Decoding steps on a CPU: the layers compiled by TorchScript, over keys and values that stay gathered.

A decoder layer is some forty operators, of which a step of a few rows waits more for Python than for most of them; what
is compiled calls them from C++, without the interpreter and its lock. The functions are those that `layers.py` calls,
and so are the results, bit for bit. Prompts, for which this does not matter, and other devices go by `layers.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple, Optional

import torch
from torch import Tensor

from engine.model.dense import DenseKeys, take_turns
from engine.model.layers import DecoderLayer
from kernels.attention import AttentionMetadata, attend_one_query, gather, keys_values, rotate, write_kv
from kernels.linear import PackedGatedLinear, PackedLinear
from kernels.norm import rms_norm

# In the functional form, because TorchScript does not resolve annotations that are strings in a class.
Batch = NamedTuple(  # noqa: UP014
    "Batch",
    [
        ("start", int),
        ("stop", int),
        ("pages", Tensor),
        ("first", int),
        ("last", int),
        ("mask", Optional[Tensor]),  # noqa: UP045
        ("offset", int),
    ],
)
"""One `PaddedBatch`, gathered from `offset` of its layer's memory on; it uses the keys `[first, last)`."""
Inputs = NamedTuple(  # noqa: UP014
    "Inputs",
    [
        ("pool", Tensor),
        ("cos", Tensor),
        ("sin", Tensor),
        ("slots", Tensor),
        ("space", Tensor),
        ("stride", int),
        ("space_slots", Optional[Tensor]),  # noqa: UP045
    ],
)
"""What every layer needs besides the hidden states and the batches: see `Step`, `AttentionMetadata`, `dense.Place`."""


class _Layer(torch.nn.Module):
    """One `DecoderLayer`."""

    def __init__(self, layer: DecoderLayer, windows: Sequence[int], few_keys: int) -> None:
        super().__init__()
        attention, feed_forward = layer.attention, layer.feed_forward
        config = attention.config
        self.layer = attention.layer
        self.window = windows.index(config.windows[attention.layer])
        """Which of the step's lists of batches is this layer's."""
        self.few_keys = few_keys
        self.head_dim = config.head_dim
        self.rotated = config.num_heads + config.num_kv_heads
        self.eps = config.norm_eps
        self.attention_norm = layer.attention_norm.weight
        self.qkv = attention.qkv
        self.qk_norm = None if attention.qk_norm is None else attention.qk_norm.weight
        self.output = attention.output
        self.feed_forward_norm = layer.feed_forward_norm.weight
        self.gate_up = feed_forward.gate_up
        self.down = feed_forward.down

    def forward(self, x: Tensor, step: Inputs, batches: list[list[Batch]]) -> Tensor:
        heads = self.qkv(rms_norm(x, self.attention_norm, self.eps)).view(x.shape[0], -1, self.head_dim)
        queries_keys, values = heads[:, : self.rotated], heads[:, self.rotated :]
        if self.qk_norm is not None:
            queries_keys = rms_norm(queries_keys, self.qk_norm, self.eps)
        q, rows = rotate(queries_keys, values, step.cos, step.sin)
        write_kv(step.pool, self.layer, rows, step.slots)
        own = step.space[self.layer * step.stride :]
        space_slots = step.space_slots  # by this name, TorchScript knows that it is not None
        if space_slots is not None:
            own[: step.stride].view(-1, self.head_dim).index_copy_(0, space_slots, rows)
        mixed: list[Tensor] = []
        for b in batches[self.window]:
            gathered = own[b.offset :]
            if space_slots is None:
                gather(step.pool, self.layer, b.pages, gathered)
            keys, past = keys_values(gathered, b.pages, b.stop - b.start, step.pool, b.first, b.last)
            mixed.append(attend_one_query(q[b.start : b.stop], keys, past, b.mask, self.few_keys))
        whole = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        x = self.output(whole.view(x.shape[0], -1), x)
        y: Tensor = self.down(self.gate_up(rms_norm(x, self.feed_forward_norm, self.eps)), x)
        return y


class _Layers(torch.nn.Module):
    def __init__(self, layers: Sequence[_Layer]) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: Tensor, step: Inputs, batches: list[list[Batch]]) -> Tensor:
        for layer in self.layers:
            x = layer(x, step, batches)
        return x


class ScriptedLayers:
    """All decoder layers, for steps with one token per row."""

    def __init__(self, layers: Sequence[DecoderLayer], few_keys: int) -> None:
        self._windows = sorted(set(layers[0].attention.config.windows))
        self.dense = DenseKeys(len(layers)) if self._windows == [0] else None
        modules = _Layers([_Layer(layer, self._windows, few_keys) for layer in layers])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # what is to follow it needs a C++ compiler on the host
            self._compiled: Any = torch.jit.script(modules.eval())

    def takes(self, metadata: AttentionMetadata) -> bool:
        return all(batch.queries == 1 for batch in metadata.batches[self._windows[0]])

    def __call__(self, x: Tensor, pool: Tensor, cos: Tensor, sin: Tensor, metadata: AttentionMetadata) -> Tensor:
        """Hidden states `[rows, hidden]` before the layers to those after them; see `engine.model.layers`."""
        place = take_turns(metadata, pool) if self.dense is None else self.dense.place(metadata, pool)
        batches = [
            [
                Batch(b.start, b.stop, b.pages, b.keys.start, b.keys.stop, b.mask, offset)
                for b, offset in zip(metadata.batches[window], place.offsets, strict=False)
            ]
            for window in self._windows
        ]
        step = Inputs(pool, cos, sin, metadata.slots, place.space, place.stride, place.slots)
        y: Tensor = self._compiled(x, step, batches)
        return y


def script(layers: Sequence[DecoderLayer], few_keys: int) -> ScriptedLayers | None:
    """None where the layers' products are not those of oneDNN."""
    for layer in layers:
        linears = (layer.attention.qkv, layer.attention.output, layer.feed_forward.down)
        if not all(isinstance(linear, PackedLinear) for linear in linears):
            return None
        if not isinstance(layer.feed_forward.gate_up, PackedGatedLinear):
            return None
    return ScriptedLayers(layers, few_keys)
