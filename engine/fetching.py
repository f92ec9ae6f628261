"""Blocks that a FETCHING request lacks, and how they come in.

A block that arrives is an ordinary cached block from then on; one that does not arrive is an ordinary cache miss. From
a worker of another layout come parts: its blocks may be larger or smaller, or hold some of the heads. A block of which
a part is missing at the end has not arrived.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from engine.cache.request_blocks import RequestBlocks
from engine.request import EngineRequest
from engine.step import Missing, Runner
from mesh.blockhash import cut
from mesh.layout import KvLayout
from mesh.pieces import Piece, covering, pieces

Marks = npt.NDArray[np.bool_]


class Fetching:
    """The FETCHING requests of one engine."""

    def __init__(self, blocks: RequestBlocks, runner: Runner) -> None:
        self._blocks = blocks
        self._runner = runner
        self._requests: dict[str, EngineRequest] = {}
        self._missing: dict[str, dict[int, Missing]] = {}
        self._filled: dict[str, dict[int, int]] = {}
        """Valid tokens of the blocks that came from outside, by request and position."""
        self._written: dict[str, dict[int, Marks]] = {}
        """`[heads, valid_tokens]` of each of the request's `partial_pages`: what has come."""

    def __len__(self) -> int:
        return len(self._requests)

    def begin(self, request: EngineRequest, theirs: KvLayout | None = None) -> tuple[Missing, ...]:
        """Holds the blocks that are here already, wherever in the request they lie; returns the others, or the blocks
        of a worker with the layout `theirs` that have something of the others."""
        blocks, size = self._blocks, self._blocks.block_tokens
        missing: dict[int, Missing] = {}
        for index, name in enumerate(blocks.names(request)):
            block = blocks.pool.find(name)
            if block is None:
                missing[index] = Missing(index, name, size)
            else:
                request.fetched_pages[index] = block
        if request.fetched_pages:
            blocks.holders.add(request)
        blocks.in_flight.begin(request, [m.hash for m in missing.values()])
        tail = blocks.tail(request)
        if tail is not None:
            index = request.num_initial_tokens // size
            missing[index] = Missing(index, *tail)
        self._requests[request.key] = request
        self._missing[request.key] = missing
        self._filled[request.key] = {}
        self._written[request.key] = {}
        if theirs is None or theirs.block_tokens == size:
            return tuple(missing.values())
        tokens = request.tokens[: request.num_initial_tokens]
        cuts = cut(request.hash_root, tokens, theirs.block_tokens)
        asked = covering(self._runner.layout, theirs, missing, len(tokens))
        return tuple(Missing(index, *cuts[index]) for index in asked)

    def fill(self, key: str, index: int, payload: bytes | memoryview) -> bool:
        """Writes a verified block into a page and names it; False when nobody lacks it or no page is left."""
        missing = self._missing.get(key, {}).get(index)
        if missing is None or len(payload) != self._runner.layout.block_bytes:
            return False
        block = self._page(missing, payload)
        if block is None:
            return False
        self._take(self._requests[key], missing, block)
        return True

    def fill_parts(self, key: str, index: int, payload: bytes | memoryview, theirs: KvLayout) -> bool:
        """Writes what a verified block of another layout has of the blocks that the request lacks."""
        request, missing = self._requests.get(key), self._missing.get(key, {})
        if request is None or len(payload) != theirs.block_bytes:
            return False
        lacked = [(missing[p.index], p) for p in pieces(self._runner.layout, theirs, index) if p.index in missing]
        parts = [(block, p) for m, p in lacked if (block := self._page_for(request, m)) is not None]
        if parts:
            self._runner.write_parts(payload, theirs, parts)
        for one, piece in lacked:
            self._note(request, one, piece)
        return bool(parts)

    def end(self, request: EngineRequest) -> None:
        """The request leaves FETCHING with what it has got; counts where its tokens came from."""
        filled = self._filled[request.key]
        self._blocks.take_fetched(request)
        self._blocks.in_flight.leave(request)
        num_here = len(request.block_table)
        fetched = sum(valid for index, valid in filled.items() if index < num_here)
        request.num_fetched_tokens = min(fetched, request.num_prompt_tokens)
        cached = request.num_computed_tokens - fetched
        request.num_cached_tokens = min(cached, request.num_prompt_tokens - request.num_fetched_tokens)
        self.forget(request)

    def give_up(self, request: EngineRequest) -> None:
        """The request loses its pages and lacks nothing any more: what still arrives for it is not accepted."""
        self._blocks.drop(request)
        self._missing[request.key].clear()
        self._filled[request.key].clear()
        self._written[request.key].clear()

    def forget(self, request: EngineRequest) -> None:
        """The request is not FETCHING any more; does nothing when it never was."""
        self._requests.pop(request.key, None)
        self._missing.pop(request.key, None)
        self._filled.pop(request.key, None)
        self._written.pop(request.key, None)

    def _page(self, missing: Missing, payload: bytes | memoryview) -> int | None:
        """A page with the block's content: the index's own if the content is known by now."""
        pool = self._blocks.pool
        full = missing.valid_tokens == self._blocks.block_tokens
        block = pool.find(missing.hash) if full else None
        if block is not None:
            return block
        block = pool.allocate()
        if block is not None:
            self._runner.write_block(block, payload)
            if full:
                pool.register(block, missing.hash)
        return block

    def _take(self, request: EngineRequest, missing: Missing, block: int) -> None:
        """`block` is the page of what was missing."""
        del self._missing[request.key][missing.index]
        self._filled[request.key][missing.index] = missing.valid_tokens
        request.fetched_pages[missing.index] = block
        self._blocks.holders.add(request)
        self._blocks.in_flight.done(request, missing.hash)

    def _page_for(self, request: EngineRequest, missing: Missing) -> int | None:
        """The page for parts of a block: the one that others are in, else a new one; None when none is left."""
        block = request.partial_pages.get(missing.index)
        if block is None:
            block = self._blocks.pool.allocate()
            if block is not None:
                request.partial_pages[missing.index] = block
                self._blocks.holders.add(request)
                shape = len(self._runner.layout.heads), missing.valid_tokens
                self._written[request.key][missing.index] = np.zeros(shape, np.bool_)
        return block

    def _note(self, request: EngineRequest, missing: Missing, piece: Piece) -> None:
        """A part was written; the last one makes the page an ordinary block."""
        marks = self._written[request.key].get(missing.index)
        if marks is None:
            return
        marks[piece.target] = True
        if marks.all():
            del self._written[request.key][missing.index]
            block = request.partial_pages.pop(missing.index)
            if missing.valid_tokens == self._blocks.block_tokens:
                self._blocks.pool.register(block, missing.hash)
            self._take(request, missing, block)
