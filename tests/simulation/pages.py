"""A simulated worker's pages, watched: what is sealed is never written, what is free turns to garbage at once."""

from __future__ import annotations

from collections.abc import Sequence

from engine.engine import Engine
from engine.sim_engine import SimRunner
from engine.step import Row, Sampled
from mesh.layout import KvLayout
from mesh.pieces import Piece
from tests.simulation.oracle import VOCAB, Oracle, Violation

GARBAGE = 0xDEADBEEFDEADBEEF


class WatchedRunner(SimRunner):
    """Production's simulated model; a write into a page that carries a name is a violation."""

    def __init__(self, num_blocks: int, block_tokens: int, max_model_len: int) -> None:
        super().__init__(num_blocks, block_tokens, VOCAB, max_model_len=max_model_len)
        self.engine: Engine | None = None
        self.computed = 0
        """Tokens that passed through the model."""
        self._known: dict[int, bytes] = {}
        """Pages that were looked at under their present name."""
        self._pool.fill(GARBAGE)

    def run(self, rows: Sequence[Row]) -> list[Sampled]:
        size = self.layout.block_tokens
        for row in rows:
            request = row.request
            self.computed += row.num_tokens
            first = request.num_computed_tokens // size
            last = (request.num_computed_tokens + row.num_tokens - 1) // size
            for block in request.block_table[first : last + 1]:
                self._must_be_nameless(block)
        return super().run(rows)

    def write_block(self, block: int, payload: bytes | memoryview) -> None:
        self._must_be_nameless(block)
        super().write_block(block, payload)

    def write_parts(self, payload: bytes | memoryview, theirs: KvLayout, parts: Sequence[tuple[int, Piece]]) -> None:
        for block, _ in parts:
            self._must_be_nameless(block)
        super().write_parts(payload, theirs, parts)

    def _must_be_nameless(self, block: int) -> None:
        if self.engine is not None and self.engine.pool.index.name_of(block) is not None:
            raise Violation(f"page {block} is written after it was sealed")

    def check(self, oracle: Oracle) -> None:
        """The named pages hold what they should; the free ones are overwritten, so that late readers are found."""
        assert self.engine is not None
        pool = self.engine.pool
        names = pool.index._name
        if names != self._known:
            for block, name in names.items():
                if self._known.get(block) != name:
                    oracle.check(name, self._pool[block].tobytes(), f"page {block} is published")
            self._known = dict(names)
        if pool._free:
            self._pool[pool._free] = GARBAGE
