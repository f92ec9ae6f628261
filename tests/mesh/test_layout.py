"""Two layouts: equal, convertible, or refused by the name of a field."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from mesh.layout import DTYPE_BYTES, FLOATS, Comparison, KvLayout

LAYOUT = KvLayout(layers=2, kv_heads=4, head_dim=8, block_tokens=16, dtype="float32")


def test_a_block_is_the_product_of_its_shape() -> None:
    assert LAYOUT.shape == (2, 2, 4, 16, 8)
    assert LAYOUT.block_bytes == 2 * 2 * 4 * 16 * 8 * 4 == 16 * LAYOUT.token_bytes
    half = replace(LAYOUT, tp=2, rank=1, dtype="float16")
    assert (half.shape, half.block_bytes) == ((2, 2, 2, 16, 8), LAYOUT.block_bytes // 4)


@pytest.mark.parametrize(
    ("kv_heads", "tp", "heads"),
    [
        (4, 1, [[0, 1, 2, 3]]),
        (4, 2, [[0, 1], [2, 3]]),
        (4, 4, [[0], [1], [2], [3]]),
        (2, 4, [[0], [0], [1], [1]]),
        (1, 2, [[0], [0]]),
    ],
)
def test_a_rank_has_its_share_of_the_heads(kv_heads: int, tp: int, heads: list[list[int]]) -> None:
    slices = [replace(LAYOUT, kv_heads=kv_heads, tp=tp, rank=rank) for rank in range(tp)]
    assert [list(layout.heads) for layout in slices] == heads


def test_equal_layouts_need_nothing() -> None:
    assert LAYOUT.difference(replace(LAYOUT)) == ""
    assert LAYOUT.taking(replace(LAYOUT)) == Comparison()
    assert LAYOUT.taking(LAYOUT).equal


@pytest.mark.parametrize(("mine", "theirs"), list(product(FLOATS, FLOATS)))
def test_number_formats_are_converted(mine: str, theirs: str) -> None:
    found = replace(LAYOUT, dtype=mine).taking(replace(LAYOUT, dtype=theirs))
    assert found == Comparison("", () if mine == theirs else (f"dtype {theirs} -> {mine}",))


@pytest.mark.parametrize(
    ("change", "conversions"),
    [
        ({"block_tokens": 64}, ("block_tokens 64 -> 16",)),
        ({"block_tokens": 64, "dtype": "bfloat16"}, ("block_tokens 64 -> 16", "dtype bfloat16 -> float32")),
        ({"tp": 2, "rank": 1}, ("tp 2 -> 1",)),
    ],
)
def test_what_is_converted_is_said_with_both_values(change: dict[str, Any], conversions: tuple[str, ...]) -> None:
    found = LAYOUT.taking(replace(LAYOUT, **change))
    assert found == Comparison("", conversions)
    assert not found.equal


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"layers": 3}, "layers 3 -> 2"),
        ({"kv_heads": 8}, "kv_heads 8 -> 4"),
        ({"head_dim": 4}, "head_dim 4 -> 8"),
        ({"dtype": "uint8"}, "dtype uint8 -> float32"),
        ({"dtype": "int4"}, "dtype 'int4' is not known"),
        ({"layers": 0}, "layers 0"),
        ({"block_tokens": -1}, "block_tokens -1"),
        ({"tp": 0}, "tp 0"),
        ({"tp": 2, "rank": 2}, "rank 2 of 2"),
        ({"rank": -1}, "rank -1 of 1"),
        ({"tp": 3}, "tp 3 does not cut 4 heads evenly"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_the_name_of_the_field(change: dict[str, Any], refused: str) -> None:
    assert LAYOUT.taking(replace(LAYOUT, **change)) == Comparison(refused)


@pytest.mark.parametrize(
    ("mine", "theirs", "refused"),
    [
        ((2, 0), (2, 1), "rank 1 of 2 -> 0 of 2: no head in common"),
        ((2, 0), (4, 3), "rank 3 of 4 -> 0 of 2: no head in common"),
        ((2, 1), (4, 3), ""),
        ((4, 1), (1, 0), ""),
    ],
)
def test_slices_are_exchanged_where_they_have_heads_in_common(
    mine: tuple[int, int], theirs: tuple[int, int], refused: str
) -> None:
    here, there = (replace(LAYOUT, tp=tp, rank=rank) for tp, rank in (mine, theirs))
    assert here.taking(there).refused == refused


def test_ranks_with_the_same_heads_are_equal_to_each_other() -> None:
    """More ranks than heads: two of them have the same."""
    first, second = (replace(LAYOUT, kv_heads=2, tp=4, rank=rank) for rank in (0, 1))
    assert first.taking(second).equal


def test_every_number_format_has_a_size() -> None:
    assert set(FLOATS) < set(DTYPE_BYTES)
