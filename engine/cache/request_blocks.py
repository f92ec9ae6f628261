"""Which blocks a request holds: found in the prefix index, allocated, named when complete, given back.

0 .. num_sealed_blocks .. len(block_table)
[ complete and named )[ being written )
"""

from __future__ import annotations

from collections.abc import Iterable

from engine.arrival import ArrivalQueue
from engine.cache.block_pool import BlockPool
from engine.cache.in_flight import InFlight
from engine.cache.tails import Tails
from engine.errors import IntegrityError
from engine.request import EngineRequest
from engine.step import BlockReady
from mesh.blockhash import BlockHash, block_hash


class RequestBlocks:
    """Moves pages between the pool and requests; the only code that changes a request's block fields."""

    def __init__(self, pool: BlockPool, block_tokens: int) -> None:
        self.pool = pool
        self.block_tokens = block_tokens
        self.in_flight = InFlight()
        self.tails = Tails()
        self.holders = ArrivalQueue()
        """Every request that references a page."""

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that cover so many positions."""
        return -(-num_tokens // self.block_tokens)

    def names(self, request: EngineRequest) -> list[BlockHash]:
        """Names of all full blocks of the request's tokens."""
        hashes, size = request.block_hashes, self.block_tokens
        for index in range(len(hashes), len(request.tokens) // size):
            hashes.append(self._name(request, index, (index + 1) * size))
        return hashes

    def tail(self, request: EngineRequest) -> tuple[BlockHash, int] | None:
        """Name and valid tokens of the partly filled last block of the tokens that the request came with."""
        valid = request.num_initial_tokens % self.block_tokens
        if valid == 0:
            return None
        self.names(request)
        return self._name(request, request.num_initial_tokens // self.block_tokens, request.num_initial_tokens), valid

    def match(self, request: EngineRequest) -> None:
        """Extends the request's computed prefix by blocks that the index has, up to all tokens but the last: at
        least one token must pass through the model to give the next one."""
        table = request.block_table
        if len(table) * self.block_tokens != request.num_computed_tokens or request.wants_prompt_logprobs:
            return
        names = self.names(request)
        for index in range(len(table), (len(request.tokens) - 1) // self.block_tokens):
            block = self.pool.find(names[index])
            if block is None:
                break
            table.append(block)
        request.num_computed_tokens = len(table) * self.block_tokens
        request.num_sealed_blocks = len(table)
        if table:
            self.holders.add(request)

    def awaited(self, request: EngineRequest) -> BlockHash | None:
        """The last block, from the first uncached one on, that an earlier request is about to have in one run."""
        if request.num_computed_tokens % self.block_tokens or request.wants_prompt_logprobs:
            return None
        names, last = self.names(request), None
        for index in range(len(request.block_table), (len(request.tokens) - 1) // self.block_tokens):
            name = names[index]
            if not self.in_flight.ahead_of(request, name):
                break
            last = name
        return last

    def announce(self, request: EngineRequest) -> None:
        """Says that the request computes its uncached full blocks from now on."""
        self.in_flight.begin(request, self.names(request)[request.num_sealed_blocks :])

    def grow(self, request: EngineRequest, num_tokens: int) -> bool:
        """Gives the request pages for positions `[0, num_tokens)`; False when the pool ran out on the way."""
        table = request.block_table
        needed = self.blocks_for(num_tokens)
        while len(table) < needed:
            block = self.pool.allocate()
            if block is None:
                return False
            table.append(block)
            self.holders.add(request)
        return True

    def seal(self, request: EngineRequest) -> None:
        """Names the blocks that the last step completed, so that others can find them."""
        names = self.names(request)
        for index in range(request.num_sealed_blocks, request.num_computed_tokens // self.block_tokens):
            self.pool.register(request.block_table[index], names[index])
            self.in_flight.done(request, names[index])
            request.num_sealed_blocks = index + 1

    def newly_ready(self, request: EngineRequest) -> list[BlockReady]:
        """Complete blocks not reported yet, then the tail once all the tokens that the request came with are done;
        each can be exported from now on, as long as its page is held."""
        ready = []
        for index in range(request.num_ready_blocks, request.num_sealed_blocks):
            ready.append(BlockReady(request, index, request.block_hashes[index], self.block_tokens))
        request.num_ready_blocks = request.num_sealed_blocks
        if request.num_computed_tokens >= request.num_initial_tokens and request not in self.tails:
            tail = self.tail(request)
            if tail is not None:
                index = request.num_initial_tokens // self.block_tokens
                self.tails.add(request, tail[0], request.block_table[index], tail[1])
                ready.append(BlockReady(request, index, *tail))
        return ready

    def export(self, name: BlockHash) -> tuple[int, int] | None:
        """The page with this content and its valid tokens: a full block, or a tail whose request still holds it."""
        block = self.pool.index.lookup(name)
        return (block, self.block_tokens) if block is not None else self.tails.find(name)

    def take_fetched(self, request: EngineRequest) -> None:
        """Turns a FETCHING request's pages into its block table, as far as they are contiguous, with a last look at
        the index for those that did not arrive; sets `num_computed_tokens`."""
        num_full = request.num_initial_tokens // self.block_tokens
        for index in range(self.blocks_for(request.num_initial_tokens)):
            block = request.fetched_pages.pop(index, None)
            if block is None and index < num_full:
                block = self.pool.find(request.block_hashes[index])
            if block is None:
                break
            request.block_table.append(block)
        self._release_fetched(request)
        request.num_computed_tokens = min(request.num_initial_tokens, len(request.block_table) * self.block_tokens)
        request.num_sealed_blocks = min(len(request.block_table), num_full)
        self._note(request)

    def owe_last(self, request: EngineRequest) -> None:
        """Leaves at least one token to compute. A page that others may read is never written again, so where the
        last token completes a block, the whole block is given back and owed."""
        last = len(request.tokens) - 1
        if request.num_computed_tokens <= last:
            return
        if request.num_sealed_blocks * self.block_tokens > last:
            self.trim(request, request.num_sealed_blocks - 1)
        else:
            request.num_computed_tokens = last

    def trim(self, request: EngineRequest, num_blocks: int) -> None:
        """Keeps the first `num_blocks` blocks, all sealed, and owes what follows."""
        released = request.block_table[num_blocks:]
        del request.block_table[num_blocks:]
        self._release(released)
        request.num_computed_tokens = min(request.num_computed_tokens, num_blocks * self.block_tokens)
        request.num_sealed_blocks = min(request.num_sealed_blocks, num_blocks)
        self._note(request)

    def drop(self, request: EngineRequest) -> None:
        """Gives every page back. The last blocks go first, so that a prefix is evicted from its end."""
        self.in_flight.leave(request)
        self.tails.leave(request)
        self._release_fetched(request)
        self._release(request.block_table)
        request.block_table.clear()
        request.num_computed_tokens = request.num_sealed_blocks = request.num_ready_blocks = 0
        self.holders.discard(request)

    def check(self, requests: Iterable[EngineRequest]) -> None:
        """Raises `IntegrityError` unless these requests hold exactly the blocks that the pool thinks are held."""
        held: dict[int, int] = {}
        num_holders = 0
        for request in requests:
            pages = [*request.block_table, *request.fetched_pages.values(), *request.partial_pages.values()]
            num_holders += bool(pages)
            if bool(pages) != (request in self.holders):
                raise IntegrityError(f"request {request.key} holds {len(pages)} pages, the list of holders is wrong")
            for block in pages:
                held[block] = held.get(block, 0) + 1
        if num_holders != len(self.holders):
            raise IntegrityError("a request that is gone is still listed as a holder")
        self.pool.check(held)

    def _release(self, blocks: list[int]) -> None:
        for block in reversed(blocks):
            self.pool.release(block)

    def _release_fetched(self, request: EngineRequest) -> None:
        for pages in (request.partial_pages, request.fetched_pages):
            self._release([block for _, block in sorted(pages.items())])
            pages.clear()

    def _note(self, request: EngineRequest) -> None:
        if request.block_table or request.fetched_pages or request.partial_pages:
            self.holders.add(request)
        else:
            self.holders.discard(request)

    def _name(self, request: EngineRequest, index: int, end: int) -> BlockHash:
        parent = request.block_hashes[index - 1] if index else request.hash_root
        return block_hash(parent, request.tokens[index * self.block_tokens : end])
