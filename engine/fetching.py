"""Blocks that a FETCHING request lacks, and how they come in.

A block that arrives is an ordinary cached block from then on; one that does not arrive is an ordinary cache miss.
"""

from __future__ import annotations

from engine.cache.request_blocks import RequestBlocks
from engine.request import EngineRequest
from engine.step import Missing, Runner


class Fetching:
    """The FETCHING requests of one engine."""

    def __init__(self, blocks: RequestBlocks, runner: Runner) -> None:
        self._blocks = blocks
        self._runner = runner
        self._requests: dict[str, EngineRequest] = {}
        self._missing: dict[str, dict[int, Missing]] = {}
        self._filled: dict[str, dict[int, int]] = {}
        """Valid tokens of the blocks that came from outside, by request and position."""

    def __len__(self) -> int:
        return len(self._requests)

    def begin(self, request: EngineRequest) -> tuple[Missing, ...]:
        """Holds the blocks that are here already, wherever in the request they lie; returns the others."""
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
        return tuple(missing.values())

    def fill(self, key: str, index: int, payload: bytes | memoryview) -> bool:
        """Writes a verified block into a page and names it; False when nobody lacks it or no page is left."""
        missing = self._missing.get(key, {}).get(index)
        if missing is None or len(payload) != self._runner.layout.block_bytes:
            return False
        block = self._page(missing, payload)
        if block is None:
            return False
        request = self._requests[key]
        del self._missing[key][index]
        self._filled[key][index] = missing.valid_tokens
        request.fetched_pages[index] = block
        self._blocks.holders.add(request)
        self._blocks.in_flight.done(request, missing.hash)
        return True

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

    def forget(self, request: EngineRequest) -> None:
        """The request is not FETCHING any more; does nothing when it never was."""
        self._requests.pop(request.key, None)
        self._missing.pop(request.key, None)
        self._filled.pop(request.key, None)

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
