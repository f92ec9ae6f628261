"""The life of one choice of one request, as a pure function: no clock, no socket, no worker, only values.

    UNROUTED ──Routed──▶ ASSIGNED ──first token of the choice──▶ STREAMING ──finish──▶ DONE
       ▲                    │                                        │
       └── refused, worker lost, gap: attempt n+1 with the journal ──┘
    any ──deadline, too many setbacks, nobody to wait for──▶ FAILED
    any ──client gone, stop string──▶ DONE

Moved on by the dispatcher (`Routed`, `NoRoute`, `WorkerLost`, `Tick`), the workers (`Deltas`,
`WorkerRefused`) and the client (`ClientGone`, `StopReached`). The rules:

- Token `i` is emitted once, in order. The prefill worker and the decode worker may both send the first one; a
  repeated token must be equal and is dropped; a token ahead of its turn is kept aside. Whatever an older
  attempt says is void.
- The journal (the tokens emitted so far) is what the client has. A worker that disagrees with it is replaced:
  a new attempt starts from prompt + journal, so the client cannot tell.
- Losing the worker that feeds the decode worker matters only until the decode worker's first token.
- A choice waits for a worker only here (UNROUTED): before its first token while one is expected back, after
  it in any case, because then the client would lose an answer it has begun to read. The retry budget delays a
  choice until its deadline at worst; it never fails one that a worker could still serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import NamedTuple

from mesh.messages import PrefillReport, TokenDelta
from proxy.choice_events import (
    Absence,
    Assign,
    ClientGone,
    Deltas,
    Effect,
    Emit,
    Event,
    Fail,
    Finish,
    FleetChanged,
    NeedRoute,
    NoRoute,
    Routed,
    SendAbort,
    StopReached,
    Tick,
    WorkerLost,
    WorkerRefused,
)
from proxy.journal import Journal
from proxy.routing.place import Place

MAX_SETBACKS = 4
"""Attempts that may fail for one choice: three kills in a row are survived, and a request that kills workers
is not fed to the whole fleet."""
WAIT_BEFORE_FIRST_S = 10.0
"""A worker that was just lost is back within this, or the client is better served by 503 and Retry-After."""
WAIT_MID_STREAM_S = 30.0
"""Mid-stream the client would lose work, so a restart and a model load are waited for."""
GAP_S = 5.0
"""A token ahead of its turn means the one before is on its way over another connection: milliseconds."""
MAX_ASIDE = 256
"""Deltas kept aside; at one token per step, GAP_S never collects more from a worker that is not broken."""
BACKOFF_S = 0.2
"""Before a worker that refused is asked again, doubled with every setback."""
SERVER = "server_error"
NOTHING = Journal()


class Phase(Enum):
    UNROUTED = "unrouted"
    ASSIGNED = "assigned"
    STREAMING = "streaming"
    DONE = "done"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Attempt:
    """One assignment of the choice to workers."""

    number: int
    decode: Place
    source: Place | None
    """The prefill worker; the decode worker depends on it until it has sent its first token."""
    holders: frozenset[Place]
    """Where the decode worker may fetch from too; it can do without any of them."""
    first_index: int
    """Tokens of the choice that the workers were given."""
    source_spoke: bool = False
    decode_spoke: bool = False


class ChoiceState(NamedTuple):
    """All that is known of one choice; never changed, only replaced. A tuple because one is made per token."""

    max_tokens: int
    deadline: float
    phase: Phase = Phase.UNROUTED
    attempts: int = 0
    setbacks: int = 0
    attempt: Attempt | None = None
    journal: Journal = NOTHING
    aside: tuple[TokenDelta, ...] = ()
    """Of the current attempt, by index, all beyond the journal's end."""
    gap_since: float = 0.0
    cause: str = ""
    """Why the last attempt ended; empty before the second."""
    excluded: frozenset[Place] = frozenset()
    """Workers that refused; asked again after a pause."""
    unrouted_since: float = 0.0
    retry_at: float = 0.0
    reports: tuple[PrefillReport, ...] = ()
    """Of the attempts that had nothing of the answer yet: later ones find what the earlier ones computed."""

    @property
    def ended(self) -> bool:
        return self.phase in (Phase.DONE, Phase.FAILED)

    @property
    def wake_at(self) -> float:
        """When a `Tick` may have an effect."""
        if self.phase is Phase.UNROUTED:
            return min(self.deadline, self.retry_at)
        return min(self.deadline, self.gap_since + GAP_S) if self.aside else self.deadline


