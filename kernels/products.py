"""Attention in bfloat16 on a CPU, by whole matrix products.

torch's own attention goes through the heads one by one and in small pieces: products of all heads take two thirds to
nine tenths of its time for prompts of up to a thousand tokens and for many decoding rows, less than half for models
with one query head per key head. A product in bfloat16 is rounded to bfloat16, which is too coarse for scores; each
function has its way around.
"""

from __future__ import annotations

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


def few_keys(device: torch.device, dtype: torch.dtype) -> int:
    """Of all rows and key-value heads, from which on `decode_attention` is the faster way to decode; more than there
    can be where it never is."""
    return FEW_KEYS if dtype == torch.bfloat16 and can_pack(device, dtype) else 1 << 62


def fits_prompt(q: Tensor, keys: Tensor) -> bool:
    """Whether `prompt_attention` is the faster way for `q` `[rows, queries, heads, head_dim]` over `keys` `[rows,
    kv_heads, keys, head_dim]`."""
    if q.dtype != torch.bfloat16 or not can_pack(q.device, q.dtype):
        return False
    rows, queries, heads, _ = q.shape
    num_keys = keys.shape[2]
    return num_keys <= LONG and rows * heads * queries * num_keys >= FEW_SCORES


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


def prompt_attention(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, lead: int, causal: bool) -> Tensor:
    """Many queries per row: `q` `[rows, queries, heads, head_dim]` over `keys` and `values` `[rows, kv_heads, keys,
    head_dim]`, to `q`'s shape, with scores from float32 products.

    `mask` `[rows, 1, queries, keys]`, or `[queries, keys]` for a single row, is added to the scores. No query `i` sees
    a key from `lead + i + 1` on; with `causal`, that of a single row sees all before it.
    """
    rows, queries, heads, dim = q.shape
    kv_heads, num_keys = keys.shape[1:3]
    wide = (q.float() * dim**-0.5).view(rows, queries, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
    columns = keys.float().flatten(0, 1).transpose(1, 2)
    values = values.flatten(0, 1)
    out = torch.empty_like(q).view(rows, queries, kv_heads, -1, dim).permute(0, 2, 3, 1, 4)
    size = max(MIN_QUERIES, min(MAX_QUERIES, SCORE_BYTES // (4 * rows * heads * num_keys)))
    for begin in range(0, queries, size):
        end = min(begin + size, queries)
        seen = min(lead + end, num_keys)
        hidden = seen - (end - begin) if causal and rows == 1 else 0  # keys before these are seen by all
        part = wide[..., begin:end, :]
        scores = torch.bmm(part.reshape(rows * kv_heads, -1, dim), columns[..., :seen])
        added = mask[..., begin:end, hidden:seen].float()
        scores.view(*part.shape[:-1], seen)[..., hidden:].add_(added if rows == 1 else added[:, None])
        out[..., begin:end, :] = torch.bmm(scores.softmax(-1).to(q.dtype), values[:, :seen]).view(part.shape)
    return out.permute(0, 3, 1, 2, 4).reshape(q.shape)
