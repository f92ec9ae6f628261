"""Attention over the paged KV pool: decoded tokens and prompt chunks each by the kernel made for them."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.triton.decode import decode_attention
from kernels.triton.metadata import PagedMetadata
from kernels.triton.prefill import prefill_attention


def paged_attention(q: Tensor, pool: Tensor, layer: int, metadata: PagedMetadata, window: int) -> Tensor:
    """See `kernels.attention.paged_attention`."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if metadata.decode_rows:
        decode_attention(q, pool, layer, metadata, window, out)
    if len(metadata.tile_rows):
        prefill_attention(q, pool, layer, metadata, window, out)
    return out
