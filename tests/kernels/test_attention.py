"""Paged attention against a dense reference, for every way in which a step's rows can be cut."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from kernels import products, ragged
from kernels.attention import AttentionMetadata, Workspace, paged_attention, storable, write_kv

LAYERS, BLOCK_TOKENS, DIM = 2, 4, 8
MIXED = ((1, 1), (1, 9), (1, 30), (3, 3), (4, 17), (7, 7), (20, 33), (1, 14))
"""Tokens in the step and tokens in all, per row."""


@dataclass
class Case:
    """Random keys and values of some rows, scattered over a pool, and the queries of one step."""

    pool: Tensor
    queries: Tensor
    histories: list[Tensor]
    """Per row: `[tokens, 2 * kv_heads, dim]`."""
    lengths: tuple[tuple[int, int], ...]
    tables: list[list[int]]

    def metadata(self, lengths: tuple[tuple[int, int], ...], windows: tuple[int, ...] = (0,)) -> AttentionMetadata:
        workspace = Workspace(self.pool.dtype, self.pool.device)
        counts, totals = [n for n, _ in lengths], [kv for _, kv in lengths]
        return ragged.build_metadata(counts, totals, self.tables, self.pool, windows, workspace)

    def run(self, window: int) -> Tensor:
        metadata = self.metadata(self.lengths, (window,))
        return paged_attention(self.queries, self.pool, 1, metadata, window)


def make(lengths: tuple[tuple[int, int], ...], heads: int, kv_heads: int, fill: float = 0.0) -> Case:
    generator = torch.Generator().manual_seed(3)
    sizes = [-(-kv // BLOCK_TOKENS) for _, kv in lengths]
    pages = torch.randperm(sum(sizes) + 5, generator=generator).tolist()
    tables = [[pages.pop() for _ in range(size)] for size in sizes]
    pool = torch.full((sum(sizes) + 5, LAYERS, 2, kv_heads, BLOCK_TOKENS, DIM), fill)
    histories = [torch.randn(kv, 2 * kv_heads, DIM, generator=generator) for _, kv in lengths]
    queries = torch.randn(sum(n for n, _ in lengths), heads, DIM, generator=generator)
    case = Case(pool, queries, histories, lengths, tables)
    write_kv(pool, 1, storable(torch.cat(histories)), case.metadata(tuple((kv, kv) for _, kv in lengths)).slots)
    return case


def dense(case: Case, window: int) -> Tensor:
    """The textbook formula in float64, one row and head at a time."""
    out, start = [], 0
    for (n, kv), history in zip(case.lengths, case.histories, strict=True):
        q = case.queries[start : start + n].double()
        keys, values = history.double().chunk(2, dim=1)
        group = q.shape[1] // keys.shape[1]
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q, keys) / math.sqrt(DIM)
        at = torch.arange(kv - n, kv)[:, None]
        key = torch.arange(kv)[None]
        hidden = (key > at) | ((key <= at - window) if window else torch.zeros((), dtype=torch.bool))
        weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", weights, values))
        start += n
    return torch.cat(out)


def assert_equals_dense(case: Case, window: int) -> None:
    torch.testing.assert_close(case.run(window).double(), dense(case, window), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [0, 1, 5, 16, 100])
def test_mixed_step_equals_dense_attention(kv_heads: int, window: int) -> None:
    assert_equals_dense(make(MIXED, 4, kv_heads), window)


@pytest.mark.parametrize("window", [0, 6])
def test_rows_in_length_order_share_batches(window: int) -> None:
    case = make(tuple(sorted(MIXED)), 4, 2)
    batches = case.metadata(case.lengths, (window,)).batches[window]
    assert len(batches) < len(MIXED)
    assert_equals_dense(case, window)


@pytest.mark.parametrize("window", [0, 3, 11])
def test_long_rows_are_tiled(monkeypatch: pytest.MonkeyPatch, window: int) -> None:
    monkeypatch.setattr(ragged, "LARGE_TILE", 64)
    monkeypatch.setattr(ragged, "TILE_QUERIES", 8)
    case = make(((30, 30), (1, 90), (19, 61)), 4, 2)
    batches = case.metadata(case.lengths, (window,)).batches[window]
    assert max(batch.queries for batch in batches) == 8
    assert_equals_dense(case, window)


def test_a_tile_reads_only_the_keys_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ragged, "LARGE_TILE", 64)
    monkeypatch.setattr(ragged, "TILE_QUERIES", 8)
    case = make(((32, 32),), 4, 2)
    causal, windowed = case.metadata(case.lengths, (0, 4)).batches.values()
    assert [batch.pages.numel() for batch in causal] == [2 * 2 * n for n in (2, 4, 6, 8)]
    assert all(batch.pages.numel() <= 2 * 2 * 3 for batch in windowed)


def test_batches_cover_the_step_in_order_and_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    budget = 8 * 2 * 2 * BLOCK_TOKENS * DIM * 4
    monkeypatch.setattr(ragged, "CPU_BATCH_BYTES", budget)
    case = make(tuple((1, kv) for kv in range(1, 33)), 4, 2)
    batches = case.metadata(case.lengths).batches[0]
    assert [batch.start for batch in batches] == [0, *(batch.stop for batch in batches[:-1])]
    assert batches[-1].stop == 32
    assert all(batch.pages.numel() * BLOCK_TOKENS * DIM * 4 <= budget for batch in batches)
    assert_equals_dense(case, 0)


def test_short_row_does_not_pay_for_a_long_neighbour() -> None:
    case = make((*((1, 4) for _ in range(8)), (1, 4000)), 4, 2)
    batches = case.metadata(case.lengths).batches[0]
    assert [batch.rows for batch in batches] == [8, 1]
    assert_equals_dense(case, 0)


def test_what_pages_hold_beyond_a_rows_tokens_is_not_seen() -> None:
    assert torch.equal(make(MIXED, 4, 2, fill=3.0).run(0), make(MIXED, 4, 2, fill=0.0).run(0))


def test_values_that_are_not_finite_never_reach_a_page() -> None:
    case = make(((1, 6),), 4, 2)
    kv = torch.full((6, 4, DIM), math.nan)
    kv[3:] = math.inf
    write_kv(case.pool, 0, storable(kv), case.metadata(((6, 6),)).slots)
    assert torch.isfinite(case.pool).all()


def test_write_touches_only_its_layer_and_its_tokens() -> None:
    case = make(((1, 6),), 4, 2, fill=9.0)
    pages = case.pool[case.tables[0]]
    assert (pages[:, 0] == 9.0).all()
    stored = pages[:, 1].permute(0, 3, 1, 2, 4).reshape(-1, 4, DIM)
    assert torch.equal(stored[:6], case.histories[0])
    assert (stored[6:] == 9.0).all()
    assert int((case.pool != 9.0).sum()) == 6 * 4 * DIM


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pool(dtype: torch.dtype) -> None:
    case = make(MIXED, 4, 2)
    wanted = dense(case, 5)
    half = Case(case.pool.to(dtype), case.queries.to(dtype), case.histories, case.lengths, case.tables)
    torch.testing.assert_close(half.run(5).double(), wanted, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("window", [0, 30])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, kv) for kv in (70, 80, 90, 100)],
        [(1, 101)],
        [(60, kv) for kv in (70, 80, 90, 100)],
        [(50, 50), (49, 70), (40, 40)],
        [(150, 150)],
        [(90, 300)],
    ],
    ids=["decode", "row", "chunks", "padded", "prompt", "chunk"],
)
def test_whole_products_in_bfloat16_are_as_exact_as_torchs_attention(
    monkeypatch: pytest.MonkeyPatch, kv_heads: int, window: int, lengths: list[tuple[int, int]]
) -> None:
    case = make(tuple(lengths), 6, kv_heads)
    pool, queries = case.pool.bfloat16(), (4 * case.queries).bfloat16()  # of a size at which rounding shows
    half = Case(pool, queries, case.histories, case.lengths, case.tables)
    exact = Case(pool.double(), queries.double(), case.histories, case.lengths, case.tables).run(window)
    errors = []
    for few in (1 << 30, 1):
        monkeypatch.setattr(products, "FEW_KEYS", few)
        monkeypatch.setattr(products, "FEW_SCORES", few)
        errors.append(float((half.run(window).double() - exact).norm() / exact.norm()))
    assert errors[0] != errors[1]
    assert errors[1] < 2 * errors[0]


@pytest.mark.parametrize("lengths", [(7,), (3, 4, 30), (1, 9, 17, 25)])
def test_metadata_of_rows_that_go_on_are_those_of_a_step_built_anew(lengths: tuple[int, ...]) -> None:
    tables = [list(range(row * 16, row * 16 + 13)) for row in range(len(lengths))]
    pool = torch.zeros(64, LAYERS, 2, 2, BLOCK_TOKENS, DIM)
    workspace, ones = Workspace(pool.dtype, pool.device), [1] * len(lengths)
    pages = None
    for step in range(20):
        totals = [length + step for length in lengths]
        got = ragged.build_metadata(ones, totals, tables, pool, (0,), workspace)
        anew = ragged.build_metadata(ones, totals, tables, pool, (0,), Workspace(pool.dtype, pool.device))
        assert torch.equal(got.positions, anew.positions)
        assert torch.equal(got.slots, anew.slots)
        assert (got.number, got.continues) == (step + 1, step > 0)
        for one, other in zip(got.batches[0], anew.batches[0], strict=True):
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b
        crosses = any((total - 1) % BLOCK_TOKENS == 0 for total in totals)
        assert (got.batches[0][0].pages is pages) == (step > 0 and not crosses)
        pages = got.batches[0][0].pages
