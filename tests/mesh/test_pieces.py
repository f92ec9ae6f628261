"""Which part of whose block goes where, against a map of every single token and head."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from mesh.layout import KvLayout
from mesh.pieces import covering, pieces

LAYOUT = KvLayout(layers=1, kv_heads=4, head_dim=1, block_tokens=16, dtype="float32")
NUM_TOKENS = 200
CUTS = [(1, 0), (2, 0), (2, 1), (4, 2)]


def blocks_of(layout: KvLayout) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    """`[blocks, heads, block_tokens]`: at each place a number that says which head of which token it is."""
    count = -(-NUM_TOKENS // layout.block_tokens)
    tokens = np.arange(count * layout.block_tokens).reshape(count, 1, -1)
    heads = np.array(layout.heads).reshape(1, -1, 1)
    marks: np.ndarray[tuple[int, ...], np.dtype[np.int64]] = tokens * 100 + heads + 1
    return marks


@pytest.mark.parametrize(("mine", "theirs"), list(product((8, 16, 24, 64), (8, 16, 24, 64))))
@pytest.mark.parametrize(("my_cut", "their_cut"), list(product(CUTS, CUTS)))
def test_every_token_and_head_that_both_have_arrives_where_it_belongs(
    mine: int, theirs: int, my_cut: tuple[int, int], their_cut: tuple[int, int]
) -> None:
    own = replace(LAYOUT, block_tokens=mine, tp=my_cut[0], rank=my_cut[1])
    other = replace(LAYOUT, block_tokens=theirs, tp=their_cut[0], rank=their_cut[1])
    wanted, source = blocks_of(own), blocks_of(other)
    written = np.zeros_like(wanted)
    for index, block in enumerate(source):
        for piece in pieces(own, other, index):
            if piece.index < len(written):
                part = written[piece.index][piece.target]
                assert not part.any(), "written twice"
                part[...] = block[piece.source]
    common = np.isin(own.heads, other.heads)
    assert not written[:, ~common].any()
    here = wanted[:, common] < len(source) * theirs * 100
    np.testing.assert_array_equal(written[:, common][here], wanted[:, common][here])


@pytest.mark.parametrize(
    ("mine", "theirs", "blocks", "asked"),
    [
        (16, 64, [0, 1, 2, 3], [0]),
        (16, 64, [3, 4], [0, 1]),
        (64, 16, [0], [0, 1, 2, 3]),
        (64, 16, [1, 3], [4, 5, 6, 7, 12]),
        (16, 16, [2, 5], [2, 5]),
        (24, 16, [1], [1, 2]),
        (64, 16, [], []),
    ],
)
def test_the_blocks_to_ask_for(mine: int, theirs: int, blocks: list[int], asked: list[int]) -> None:
    """Of 200 tokens the last block of 64 has 8, so only one of the four blocks of 16 exists."""
    own, other = replace(LAYOUT, block_tokens=mine), replace(LAYOUT, block_tokens=theirs)
    assert covering(own, other, blocks, NUM_TOKENS) == asked