Step = tuple[ChoiceState, tuple[Effect, ...]]


def begin(max_tokens: int, deadline: float, now: float) -> Step:
    """A new choice and its first effect."""
    state = ChoiceState(max_tokens, deadline, unrouted_since=now, retry_at=now + BACKOFF_S)
    return state, (NeedRoute(frozenset(), ""),)


def step(state: ChoiceState, event: Event, now: float) -> Step:
    """The choice after `event`, and what to do about it. Events that no longer matter change nothing."""
    if type(event) is Deltas and state.phase is Phase.STREAMING:
        due = _due(state, *event)
        if due is not None:
            return due
    if state.ended:
        return state, ()
    match event:
        case Deltas(worker, delta):
            return _deltas(state, worker, delta, now)
        case Tick():
            return _tick(state, now)
        case FleetChanged():
            waits = state.phase is Phase.UNROUTED
            return state, (NeedRoute(state.excluded, state.cause),) if waits else ()
        case Routed():
            return _routed(state, event)
        case NoRoute(absence):
            return _no_route(state, absence, now)
        case WorkerRefused():
            return _refused(state, event, now)
        case WorkerLost(worker):
            return _lost(state, worker, now)
        case ClientGone(reason):
            return state._replace(phase=Phase.DONE), _aborts(state, reason)
        case StopReached():
            return state._replace(phase=Phase.DONE), (*_aborts(state, "stop"), Finish())


def _routed(state: ChoiceState, event: Routed) -> Step:
    if state.phase is not Phase.UNROUTED:
        return state, ()
    number = state.attempts + 1
    given = len(state.journal)
    attempt = Attempt(number, event.decode, event.source, event.holders, given)
    phase = Phase.STREAMING if given else Phase.ASSIGNED
    assign = Assign(number, event.decode, event.source)
    return state._replace(phase=phase, attempts=number, attempt=attempt), (assign,)


def _no_route(state: ChoiceState, absence: Absence, now: float) -> Step:
    if state.phase is not Phase.UNROUTED:
        return state, ()
    mid_stream = len(state.journal) > 0
    if absence is not Absence.HELD:
        patience = WAIT_MID_STREAM_S if mid_stream else WAIT_BEFORE_FIRST_S
        if absence is Absence.NONE and not mid_stream:
            patience = 0.0
        if now >= state.unrouted_since + patience:
            return _fail(state, _no_worker(mid_stream))
    return state._replace(retry_at=now + BACKOFF_S * 2**state.setbacks), ()


def _no_worker(mid_stream: bool) -> Fail:
    if mid_stream:
        return Fail(503, "The worker was lost and no other became available.", SERVER, "worker_lost", 5)
    return Fail(503, "No worker can take the request now.", SERVER, "no_workers", 5)


def _tick(state: ChoiceState, now: float) -> Step:
    if now >= state.deadline:
        return _fail(state, Fail(504, "The request's time is over.", SERVER, "timeout"), "deadline")
    if state.phase is Phase.UNROUTED:
        if now < state.retry_at:
            return state, ()
        return state._replace(excluded=frozenset()), (NeedRoute(frozenset(), state.cause),)
    if state.aside and now >= state.gap_since + GAP_S:
        return _again(state, now, "gap")
    return state, ()


