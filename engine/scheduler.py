"""Which tokens the next step computes.

There are no phases: a request owes tokens, a step spends a budget on what is owed. RUNNING requests come first, the
oldest first; what is left of the budget admits WAITING ones, the oldest first.

Older and younger are meant among requests of one priority; one of a higher priority is older than all of a lower.

Who gets the pages when they run out: age decides. A request may take the pages of a younger one and of nobody else, so
the oldest always progresses, and what was taken is computed (or found in the prefix cache) again.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from enum import Enum

from engine.arrival import ArrivalQueue
from engine.cache.request_blocks import RequestBlocks
from engine.fetching import Fetching
from engine.request import EngineRequest, RequestState
from engine.step import Row
from mesh.blockhash import BlockHash


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The bounds of one engine."""

    max_num_seqs: int
    """Requests RUNNING at once."""
    max_num_batched_tokens: int
    """Tokens computed in one step; longer prompts are cut into chunks."""
    max_model_len: int
    """Prompt and output of one request, in tokens."""

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")


class Admission(Enum):
    """What became of a waiting request in one step."""

    ADMITTED = "admitted"
    PASSED = "passed"
    """It waits for blocks that an earlier request is about to have; those behind it need not."""
    BLOCKED = "blocked"
    """No pages; nobody younger may overtake it."""


class Scheduler:
    """Owns the WAITING and RUNNING queues of one engine."""

    def __init__(
        self, config: EngineConfig, blocks: RequestBlocks, fetching: Fetching, looks_ahead: bool = False
    ) -> None:
        """`looks_ahead`: a row gets the page for the position after its own too, while there are any."""
        self.waiting = ArrivalQueue()
        self.running = ArrivalQueue()
        self.num_preemptions = 0
        self._config = config
        self._blocks = blocks
        self._fetching = fetching
        self._looks_ahead = looks_ahead
        self._awaited: dict[str, BlockHash] = {}
        """What a passed request waits for: while that is in flight, nothing else of it needs a look."""

    def enqueue(self, request: EngineRequest) -> None:
        """Puts the request, in its place by age, among those that wait."""
        request.state = RequestState.WAITING
        self.waiting.add(request)

    def remove(self, request: EngineRequest) -> None:
        """Takes the request out of the queues, whichever it is in."""
        self.waiting.discard(request)
        self.running.discard(request)
        self._awaited.pop(request.key, None)

    def preempt(self, request: EngineRequest) -> None:
        """Takes the request's pages away; it computes, or misses, what was in them."""
        self.num_preemptions += 1
        request.num_preemptions += 1
        if request.state is RequestState.FETCHING:
            self._fetching.give_up(request)
            return
        self._blocks.drop(request)
        request.prompt_logprobs.clear()
        self.running.discard(request)
        self.enqueue(request)

    def schedule(self, now: float) -> list[Row]:
        """The rows of the next step; every row's pages are in its request's block table."""
        rows: list[Row] = []
        budget = self._continue_running(rows)
        if self.waiting:
            self._admit_waiting(rows, budget, now)
        if self._looks_ahead:
            self._look_ahead(rows)
        return rows

    def _look_ahead(self, rows: Sequence[Row]) -> None:
        """A page for the position after each row's last, where the step fills the row's last page; while there are
        any."""
        block_tokens = self._blocks.block_tokens
        for row in rows:
            request = row.request
            num_tokens = request.num_computed_tokens + row.num_tokens
            if num_tokens == len(request.block_table) * block_tokens:
                self._blocks.grow(request, num_tokens + 1)

    def _continue_running(self, rows: list[Row]) -> int:
        budget = self._config.max_num_batched_tokens
        block_tokens = self._blocks.block_tokens
        for request in self.running.snapshot():
            if budget == 0:
                break
            if request.state is not RequestState.RUNNING:
                continue  # an older one has taken its pages in this very loop
            computed = request.num_computed_tokens
            num_tokens = len(request.tokens) - computed
            if num_tokens > budget:
                num_tokens = budget
            if computed + num_tokens > len(request.block_table) * block_tokens:
                num_tokens = self._make_room(request, num_tokens)
            if num_tokens:
                rows.append(Row(request, num_tokens))
                budget -= num_tokens
        return budget

    def _make_room(self, request: EngineRequest, num_tokens: int) -> int:
        """Pages for the next `num_tokens` positions, or for as many as there are; with none at all the request, being
        the youngest that holds any, gives up its own and waits."""
        computed = request.num_computed_tokens
        while not self._blocks.grow(request, computed + num_tokens):
            victim = self._victim(request, ())
            if victim is None:
                room = len(request.block_table) * self._blocks.block_tokens - computed
                if room == 0:
                    self.preempt(request)
                return room
            self.preempt(victim)
        return num_tokens

    def _admit_waiting(self, rows: list[Row], budget: int, now: float) -> None:
        scheduled = {row.request.key for row in rows}
        for request in self.waiting.snapshot():
            if budget == 0 or len(self.running) >= self._config.max_num_seqs:
                return
            admission = self._admit(request, scheduled)
            if admission is Admission.BLOCKED:
                return
            if admission is Admission.ADMITTED:
                num_tokens = self._start(request, budget, now)
                rows.append(Row(request, num_tokens))
                scheduled.add(request.key)
                budget -= num_tokens

    def _admit(self, request: EngineRequest, scheduled: Container[str]) -> Admission:
        """Looks for the request's cached prefix, then for pages for everything else that it is known to need: one
        that starts on less would soon be preempted for those before it."""
        awaited = self._awaited.get(request.key)
        if awaited is not None and self._blocks.in_flight.ahead_of(request, awaited):
            return Admission.PASSED
        num_blocks, num_computed = len(request.block_table), request.num_computed_tokens
        self._blocks.match(request)
        awaited = self._blocks.awaited(request)
        if awaited is not None:
            self._awaited[request.key] = awaited
            self._blocks.trim(request, num_blocks)
            return Admission.PASSED
        self._awaited.pop(request.key, None)
        if not self._free_up(request, scheduled):
            self._blocks.trim(request, num_blocks)
            return Admission.BLOCKED
        if request.first_scheduled is None:
            found = request.num_cached_tokens + request.num_computed_tokens - num_computed
            request.num_cached_tokens = min(found, request.num_prompt_tokens - request.num_fetched_tokens)
        return Admission.ADMITTED

    def _free_up(self, request: EngineRequest, scheduled: Container[str]) -> bool:
        lacking = self._blocks.blocks_for(len(request.tokens)) - len(request.block_table)
        while self._blocks.pool.num_available < lacking:
            victim = self._victim(request, scheduled)
            if victim is None:
                return False
            self.preempt(victim)
        return True

    def _start(self, request: EngineRequest, budget: int, now: float) -> int:
        num_tokens = min(request.num_owed_tokens, budget)
        self._blocks.grow(request, request.num_computed_tokens + num_tokens)
        self._blocks.announce(request)
        self.waiting.discard(request)
        self.running.add(request)
        request.state = RequestState.RUNNING
        if request.first_scheduled is None:
            request.first_scheduled = now
        return num_tokens

    def _victim(self, request: EngineRequest, scheduled: Container[str]) -> EngineRequest | None:
        """The youngest holder of pages that is younger than `request` and not part of this step. HELD ones are
        spared: their computing is done, and a peer's lease on them ends by itself."""
        for holder in reversed(self._blocks.holders):
            if holder.order <= request.order:
                return None
            if holder.state is not RequestState.HELD and holder.key not in scheduled:
                return holder
        return None
