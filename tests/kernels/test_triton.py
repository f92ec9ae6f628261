"""The Triton kernels against their torch references, under Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import attention, blocks, ragged
from kernels.activation import silu_and_mul
from kernels.norm import rms_norm
from kernels.triton import activation as triton_activation
from kernels.triton import blocks as triton_blocks
from kernels.triton import norm as triton_norm
from kernels.triton import rotary as triton_rotary
from kernels.triton.attention import paged_attention
from kernels.triton.metadata import metadata_builder, static_metadata_builder
from tests.triton_interpreter import DEVICE

ROWS = ((1, 1), (1, 17), (1, 300), (3, 3), (4, 16), (20, 33), (1, 14))
"""Tokens in the step and tokens in all: one token, a block's end and beyond, no prefix, splits."""
TOLERANCE = {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5)).to(DEVICE, dtype)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def tables(rows: tuple[tuple[int, int], ...], block_tokens: int) -> tuple[int, list[list[int]]]:
    sizes = [-(-kv // block_tokens) for _, kv in rows]
    pages = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(3)).tolist()
    return sum(sizes), [[pages.pop() for _ in range(size)] for size in sizes]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "block_tokens", "window", "dtype"),
    [
        (4, 2, 16, 16, 0, torch.float32),
        (6, 2, 24, 20, 5, torch.bfloat16),
        (2, 2, 16, 16, 100, torch.float16),
    ],
)
def test_attention_equals_torch(
    heads: int, kv_heads: int, dim: int, block_tokens: int, window: int, dtype: torch.dtype
) -> None:
    size, pages = tables(ROWS, block_tokens)
    pool = random(size, 2, 2, kv_heads, block_tokens, dim, dtype=dtype)
    queries, totals = [n for n, _ in ROWS], [kv for _, kv in ROWS]
    q = random(sum(queries), heads, dim, dtype=dtype)
    ours = metadata_builder(pool, heads, (window,))(queries, totals, pages)
    exact = pool.float()
    theirs = ragged.build_metadata(queries, totals, pages, exact, (window,), attention.Workspace(exact.dtype, DEVICE))
    assert torch.equal(ours.positions.long(), theirs.positions)
    wanted = attention.paged_attention(q.float(), exact, 1, theirs, window)
    got = paged_attention(q, pool, 1, ours, window).float()
    torch.testing.assert_close(got, wanted, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_a_step_in_place_equals_one_built_anew_and_writes_nothing_for_nobody() -> None:
    positions, tables = torch.tensor([16, -1, 299]), [[3, 1], [0], [*range(4, 23)]]
    pool, heads = random(23, 2, 2, 2, 16, 8), random(3, 4 + 2 + 2, 8)
    there = [0, 2]
    width = torch.zeros(3, 20, dtype=torch.int32)
    for row, table in enumerate(tables):
        width[row, : len(table)] = torch.tensor(table)
    in_place = static_metadata_builder(pool, (0, 7))(positions.to(DEVICE, torch.int32), width.to(DEVICE))
    anew = metadata_builder(pool, 4, (0, 7))([1, 1], [17, 300], [tables[row] for row in there])
    cos, sin = torch.ones(3, 1, 8, device=DEVICE), torch.zeros(3, 1, 8, device=DEVICE)
    wanted_pool = pool.clone()
    triton_rotary.rotate_and_write(heads[there], cos, sin, wanted_pool, 1, anew)
    queries = triton_rotary.rotate_and_write(heads, cos, sin, pool, 1, in_place)
    assert torch.equal(pool, wanted_pool)
    for window in (0, 7):
        wanted = paged_attention(queries[there], pool, 1, anew, window)
        torch.testing.assert_close(paged_attention(queries, pool, 1, in_place, window)[there], wanted)


def test_rotary_and_write_equal_torch_and_store_nothing_that_is_not_finite() -> None:
    rows = ((1, 17), (3, 3))
    size, pages = tables(rows, 16)
    pool = random(size, 2, 2, 2, 16, 8)
    wanted_pool = pool.clone()
    heads = random(4, 6 + 2 + 2, 8)
    heads[1, 6:] = torch.nan
    heads[2, 9] = torch.inf
    cos, sin = random(4, 1, 4).cos().repeat(1, 1, 2), random(4, 1, 8)
    sin[..., :4] = -sin[..., 4:]
    queries, totals = [n for n, _ in rows], [kv for _, kv in rows]
    theirs = ragged.build_metadata(queries, totals, pages, pool, (0,), attention.Workspace(pool.dtype, DEVICE))
    wanted = attention.rotate_and_write(heads.clone(), cos, sin, wanted_pool, 1, theirs)
    ours = metadata_builder(pool, 6, (0,))(queries, totals, pages)
    got = triton_rotary.rotate_and_write(heads, cos, sin, pool, 1, ours)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(pool, wanted_pool)


def test_norms_and_activation_equal_torch() -> None:
    x, residual, weight = random(3, 24), random(5, 24)[2:], random(24)
    torch.testing.assert_close(triton_norm.rms_norm(x, weight, 1e-3), rms_norm(x, weight, 1e-3))
    heads, per_head = random(3, 7, 8)[:, :5], random(5, 8)
    wanted = rms_norm(heads, per_head, 1e-3)
    torch.testing.assert_close(triton_norm.rms_norm(heads, per_head, 1e-3), wanted)
    triton_norm.rms_norm_(heads, per_head, 1e-3)
    torch.testing.assert_close(heads, wanted)
    total, normed = triton_norm.add_rms_norm(x, residual, weight, 1e-3)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, rms_norm(x + residual, weight, 1e-3))
    torch.testing.assert_close(triton_activation.silu_and_mul(x), silu_and_mul(x))


def test_gather_scatter_and_copy_move_whole_blocks() -> None:
    source = random(6, 3, 2, 2, 4, 8, dtype=torch.bfloat16)
    target = torch.zeros_like(source)
    staged = triton_blocks.gather_blocks(source, ids(4, 1))
    assert torch.equal(staged, blocks.gather_blocks(source, ids(4, 1)))
    triton_blocks.scatter_blocks(target, ids(0, 3), staged)
    triton_blocks.copy_blocks(target, ids(3), ids(5))
    assert torch.equal(target[[0, 3, 5]], source[[4, 1, 1]])
    assert not target[[1, 2, 4]].any()
