"""The Triton attention where lengths and indices are at an edge."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import attention, ragged
from kernels.blocks import allocate_pool
from kernels.triton import decode, prefill, rotary
from kernels.triton.attention import paged_attention
from kernels.triton.metadata import MIN_SPLIT, TILE_ROWS, metadata_builder
from tests.triton_interpreter import DEVICE, INTERPRETED

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 16, 16
TILE = TILE_ROWS * KV_HEADS // HEADS
FAR = 1 << 16
Rows = tuple[tuple[int, int], ...]
"""Tokens in the step and tokens in all."""


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(6)).to(DEVICE)


def check(rows: Rows, window: int, block_tokens: int = BLOCK, heads: int = HEADS, kv_heads: int = KV_HEADS) -> None:
    """Layer 1 of 2, every row's pages scattered over the pool, against plain torch."""
    sizes = [-(-total // block_tokens) for _, total in rows]
    order = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(7)).tolist()
    pages = [[order.pop() for _ in range(size)] for size in sizes]
    pool = random(sum(sizes), 2, 2, kv_heads, block_tokens, DIM)
    queries, totals = [n for n, _ in rows], [total for _, total in rows]
    q = random(sum(queries), heads, DIM)
    theirs = ragged.metadata_builder(pool, heads, (window,))(queries, totals, pages)
    ours = metadata_builder(pool, heads, (window,))(queries, totals, pages)
    wanted = attention.paged_attention(q, pool, 1, theirs, window)
    torch.testing.assert_close(paged_attention(q, pool, 1, ours, window), wanted, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("window", [0, 1, BLOCK])
@pytest.mark.parametrize(
    "rows",
    [
        pytest.param(((1, 1),), id="one token"),
        pytest.param(((1, BLOCK - 1), (1, BLOCK), (1, BLOCK + 1)), id="decoding around a block's end"),
        pytest.param(((BLOCK, BLOCK), (BLOCK + 1, 2 * BLOCK), (2, BLOCK + 1)), id="a chunk around a block's end"),
        pytest.param(((2, 2), (TILE - 1, TILE - 1), (TILE + 1, TILE + 1)), id="no prefix, around a tile's end"),
        pytest.param(((TILE, 3 * TILE), (3, TILE + 3)), id="a prefix of whole tiles"),
        pytest.param(((1, MIN_SPLIT), (1, MIN_SPLIT + 1), (1, 2)), id="decoding around a split's end"),
    ],
)
def test_lengths_at_an_edge(rows: Rows, window: int) -> None:
    check(rows, window)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (2, 2), (7, 1), (32, 1)])
def test_groups_of_any_size(heads: int, kv_heads: int) -> None:
    check(((1, 20), (1, 300), (3, 19)), 0, heads=heads, kv_heads=kv_heads)


@pytest.mark.parametrize("block_tokens", [1, 2, 48, 128])
def test_blocks_of_any_size(block_tokens: int) -> None:
    check(((1, 130), (1, block_tokens), (5, 97)), 40, block_tokens=block_tokens)


@pytest.mark.parametrize("window", [0, 4096])
def test_contexts_of_64k(window: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if INTERPRETED:  # which takes some milliseconds for a tile of any size
        monkeypatch.setattr(decode, "KEYS", 4096)
        monkeypatch.setattr(prefill, "KEYS", 4096)
    check(((1, FAR), (1, FAR + 1), (2, FAR + 2)), window, block_tokens=64, heads=2, kv_heads=1)


def test_pages_behind_the_first_two_billion_elements() -> None:
    """A 32-bit product of page and stride would have wrapped round, onto another request's pages."""
    num_blocks = (1 << 31) // (2 * BLOCK * DIM) + 2
    pool = allocate_pool((num_blocks, 1, 2, 1, BLOCK, DIM), torch.float16, DEVICE)
    far = num_blocks - 1
    step = metadata_builder(pool, 1, (0,))([BLOCK], [BLOCK], [[far]])
    cos, sin = torch.ones(BLOCK, 1, DIM, device=DEVICE), torch.zeros(BLOCK, 1, DIM, device=DEVICE)
    heads = random(BLOCK, 3, DIM).half()
    queries = rotary.rotate_and_write(heads, cos, sin, pool, 0, step)
    torch.testing.assert_close(pool[far, 0, :, 0], torch.stack((heads[:, 1], heads[:, 2])))
    near = pool[far : far + 1].float()
    wanted = attention.paged_attention(
        queries.float(), near, 0, ragged.metadata_builder(near, 1, (0,))([BLOCK], [BLOCK], [[0]]), 0
    )
    got = paged_attention(queries, pool, 0, step, 0).float()
    torch.testing.assert_close(got, wanted, atol=4e-3, rtol=4e-3)
    decoded = metadata_builder(pool, 1, (0,))([1], [BLOCK], [[far]])
    got = paged_attention(queries[-1:], pool, 0, decoded, 0).float()
    torch.testing.assert_close(got, wanted[-1:], atol=4e-3, rtol=4e-3)
