"""Turns requests into generations: what the lifecycle asks for is done here, with the fleet that registered.

    API ──submit──▶ RunningGeneration ◀──chunks── lifecycle.step ◀──events── Fleet ◀── workers
                                                      │ effects
                                        route, assign, abort ──▶ Fleet ──▶ workers

Everything runs in the event loop's thread; nothing here waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from mesh import blockhash
from mesh.messages import Abort, Decode, KvHolder, Prefill, Refused, TokenDelta
from proxy import lifecycle
from proxy.choice_events import (
    Absence,
    Assign,
    Deltas,
    Effect,
    Emit,
    Event,
    Fail,
    FleetChanged,
    NeedRoute,
    NoRoute,
    Routed,
    SendAbort,
    Tick,
    WorkerLost,
    WorkerRefused,
)
from proxy.fleet import Fleet
from proxy.generation import GenerateRequest, ModelFacts
from proxy.lifecycle import Phase
from proxy.routing import admission
from proxy.routing.place import Place
from proxy.routing.placement import Placement
from proxy.routing.residency import short_names
from proxy.routing.router import Resident
from proxy.running import Choice, RunningGeneration

log = logging.getLogger(__name__)

TICK_S = 0.1
"""Resolution of deadlines, of silence and of waiting for workers."""


class MeshDispatcher:
    """`proxy.generation.Dispatcher` over a fleet; `proxy.fleet.FleetListener` of it."""

    def __init__(
        self,
        fleet: Fleet,
        clock: Callable[[], float],
        *,
        max_requests: int,
        disaggregate_above: int,
    ) -> None:
        self._fleet = fleet
        self._clock = clock
        self._max_requests = max_requests
        self._placement = Placement(fleet.pool, fleet.index, disaggregate_above)
        self._budget = admission.RetryBudget()
        self._choices: dict[str, Choice] = {}
        """By wire id, until they end."""
        self._on_worker: dict[Place, dict[str, Choice]] = {}
        self._waiting: dict[str, Choice] = {}
        """Those without a worker."""
        self._requests: dict[str, int] = {}
        """Request id -> choices that have not ended."""
        self._draining = False
        self._timer: asyncio.TimerHandle | None = None
        self.retries: dict[str, int] = {}
        """Attempts after the first, by why the one before ended."""

    @property
    def model(self) -> ModelFacts | None:
        return self._fleet.pool.model

    @property
    def ready(self) -> bool:
        return self._fleet.pool.ready and not self._draining

    @property
    def live(self) -> int:
        """Choices that have not ended."""
        return len(self._choices)

    @property
    def waiting(self) -> int:
        """Choices without a worker."""
        return len(self._waiting)

    def start(self) -> None:
        """Begins to keep time, in the running event loop."""
        self._timer = asyncio.get_running_loop().call_later(TICK_S, self.start)
        self._fleet.tick()
        self.tick()

    def close(self) -> None:
        """Ends every request with an error."""
        if self._timer is not None:
            self._timer.cancel()
        for choice in list(self._choices.values()):
            choice.generation.end(admission.draining())

    def drain(self) -> None:
        """Takes no more requests."""
        self._draining = True

    def submit(self, request: GenerateRequest) -> RunningGeneration:
        """See `proxy.generation.Dispatcher`."""
        now = self._clock()
        self._admit()
        generation = self._generation(request, now)
        choices = []
        effects = []
        for number in range(request.n):
            state, first = lifecycle.begin(request.params.max_tokens, generation.deadline, now)
            wire_id = request.request_id if request.n == 1 else f"{request.request_id}.{number}"
            if wire_id in self._choices:
                raise ValueError(f"request id {wire_id!r} is in use")
            choices.append(Choice(generation, number, wire_id, state))
            effects.append(first)
        generation.begin(choices, self._feed)
        self._requests[request.request_id] = request.n
        self._budget.request(now)
        for choice, first in zip(choices, effects, strict=True):
            self._choices[choice.wire_id] = choice
            self._carry_out(choice, first, now)
            if generation.failure is not None:
                self._requests.pop(request.request_id, None)
                raise generation.failure
        return generation

    def _admit(self) -> None:
        if self._draining:
            raise admission.draining()
        owed, speed = self._placement.predicted_load()
        refusal = admission.overloaded(len(self._requests), self._max_requests, owed, speed)
        if refusal is not None:
            raise refusal

    def _generation(self, request: GenerateRequest, now: float) -> RunningGeneration:
        digest = self._fleet.pool.digest
        root = b"" if digest is None else blockhash.root(digest, salt=request.cache_salt)
        return RunningGeneration(request, digest, root, now + request.deadline_s)

    def delta(self, worker: Place, delta: TokenDelta) -> None:
        choice = self._choices.get(delta.request_id)
        if choice is None or delta.attempt < choice.state.attempts:
            # It does not know that this is over: it was silent, or our abort is still on its way.
            self._fleet.send(worker, Abort(delta.request_id, delta.attempt, "stale"))
            return
        self._feed(choice, Deltas(worker, delta))

    def refused(self, worker: Place, refusal: Refused) -> None:
        choice = self._choices.get(refusal.request_id)
        if choice is None:
            return
        event = WorkerRefused(worker, refusal.attempt, refusal.code, refusal.message, refusal.retryable)
        self._feed(choice, event)

    def lost(self, worker: Place) -> None:
        for choice in list(self._on_worker.get(worker, {}).values()):
            self._feed(choice, WorkerLost(worker))

    def changed(self) -> None:
        # the urgent ones first, and of those the oldest
        for choice in sorted(self._waiting.values(), key=lambda c: c.generation.request.params.priority):
            self._feed(choice, FleetChanged())

    def tick(self) -> None:
        now = self._clock()
        for choice in [c for c in self._choices.values() if now >= c.state.wake_at]:
            self._feed(choice, Tick())

    def _feed(self, choice: Choice, event: Event) -> None:
        """Takes the choice on by one event and does what follows."""
        if choice.wire_id not in self._choices:
            return
        now, before = self._clock(), choice.state
        choice.state, effects = lifecycle.step(before, event, now)
        if len(effects) == 1 and type(effects[0]) is Emit and choice.state.attempt is before.attempt:
            choice.generation.emitted(choice.number, effects[0])  # nearly always: no table changes
        elif effects or choice.state.ended:  # one that waited for a worker ends without any effect
            self._carry_out(choice, effects, now)

    def _carry_out(self, choice: Choice, effects: tuple[Effect, ...], now: float) -> None:
        """Does what the lifecycle asks for; answers to it go back at once."""
        todo = deque(effects)
        while todo:
            answer = self._perform(choice, todo.popleft(), now)
            if answer is not None:
                choice.state, more = lifecycle.step(choice.state, answer, now)
                todo.extend(more)
        self._index(choice)

    def _index(self, choice: Choice) -> None:
        """Keeps the look-up tables in step with the choice's state."""
        state = choice.state
        attempt = state.attempt
        places: tuple[Place, ...] = ()
        if attempt is not None and not state.ended:
            places = (attempt.decode,) if attempt.source is None else (attempt.decode, attempt.source)
        if places != choice.places:
            for place in choice.places:
                self._unplace(choice, place)
            for place in places:
                self._on_worker.setdefault(place, {})[choice.wire_id] = choice
            choice.places = places
        if state.phase is Phase.UNROUTED:
            self._waiting[choice.wire_id] = choice
        else:
            self._waiting.pop(choice.wire_id, None)
        if state.ended and self._choices.pop(choice.wire_id, None) is not None:
            request_id = choice.generation.request.request_id
            self._requests[request_id] = self._requests.get(request_id, 0) - 1
            if self._requests[request_id] <= 0:
                del self._requests[request_id]

    def _unplace(self, choice: Choice, place: Place) -> None:
        there = self._on_worker.get(place)
        if there is not None:
            there.pop(choice.wire_id, None)
            if not there:
                del self._on_worker[place]
        worker = self._fleet.pool.get(place)
        if worker is not None:
            worker.settle(choice.wire_id)

    def _perform(self, choice: Choice, effect: Effect, now: float) -> Event | None:
        match effect:
            case Emit():
                choice.generation.emitted(choice.number, effect)
            case NeedRoute():
                return self._route(choice, effect, now)
            case Assign():
                return self._assign(choice, effect, now)
            case SendAbort(worker, attempt, reason):
                self._fleet.send(worker, Abort(choice.wire_id, attempt, reason))
            case Fail():
                log.warning("request %s failed: %s (%s)", choice.wire_id, effect.message, effect.code)
                choice.generation.failed(choice.number, effect)
            case _:
                choice.generation.ended(choice.number)
        return None

    def _route(self, choice: Choice, need: NeedRoute, now: float) -> Event:
        """Workers for a new attempt, if there are any and the retry budget allows it."""
        generation = choice.generation
        if self._fleet.pool.digest != generation.digest:
            return NoRoute(Absence.NONE)  # the fleet serves another model now
        plan = self._placement.plan(
            len(generation.request.tokens) + len(choice.state.journal),
            partial(self._names, choice),
            exclude=need.exclude,
            only=generation.choices[0].decode if choice.number and not need.retry else None,
            here_only=choice.number > 0 or generation.request.params.prompt_logprobs is not None,
        )
        if plan is None:
            return NoRoute(self._fleet.pool.absence(now))
        if need.retry:
            if not self._budget.spend(now, ask=need.retry != "lost"):
                return NoRoute(Absence.HELD)
            self.retries[need.retry] = self.retries.get(need.retry, 0) + 1
            log.info("request %s goes to %s: %s", choice.wire_id, plan.decode.worker_id, need.retry)
        self._placement.commit(choice.wire_id, plan, now)
        choice.recompute_limit, choice.holders, choice.history = plan.recompute_limit, plan.holders, plan.history
        return Routed(plan.decode, plan.source, frozenset(r.place for r in plan.holders))

    def _names(self, choice: Choice, block_tokens: int) -> list[int]:
        """The full blocks of the prompt, and of what was generated since, where they have so many tokens."""
        generation = choice.generation
        if generation.request.params.prompt_logprobs is not None:
            return []  # such a request computes its whole prompt
        known = generation.names.get(block_tokens)
        if known is not None and not len(choice.state.journal):
            return known
        names = short_names(blockhash.chain(generation.hash_root, choice.tokens, block_tokens))
        if not len(choice.state.journal):
            generation.names[block_tokens] = names
        return names

    def _assign(self, choice: Choice, assign: Assign, now: float) -> Event | None:
        """Sends the attempt to its workers; the prefill worker first, its work is what takes time."""
        decode = self._fleet.peer(assign.decode)
        source = self._fleet.peer(assign.source) if assign.source is not None else None
        if decode is None:
            return WorkerLost(assign.decode)
        request = choice.generation.request
        common = (choice.wire_id, assign.number, choice.tokens, len(request.tokens), choice.params)
        root, left = choice.generation.hash_root, choice.generation.deadline - now
        choice.decode = assign.decode
        choice.prefill = assign.source.worker_id if assign.source is not None else None
        if assign.source is not None:
            prefill = Prefill(*common, root, left, self._holders(choice.history))
            if not self._fleet.send(assign.source, prefill):
                return self._unreachable(assign.source)
        message = Decode(*common, root, left, source, self._holders(choice.holders), choice.recompute_limit)
        if not self._fleet.send(assign.decode, message):
            return self._unreachable(assign.decode)
        return None

    def _holders(self, residents: Sequence[Resident]) -> tuple[KvHolder, ...]:
        """As workers are told of them, those that are still known."""
        found = [(self._fleet.peer(r.place), r) for r in residents]
        return tuple([KvHolder(peer, r.tokens, r.live) for peer, r in found if peer is not None])

    def _unreachable(self, worker: Place) -> Event:
        self._fleet.unreachable(worker)
        return WorkerLost(worker)
