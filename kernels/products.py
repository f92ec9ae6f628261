"""Attention in bfloat16 on a CPU, by whole matrix products.

torch's own attention goes through the heads one by one and in small pieces: products of all heads take two thirds to
nine tenths of its time for prompts of up to a thousand tokens and for many decoding rows, less than half for models
with one query head per key head. A product in bfloat16 is rounded to bfloat16, which is too coarse for scores; each
function has its way around.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.linear import can_pack

FEW_KEYS = 4096
FEW_SCORES = 1 << 17
"""One call of torch's attention is faster than several products for fewer keys, of all rows and heads, that are to be
decoded with, and for fewer scores of a prompt."""
LONG = 1536
"""Keys of a row above which a prompt's scores leave the cache: as fast as torch's attention there, then slower."""
SCORE_BYTES = 3 << 19
"""Of a prompt's scores, as many as are alive at a time."""
MIN_QUERIES, MAX_QUERIES = 16, 64
"""Of a row, whose scores are alive at a time: with fewer, products are slow; with more, the masked half costs more."""


# In the functional form, because TorchScript does not resolve annotations that are strings in a class.
Limits = NamedTuple(  # noqa: UP014
    "Limits",
    [
        ("decode_keys", int),
        ("prompt_keys", int),
        ("prompt_scores", int),
        ("score_bytes", int),
        ("min_queries", int),
        ("max_queries", int),
    ],
)
"""When products are the faster way, as TorchScript can read it: to decode from `decode_keys` on, of all rows and
key-value heads; for a prompt up to `prompt_keys` per row and from `prompt_scores` on. The others are the constants
above."""


def limits(device: torch.device, dtype: torch.dtype) -> Limits:
    """Those of a device and dtype; where products never are the faster way, nothing is within them."""
    fits = dtype == torch.bfloat16 and can_pack(device, dtype)
    decode_keys, prompt_keys = (FEW_KEYS, LONG) if fits else (1 << 62, 0)
    return Limits(decode_keys, prompt_keys, FEW_SCORES, SCORE_BYTES, MIN_QUERIES, MAX_QUERIES)


def fits_prompt(q: Tensor, keys: Tensor, limits: Limits) -> bool:
    """Whether `prompt_attention` is the faster way for `q` `[rows, queries, heads, head_dim]` over `keys` `[rows,
    kv_heads, keys, head_dim]`."""
    rows, queries, heads, num_keys = q.shape[0], q.shape[1], q.shape[2], keys.shape[2]
    enough: bool = rows * heads * queries * num_keys >= limits.prompt_scores
    return enough and num_keys <= limits.prompt_keys and q.dtype == torch.bfloat16


def decode_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """One query per row: `q` `[rows, kv_heads, group, head_dim]` over `keys` and `values` `[rows, kv_heads, keys,
    head_dim]`, to `q`'s shape; `mask` `[rows, 1, 1, keys]` is added to the scores.

    What rounding took from the scores is a second product, from which the first is subtracted before it is rounded
    itself: cheaper than making float32 of keys that are used once.
    """
    rows, kv_heads, group, dim = q.shape
    # Of a single row they may end within a page: heads that do not follow one another cost a product up to six times.
    keys, values = keys.flatten(0, 1).contiguous(), values.flatten(0, 1).contiguous()
    flat, columns = q.flatten(0, 1), keys.transpose(1, 2)
    scores = torch.bmm(flat, columns)
    rest = torch.baddbmm(scores, flat, columns, beta=-1)
    scores = scores.float().add_(rest)
    if mask is None:
        scores.mul_(dim**-0.5)
    else:
        scores = torch.add(mask, scores.view(rows, kv_heads, group, -1), alpha=dim**-0.5).flatten(0, 1)
    return torch.bmm(scores.softmax(-1).to(q.dtype), values).view(rows, kv_heads, group, dim)


def prompt_attention(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, lead: int, causal: bool, limits: Limits
) -> Tensor:
    """Many queries per row: `q` `[rows, queries, heads, head_dim]` over `keys` and `values` `[rows, kv_heads, keys,
    head_dim]`, to `q`'s shape, with scores from float32 products.

    `mask` `[rows, 1, queries, keys]`, or `[queries, keys]` for a single row, is added to the scores. No query `i` sees
    a key from `lead + i + 1` on; with `causal`, that of a single row sees all before it.
    """
    rows, queries, heads, dim = q.shape
    kv_heads, num_keys = keys.shape[1], keys.shape[2]
    wide = (q.float() * dim**-0.5).view(rows, queries, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
    columns = keys.float().flatten(0, 1).transpose(1, 2)
    values = values.flatten(0, 1)
    out = torch.empty([rows, queries, heads, dim], dtype=q.dtype, device=q.device)
    grouped = out.view(rows, queries, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
    most = limits.score_bytes // (4 * rows * heads * num_keys)
    size = max(limits.min_queries, min(limits.max_queries, most))
    for begin in range(0, queries, size):
        end = min(begin + size, queries)
        seen = min(lead + end, num_keys)
        hidden = seen - (end - begin) if causal and rows == 1 else 0  # keys before these are seen by all
        part = wide[:, :, :, begin:end].reshape(rows * kv_heads, -1, dim)
        scores = torch.bmm(part, columns[:, :, :seen])
        added = mask[..., begin:end, hidden:seen].float()
        by_head = scores.view(rows, kv_heads, -1, end - begin, seen)
        by_head[..., hidden:].add_(added if rows == 1 else added[:, None])
        mixed = torch.bmm(scores.softmax(-1).to(q.dtype), values[:, :seen])
        grouped[:, :, :, begin:end].copy_(mixed.view(rows, kv_heads, -1, end - begin, dim))
    return out