def _due(state: ChoiceState, worker: Place, delta: TokenDelta) -> Step | None:
    """The next token, with nothing else to be done; None where there may be. What comes out is what the long way gives:
    nearly every token of a stream goes here, and everything in it counts."""
    attempt, journal = state.attempt, state.journal
    if attempt is None or delta.attempt != attempt.number or not attempt.decode_spoke:
        return None
    if worker is not attempt.decode and worker != attempt.decode:
        return None
    index, tokens = len(journal), delta.tokens
    if delta.index != index or not tokens or index + len(tokens) >= state.max_tokens:
        return None
    if delta.finish is not None or delta.report is not None or state.aside:
        return None
    emit = Emit(index, tokens, delta.logprobs, None, delta.prompt_logprobs if index == 0 else ())
    return _with(state, journal.extend(tokens)), (emit,)


def _deltas(state: ChoiceState, worker: Place, delta: TokenDelta, now: float) -> Step:
    attempt = state.attempt
    if attempt is None or delta.attempt != attempt.number or delta.index < 0:
        return state, ()
    if worker == attempt.decode:
        if not attempt.decode_spoke:
            attempt = replace(attempt, decode_spoke=True)
    elif worker == attempt.source:
        if not attempt.source_spoke:
            attempt = replace(attempt, source_spoke=True)
    else:
        return state, ()
    if attempt is not state.attempt or delta.report is not None:
        keep = delta.report is not None and attempt.first_index == 0
        reports = (*state.reports, delta.report) if keep and delta.report is not None else state.reports
        state = state._replace(attempt=attempt, reports=reports)
    if delta.index > len(state.journal):
        return _set_aside(state, delta, now)
    return _advance(state, worker, delta, now)


def _set_aside(state: ChoiceState, delta: TokenDelta, now: float) -> Step:
    if len(state.aside) >= MAX_ASIDE:
        return _again(state, now, "gap")
    aside = tuple(sorted((*state.aside, delta), key=lambda d: d.index))
    return state._replace(aside=aside, gap_since=state.gap_since if state.aside else now), ()


def _advance(state: ChoiceState, worker: Place, delta: TokenDelta, now: float) -> Step:
    """Emits what `delta` and then the deltas kept aside add to the journal."""
    effects: list[Effect] = []
    waiting: Sequence[TokenDelta] = (delta, *state.aside)
    journal = state.journal
    finish: str | None = None
    for n, candidate in enumerate(waiting):
        if candidate.index > len(journal):
            waiting = waiting[n:]
            break
        if not _agrees(journal, candidate):
            state, more = _again(_with(state, journal), now, "diverged")
            return state, (*effects, *more)
        emit = _emit(journal, candidate, state.max_tokens)
        if emit is None:
            continue
        journal = journal.extend(emit.tokens)
        effects.append(emit)
        finish = emit.finish
        if finish is not None:
            break
    else:
        waiting = ()
    if finish is not None:
        told_by = worker if delta.finish == finish else None
        return _with(state, journal, phase=Phase.DONE), (*effects, *_leftovers(state, told_by), Finish())
    if not effects:
        return state, ()
    return _with(state, journal, tuple(waiting), now), tuple(effects)


def _with(
    state: ChoiceState,
    journal: Journal,
    aside: tuple[TokenDelta, ...] = (),
    gap_since: float = 0.0,
    phase: Phase = Phase.STREAMING,
) -> ChoiceState:
    """Once per token, so it is spelled out (`_replace` takes three times as long)."""
    return ChoiceState(
        state.max_tokens,
        state.deadline,
        phase,
        state.attempts,
        state.setbacks,
        state.attempt,
        journal,
        aside,
        gap_since,
        state.cause,
        state.excluded,
        state.unrouted_since,
        state.retry_at,
        state.reports,
    )


def _agrees(journal: Journal, delta: TokenDelta) -> bool:
    repeated = min(len(journal) - delta.index, len(delta.tokens))
    return all(journal.at(delta.index + i) == delta.tokens[i] for i in range(repeated))


