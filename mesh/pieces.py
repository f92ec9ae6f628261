"""Which part of another worker's block belongs where in one's own blocks: token ranges and heads, no bytes.

    holder's blocks of 64     [ 0 ........................ 63 ][ 64 ...
    own blocks of 16          [ 0 .. 15 ][ 16 .. 31 ][ 32 .. 47 ][ 48 .. 63 ][ 64 ...

Both are cut from the first token of the sequence on. Heads are cut into slices by tensor parallelism: a piece has those
that both sides hold.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mesh.layout import KvLayout


@dataclass(frozen=True, slots=True)
class Piece:
    """What one of the holder's blocks has of one of one's own; slices are heads and tokens within each."""

    index: int
    """One's own block."""
    target: tuple[slice, slice]
    source: tuple[slice, slice]


def pieces(own: KvLayout, theirs: KvLayout, index: int) -> Iterator[Piece]:
    """Where the holder's block `index` goes."""
    heads = range(max(own.heads.start, theirs.heads.start), min(own.heads.stop, theirs.heads.stop))
    if not heads:
        return
    first, end = index * theirs.block_tokens, (index + 1) * theirs.block_tokens
    for block in range(first // own.block_tokens, -(-end // own.block_tokens)):
        start = block * own.block_tokens
        tokens = range(max(first, start), min(end, start + own.block_tokens))
        yield Piece(
            block,
            (_within(heads, own.heads.start), _within(tokens, start)),
            (_within(heads, theirs.heads.start), _within(tokens, first)),
        )


def covering(own: KvLayout, theirs: KvLayout, blocks: Iterable[int], num_tokens: int) -> list[int]:
    """The holder's blocks that have something of these own blocks of a sequence of `num_tokens`, ascending."""
    found: set[int] = set()
    for block in blocks:
        first, end = block * own.block_tokens, min((block + 1) * own.block_tokens, num_tokens)
        found.update(range(first // theirs.block_tokens, -(-end // theirs.block_tokens)))
    return sorted(found)


def _within(part: range, start: int) -> slice:
    return slice(part.start - start, part.stop - start)
