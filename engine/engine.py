"""One model replica: requests in, tokens and blocks out, one step at a time.

One thread owns an engine. It never sees a socket, a clock of its own or a peer: what comes from outside comes through
the methods below, between two steps.

    add ──▶ WAITING ──▶ RUNNING ──▶ FINISHED, or HELD ──release──▶ FINISHED
    expect ──▶ FETCHING ──fill, fill, ready──▶ WAITING
    abort: from any state
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from engine.cache.block_pool import BlockPool
from engine.cache.request_blocks import RequestBlocks
from engine.errors import CannotFit, IntegrityError
from engine.fetching import Fetching
from engine.rate import PrefillRate
from engine.request import EngineRequest, RequestState
from engine.scheduler import EngineConfig, Scheduler
from engine.step import BlockReady, Failed, Missing, Row, Runner, Sampled, StepOutput, TokenOut
from mesh.blockhash import BlockHash
from mesh.layout import KvLayout
from mesh.messages import Load

__all__ = ["CannotFit", "Engine", "EngineConfig"]


class Engine:
    """Schedules requests onto a runner and keeps the books of its blocks.

    When the runner raises, the exception leaves `step` and the engine must not be used any more: nobody knows what
    the step wrote into its pages. The process that owns it ends, and its requests continue elsewhere.
    """

    def __init__(self, runner: Runner, config: EngineConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_steps = 0
        self.config = config
        self.pool = BlockPool(runner.num_blocks)
        self._blocks = RequestBlocks(self.pool, runner.layout.block_tokens)
        self._fetching = Fetching(self._blocks, runner)
        self._scheduler = Scheduler(config, self._blocks, self._fetching, runner.decodes_ahead)
        self._runner = runner
        self._clock = clock
        self._rate = PrefillRate()
        self._requests: dict[str, EngineRequest] = {}
        self._num_arrived = 0

    @property
    def capacity_tokens(self) -> int:
        """Prompt and output of the longest request that this engine can serve. The last token needs no page."""
        return min(self.config.max_model_len, self.pool.num_blocks * self._blocks.block_tokens + 1)

    @property
    def has_work(self) -> bool:
        """A step may compute something. It may still schedule nothing, when every request waits for blocks of a
        FETCHING one or for pages of HELD ones: wait for the next event from outside then."""
        return len(self._scheduler.running) + len(self._scheduler.waiting) > 0

    @property
    def num_preemptions(self) -> int:
        """Since the start."""
        return self._scheduler.num_preemptions

    def add(self, request: EngineRequest) -> None:
        """Takes the request in, WAITING. Raises `CannotFit`."""
        self._take_in(request)
        self._scheduler.enqueue(request)

    def expect(self, request: EngineRequest, theirs: KvLayout | None = None) -> tuple[Missing, ...]:
        """Takes the request in, FETCHING: it holds its cached blocks from now on. Returns the blocks it lacks of those
        that cover all its tokens, the partly filled last one included; or, of a worker whose layout is `theirs`, the
        blocks that have something of these. Raises `CannotFit`."""
        self._take_in(request)
        request.state = RequestState.FETCHING
        return self._fetching.begin(request, theirs)

    def fill(self, key: str, index: int, payload: bytes | memoryview, theirs: KvLayout | None = None) -> bool:
        """Verified bytes of a block named by `expect`, of the same layout. False: nobody lacks anything of that block
        (any more), the size is wrong, or no page is left; it then counts as a miss."""
        if theirs is not None:
            return self._fetching.fill_parts(key, index, payload, theirs)
        return self._fetching.fill(key, index, payload)

    def ready(self, key: str, new_tokens: Sequence[int] = ()) -> int:
        """FETCHING -> WAITING with the blocks that came; `new_tokens` follow those the request came with. Returns how
        many tokens are owed: at least 1, as the last token passes through the model here, or 0 when the request is
        not FETCHING (any more) or the new tokens finish it."""
        request = self._requests.get(key)
        if request is None or request.state is not RequestState.FETCHING:
            return 0
        self._fetching.end(request)
        for token in new_tokens:
            request.tokens.append(token)
            if self._finish(request, token) is not None:
                self._end(request)
                return 0
        if request.wants_prompt_logprobs:
            self._blocks.trim(request, 0)
            request.num_cached_tokens = request.num_fetched_tokens = 0
        self._blocks.owe_last(request)
        self._scheduler.enqueue(request)
        return request.num_owed_tokens

    def abort(self, key: str) -> None:
        """Ends the request in whatever state it is; its pages are free or cached afterwards. Idempotent."""
        request = self._requests.get(key)
        if request is not None:
            self._end(request)

    def release(self, key: str) -> None:
        """Ends HELD; does nothing in any other state."""
        request = self._requests.get(key)
        if request is not None and request.state is RequestState.HELD:
            self._end(request)

    def export(self, name: BlockHash) -> tuple[bytes, int] | None:
        """A copy of the block's bytes and its valid tokens; None when it is not here (any more)."""
        found = self._blocks.export(name)
        return None if found is None else (self._runner.read_block(*found), found[1])

    def step(self) -> StepOutput:
        """Schedules, runs, updates, emits. Lets the runner's exceptions through (see the class)."""
        began = self._clock()
        rows = self._scheduler.schedule(began)
        num_tokens = sum([row.num_tokens for row in rows])
        results = self._runner.run(rows) if rows else []
        failed: list[Failed] = []
        tokens, ready = self._update(rows, results, failed)
        self._rate.measure(rows, num_tokens, self._clock() - began)
        self.num_steps += 1
        stored, removed = self.pool.index.take_events()
        return StepOutput(tuple(tokens), tuple(ready), stored, removed, num_tokens, tuple(failed))

    def load(self) -> Load:
        """The state after the last step. Linear in the requests: meant for beats, not for every step."""
        scheduler, pool = self._scheduler, self.pool
        fetching = len(self._fetching)
        running, waiting = len(scheduler.running), len(scheduler.waiting)
        return Load(
            running=running,
            waiting=waiting,
            fetching=fetching,
            held=len(self._requests) - running - waiting - fetching,
            free_blocks=pool.num_free,
            cached_blocks=pool.num_cached,
            held_blocks=pool.num_held,
            owed_tokens=sum(r.num_owed_tokens for queue in (scheduler.running, scheduler.waiting) for r in queue),
            prefill_tokens_per_s=self._rate.tokens_per_s,
        )

    def snapshot(self) -> tuple[BlockHash, ...]:
        """Names of all full blocks that can be found here now."""
        return self.pool.index.names()

    def check(self) -> None:
        """Raises `IntegrityError` unless free + cached + held = total and every reference has its holder."""
        self._blocks.check(self._requests.values())
        load = self.load()
        if min(load.held, load.free_blocks, load.cached_blocks, load.held_blocks) < 0:
            raise IntegrityError(f"a count is negative: {load}")
        if not self._requests and (len(self._blocks.in_flight) or len(self._blocks.tails)):
            raise IntegrityError("no request is left, but blocks in flight or tails are")

    def _take_in(self, request: EngineRequest) -> None:
        self._check_fits(request)
        self._num_arrived += 1
        request.order = (request.params.priority, self._num_arrived)
        request.num_initial_tokens = len(request.tokens)
        request.arrived = request.arrived or self._clock()
        self._requests[request.key] = request

    def _check_fits(self, request: EngineRequest) -> None:
        num_tokens, params = len(request.tokens), request.params
        if request.key in self._requests:
            raise CannotFit("internal", f"request {request.key} is here already")
        if params.grammar is not None and request.matcher is None:
            raise CannotFit("internal", f"request {request.key} has a grammar that nobody compiled")
        if not 0 < request.num_prompt_tokens <= num_tokens or request.num_output_tokens >= params.max_tokens:
            raise CannotFit("internal", f"request {request.key} has no prompt or nothing left to generate")
        if num_tokens >= self.config.max_model_len:
            raise CannotFit(
                "too_long", f"{num_tokens} tokens leave no room in a context of {self.config.max_model_len}"
            )
        longest = min(request.num_prompt_tokens + params.max_tokens, self.config.max_model_len)
        if request.stop_after is not None:
            longest = min(longest, num_tokens + request.stop_after)
        needed = self._blocks.blocks_for(longest - 1)
        if needed > self.pool.num_blocks:
            raise CannotFit(
                "no_memory",
                f"{longest} tokens need {needed} KV blocks; this worker has {self.pool.num_blocks}",
            )

    def _update(
        self, rows: Sequence[Row], results: Sequence[Sampled], failed: list[Failed]
    ) -> tuple[list[TokenOut], list[BlockReady]]:
        tokens: list[TokenOut] = []
        ready: list[BlockReady] = []
        block_tokens = self._blocks.block_tokens
        for row, result in zip(rows, results, strict=True):
            request = row.request
            request.num_computed_tokens += row.num_tokens
            if request.num_computed_tokens // block_tokens > request.num_sealed_blocks:
                self._blocks.seal(request)
            if result.prompt_logprobs and request.wants_prompt_logprobs:
                request.prompt_logprobs.extend(result.prompt_logprobs)
            if result.failure is not None:
                failed.append(Failed(request, result.failure))
                self._end(request)
            elif request.num_computed_tokens == len(request.tokens):
                tokens.append(self._accept(request, result))
            if request.hold and request.state is not RequestState.FINISHED:
                ready.extend(self._blocks.newly_ready(request))
        return tokens, ready

    def _accept(self, request: EngineRequest, result: Sampled) -> TokenOut:
        token = result.token
        if token is None:
            raise IntegrityError(f"the runner gave no token for request {request.key}, which has caught up")
        request.tokens.append(token)
        request.num_new_tokens += 1
        finish = self._finish(request, token)
        if finish is None and request.num_new_tokens == request.stop_after:
            finish = "handoff"
        out = TokenOut(request, request.num_output_tokens - 1, token, result.logprob, finish)
        if out.index == 0 and request.params.prompt_logprobs is not None:
            out.prompt_logprobs = (None, *request.prompt_logprobs[: request.num_prompt_tokens - 1])
        if finish == "handoff" and request.hold:
            self._scheduler.remove(request)
            self._blocks.in_flight.leave(request)
            request.state = RequestState.HELD
        elif finish is not None:
            self._end(request)
        return out

    def _finish(self, request: EngineRequest, token: int) -> str | None:
        """Why the request ends with `token`, its last, or None."""
        params, num_output = request.params, request.num_output_tokens
        if request.matcher is not None and token in request.matcher.eos_token_ids:
            return "stop"
        if token in params.stop_token_ids and num_output >= params.min_tokens:
            return "stop"
        if num_output >= params.max_tokens or len(request.tokens) >= self.config.max_model_len:
            return "length"
        return None

    def _end(self, request: EngineRequest) -> None:
        del self._requests[request.key]
        self._scheduler.remove(request)
        self._fetching.forget(request)
        self._blocks.drop(request)
        request.state = RequestState.FINISHED