def _emit(journal: Journal, delta: TokenDelta, max_tokens: int) -> Emit | None:
    """What `delta` adds at the journal's end, or None. A finish that comes late is emitted without tokens."""
    index = len(journal)
    known = index - delta.index
    finish = delta.finish if delta.finish in ("stop", "length") else None
    tokens = delta.tokens[known:]
    if known > len(delta.tokens) or not (tokens or finish):
        return None
    logprobs = delta.logprobs[known:]
    if index + len(tokens) >= max_tokens:
        # No worker sends more than was asked for; if one does, the client's bound holds.
        room = max_tokens - index
        finish = (finish if len(tokens) <= room else None) or "length"
        tokens, logprobs = tokens[:room], logprobs[:room]
    return Emit(index, tokens, logprobs, finish, delta.prompt_logprobs if index == 0 else ())


def _leftovers(state: ChoiceState, told_by: Place | None) -> list[Effect]:
    """Aborts for the workers of the attempt that may not know that the choice is over."""
    attempt = state.attempt
    if attempt is None:
        return []
    aborts: list[Effect] = []
    if told_by != attempt.decode:
        aborts.append(SendAbort(attempt.decode, attempt.number, "done"))
    if attempt.source is not None and not attempt.source_spoke:
        aborts.append(SendAbort(attempt.source, attempt.number, "done"))
    return aborts


def _refused(state: ChoiceState, event: WorkerRefused, now: float) -> Step:
    attempt = state.attempt
    if attempt is None or event.attempt != attempt.number:
        return state, ()
    if event.worker != attempt.decode and (event.worker != attempt.source or attempt.decode_spoke):
        return state, ()
    if not event.retryable:
        return _fail(state, _final_refusal(event), "refused")
    culprits = frozenset((event.worker,))
    if event.code == "blocks_missing":  # the decode worker only reports what did not come
        culprits = frozenset((attempt.source,)) if attempt.source is not None else attempt.holders
    state = state._replace(excluded=state.excluded | culprits)
    if event.code == "draining":  # as good as lost: the fleet does not say no, so nobody holds the next attempt back
        return _again(state, now, "lost", setback=False)
    return _again(state, now, "refused")


def _final_refusal(event: WorkerRefused) -> Fail:
    if event.code == "too_long":
        return Fail(400, event.message, "invalid_request_error", "context_length_exceeded")
    if event.code == "grammar":
        return Fail(400, event.message, "invalid_request_error", "invalid_schema")
    if event.code == "deadline":
        return Fail(504, "The request's time is over.", SERVER, "timeout")
    return Fail(500, f"The worker could not serve the request: {event.message}", SERVER, event.code)


def _lost(state: ChoiceState, worker: Place, now: float) -> Step:
    attempt = state.attempt
    if attempt is None:
        return state, ()
    feeds = worker == attempt.source and (not attempt.decode_spoke or bool(state.aside))
    if worker == attempt.decode or feeds:
        return _again(state, now, "lost")
    return state, ()


def _again(state: ChoiceState, now: float, why: str, setback: bool = True) -> Step:
    """Ends the attempt and asks for the next one."""
    aborts = _aborts(state, why)
    setbacks = state.setbacks + setback
    if setbacks >= MAX_SETBACKS:
        message = f"The request was tried {setbacks} times and no worker completed it."
        return _fail(state, Fail(503, message, SERVER, "worker_lost", 5), why)
    state = state._replace(
        phase=Phase.UNROUTED,
        setbacks=setbacks,
        attempt=None,
        aside=(),
        cause=why,
        unrouted_since=now,
        retry_at=now + BACKOFF_S,
    )
    return state, (*aborts, NeedRoute(state.excluded, why))


def _fail(state: ChoiceState, failure: Fail, reason: str = "failed") -> Step:
    return state._replace(phase=Phase.FAILED), (*_aborts(state, reason), failure)


def _aborts(state: ChoiceState, reason: str) -> tuple[Effect, ...]:
    """Tells the attempt's workers, the lost one included: it may only have been silent."""
    attempt = state.attempt
    if attempt is None:
        return ()
    source = (attempt.source,) if attempt.source is not None else ()
    return tuple([SendAbort(w, attempt.number, reason) for w in (*source, attempt.decode)])
