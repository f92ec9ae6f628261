"""The life of a choice, event by event, and under random sequences of events."""

from __future__ import annotations

import ast
import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import pytest

from mesh.messages import PrefillReport, TokenDelta, TokenLogprob
from proxy import choice_events, journal, lifecycle
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
from proxy.lifecycle import ChoiceState, Phase, begin, step
from proxy.routing.place import Place

P, P2 = Place("p0", 1), Place("p1", 1)
D, D2 = Place("d0", 1), Place("d1", 1)
REPORT = PrefillReport(3, 0, 5, 0.0, 0.0, 0.0, 0, 0, 3)


def delta(
    index: int,
    tokens: Sequence[int],
    *,
    attempt: int = 1,
    finish: str | None = None,
    report: PrefillReport | None = None,
    logprobs: tuple[TokenLogprob, ...] = (),
) -> TokenDelta:
    return TokenDelta("r", attempt, index, tuple(tokens), logprobs, finish, report, ())


def run(*events: Event, max_tokens: int = 100, now: float = 0.0) -> tuple[ChoiceState, tuple[Effect, ...]]:
    """The state after `events`, and the effects of the last one."""
    state, effects = begin(max_tokens, 1000.0, now)
    for event in events:
        state, effects = step(state, event, now)
    return state, effects


def assigned(source: Place | None = P) -> Routed:
    return Routed(D, source, frozenset())


def emits(effects: Sequence[Effect]) -> list[tuple[int, tuple[int, ...], str | None]]:
    return [(e.index, e.tokens, e.finish) for e in effects if isinstance(e, Emit)]


@pytest.mark.parametrize("module", [lifecycle, choice_events, journal])
def test_the_lifecycle_reads_no_clock_and_touches_no_socket(module: object) -> None:
    tree = ast.parse(inspect.getsource(module))  # type: ignore[arg-type]
    allowed = {"__future__", "collections.abc", "dataclasses", "enum", "mesh.messages", "typing"}
    allowed |= {"proxy.choice_events", "proxy.journal", "proxy.routing.place"}
    for node in ast.walk(tree):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        assert set(names) <= allowed


def test_states_are_values() -> None:
    before, _ = run(assigned())
    after, _ = step(before, Deltas(P, delta(0, [7])), 0.0)
    assert len(before.journal) == 0
    assert len(after.journal) == 1


def test_a_new_choice_asks_for_workers_and_assigns_them() -> None:
    assert run()[1] == (NeedRoute(frozenset(), ""),)
    state, effects = run(assigned())
    assert effects == (Assign(1, D, P),)
    assert state.phase is Phase.ASSIGNED


def test_the_first_token_comes_from_whichever_worker_is_first() -> None:
    state, effects = run(assigned(), Deltas(P, delta(0, [7], report=REPORT)))
    assert emits(effects) == [(0, (7,), None)]
    assert state.phase is Phase.STREAMING
    assert state.reports == (REPORT,)
    state, effects = step(state, Deltas(D, delta(0, [7])), 0.0)
    assert effects == ()
    state, effects = step(state, Deltas(D, delta(1, [8])), 0.0)
    assert emits(effects) == [(1, (8,), None)]


def test_a_token_ahead_of_its_turn_waits_for_the_one_before() -> None:
    state, effects = run(assigned(), Deltas(D, delta(2, [9], finish="stop")), Deltas(D, delta(1, [8])))
    assert effects == ()
    state, effects = step(state, Deltas(P, delta(0, [7])), 1.0)
    assert emits(effects) == [(0, (7,), None), (1, (8,), None), (2, (9,), "stop")]
    assert state.phase is Phase.DONE


def test_a_gap_that_stays_is_closed_by_a_new_attempt() -> None:
    state, _ = run(assigned(), Deltas(D, delta(1, [8])))
    assert state.wake_at == lifecycle.GAP_S
    state, effects = step(state, Tick(), lifecycle.GAP_S)
    assert effects == (SendAbort(P, 1, "gap"), SendAbort(D, 1, "gap"), NeedRoute(frozenset(), "gap"))
    assert state.aside == ()


def test_a_flood_ahead_of_its_turn_is_bounded() -> None:
    state, _ = run(assigned())
    for index in range(1, lifecycle.MAX_ASIDE + 2):
        state, _ = step(state, Deltas(D, delta(index, [1])), 0.0)
    assert state.phase is Phase.UNROUTED
    assert state.aside == ()


def test_only_the_new_part_of_an_overlapping_delta_is_emitted() -> None:
    logprobs = tuple([TokenLogprob(t, -0.5, (), ()) for t in (7, 8, 9)])
    _, effects = run(
        assigned(),
        Deltas(P, delta(0, [7])),
        Deltas(D, delta(0, [7, 8, 9], logprobs=logprobs, finish="length")),
    )
    assert emits(effects) == [(1, (8, 9), "length")]
    assert isinstance(effects[0], Emit)
    assert effects[0].logprobs == logprobs[1:]


def test_a_worker_that_disagrees_with_what_the_client_has_is_replaced() -> None:
    state, effects = run(assigned(), Deltas(P, delta(0, [7])), Deltas(D, delta(0, [6, 5])))
    assert emits(effects) == []
    assert NeedRoute(frozenset(), "diverged") in effects
    state, _ = step(state, Routed(D, None, frozenset()), 0.0)
    assert state.attempt is not None
    assert state.attempt.first_index == 1


def test_messages_of_older_attempts_and_other_workers_are_void() -> None:
    state, _ = run(assigned(), WorkerLost(D), Routed(D2, P, frozenset()))
    for event in (
        Deltas(D, delta(0, [1], attempt=1)),
        Deltas(D, delta(0, [1], attempt=2)),
        Deltas(Place("d1", 0), delta(0, [1], attempt=2)),
        Deltas(D2, delta(0, [1], attempt=1)),
        WorkerRefused(D, 1, "internal", "", False),
        WorkerLost(D),
    ):
        assert step(state, event, 0.0) == (state, ())


def test_losing_the_decode_worker_starts_an_attempt_from_the_journal() -> None:
    state, effects = run(assigned(), Deltas(P, delta(0, [7])), Deltas(D, delta(1, [8])), WorkerLost(D))
    assert effects == (SendAbort(P, 1, "lost"), SendAbort(D, 1, "lost"), NeedRoute(frozenset(), "lost"))
    state, effects = step(state, Routed(D2, None, frozenset()), 0.0)
    assert effects == (Assign(2, D2, None),)
    assert state.journal.tokens() == (7, 8)
    _, effects = step(state, Deltas(D2, delta(2, [9], attempt=2, finish="stop")), 0.0)
    assert emits(effects) == [(2, (9,), "stop")]


def test_losing_the_prefill_worker_matters_until_the_decode_worker_runs() -> None:
    before, effects = run(assigned(), Deltas(P, delta(0, [7])), WorkerLost(P))
    assert before.phase is Phase.UNROUTED
    after, effects = run(assigned(), Deltas(P, delta(0, [7])), Deltas(D, delta(1, [8])), WorkerLost(P))
    assert after.phase is Phase.STREAMING
    assert effects == ()


def test_losing_the_prefill_worker_matters_while_its_token_is_missing() -> None:
    state, effects = run(assigned(), Deltas(D, delta(1, [8])), WorkerLost(P))
    assert state.phase is Phase.UNROUTED
    assert NeedRoute(frozenset(), "lost") in effects


def test_a_mere_holder_of_blocks_is_not_told_to_abort() -> None:
    _, effects = run(Routed(D, None, frozenset({P})), ClientGone("gone"))
    assert effects == (SendAbort(D, 1, "gone"),)


def test_a_retryable_refusal_excludes_the_worker_for_a_while() -> None:
    state, effects = run(assigned(), WorkerRefused(D, 1, "no_memory", "full", True))
    assert effects[-1] == NeedRoute(frozenset({D}), "refused")
    state, _ = step(state, NoRoute(Absence.HELD), 0.0)
    assert step(state, Tick(), state.retry_at - 0.01)[1] == ()
    assert step(state, Tick(), state.retry_at)[1] == (NeedRoute(frozenset(), "refused"),)
    assert step(state, FleetChanged(), 0.0)[1] == (NeedRoute(frozenset({D}), "refused"),)


def test_missing_blocks_are_blamed_on_their_source() -> None:
    """It makes all of them, whoever else was said to have some; where there is none, those were wrongly said to."""
    missing = WorkerRefused(D, 1, "blocks_missing", "", True)
    assert run(Routed(D, P, frozenset({D2})), missing)[1][-1] == NeedRoute(frozenset({P}), "refused")
    assert run(Routed(D, None, frozenset({D2, P2})), missing)[1][-1] == NeedRoute(frozenset({D2, P2}), "refused")


def test_a_lost_holder_changes_nothing() -> None:
    assert run(Routed(D, P, frozenset({D2})), WorkerLost(D2))[1] == ()
    assert run(Routed(D, None, frozenset({D2})), WorkerLost(D2))[1] == ()


@pytest.mark.parametrize(
    ("code", "status", "public"),
    [
        ("too_long", 400, "context_length_exceeded"),
        ("grammar", 400, "invalid_schema"),
        ("deadline", 504, "timeout"),
        ("internal", 500, "internal"),
    ],
)
def test_a_final_refusal_fails_the_choice(code: str, status: int, public: str) -> None:
    state, effects = run(assigned(), WorkerRefused(D, 1, code, "why", False))
    failure = effects[-1]
    assert isinstance(failure, Fail)
    assert (failure.status, failure.code) == (status, public)
    assert state.phase is Phase.FAILED


def test_draining_workers_are_no_setback() -> None:
    state, effects = run(assigned(), WorkerRefused(D, 1, "draining", "", True))
    assert state.setbacks == 0
    assert NeedRoute(frozenset({D}), "lost") in effects


def test_setbacks_are_bounded() -> None:
    events: list[Event] = []
    for attempt in range(lifecycle.MAX_SETBACKS):
        place = Place(f"d{attempt}", 1)
        events += [Routed(place, None, frozenset()), Deltas(place, delta(attempt, [attempt], attempt=attempt + 1))]
        events.append(WorkerLost(place))
    state, effects = run(*events[:-1])
    assert state.phase is Phase.STREAMING
    state, effects = run(*events)
    assert isinstance(effects[-1], Fail)
    assert effects[-1].code == "worker_lost"


@pytest.mark.parametrize(
    ("absence", "streaming", "patience", "code"),
    [
        (Absence.NONE, False, 0.0, "no_workers"),
        (Absence.RETURNING, False, lifecycle.WAIT_BEFORE_FIRST_S, "no_workers"),
        (Absence.NONE, True, lifecycle.WAIT_MID_STREAM_S, "worker_lost"),
        (Absence.RETURNING, True, lifecycle.WAIT_MID_STREAM_S, "worker_lost"),
    ],
)
def test_waiting_for_a_worker_has_a_limit(absence: Absence, streaming: bool, patience: float, code: str) -> None:
    before: list[Event] = [assigned(), Deltas(P, delta(0, [7])), WorkerLost(D)] if streaming else []
    state, _ = run(*before)
    if patience:
        waiting, effects = step(state, NoRoute(absence), patience - 0.01)
        assert effects == ()
        assert waiting.phase is Phase.UNROUTED
    _, effects = step(state, NoRoute(absence), patience)
    assert isinstance(effects[-1], Fail)
    assert effects[-1].status == 503
    assert effects[-1].code == code


def test_a_spent_retry_budget_never_fails_a_choice() -> None:
    state, _ = run(assigned(), WorkerRefused(D, 1, "no_memory", "", True))
    for now in range(1, 999):
        state, _ = step(state, NoRoute(Absence.HELD), float(now))
    assert state.phase is Phase.UNROUTED


def test_the_deadline_ends_everything() -> None:
    state, _ = run(assigned(), Deltas(P, delta(0, [7])))
    assert state.wake_at == 1000.0
    state, effects = step(state, Tick(), 1000.0)
    assert effects[:2] == (SendAbort(P, 1, "deadline"), SendAbort(D, 1, "deadline"))
    assert isinstance(effects[2], Fail)
    assert effects[2].code == "timeout"


def test_a_stop_string_ends_the_choice_at_both_workers() -> None:
    state, effects = run(assigned(), Deltas(P, delta(0, [7])), StopReached())
    assert effects == (SendAbort(P, 1, "stop"), SendAbort(D, 1, "stop"), Finish())
    assert step(state, Deltas(D, delta(1, [8])), 0.0) == (state, ())


def test_an_answer_that_ends_with_its_first_token_frees_the_decode_worker() -> None:
    _, effects = run(assigned(), Deltas(P, delta(0, [7], finish="stop")))
    assert effects[1:] == (
        SendAbort(D, 1, "done"),
        Finish(),
    )


def test_a_prefill_worker_that_came_too_late_is_freed() -> None:
    _, effects = run(assigned(), Deltas(D, delta(0, [7], finish="stop")))
    assert effects[1:] == (
        SendAbort(P, 1, "done"),
        Finish(),
    )


def test_an_ordinary_end_sends_no_aborts() -> None:
    _, effects = run(assigned(), Deltas(P, delta(0, [7])), Deltas(D, delta(1, [8], finish="length")))
    assert emits(effects) == [(1, (8,), "length")]
    assert effects[1:] == (Finish(),)


def test_no_more_than_max_tokens_reach_the_client() -> None:
    state, effects = run(assigned(), Deltas(D, delta(0, [1, 2, 3, 4])), max_tokens=3)
    assert emits(effects) == [(0, (1, 2, 3), "length")]
    assert state.phase is Phase.DONE
    assert SendAbort(D, 1, "done") in effects


def test_the_journal_is_the_same_however_it_was_cut() -> None:
    tokens = tuple(range(1000))
    whole = Journal().extend(tokens)
    pieces = Journal()
    for start, end in pairwise((0, 1, 255, 256, 257, 700, 1000)):
        pieces = pieces.extend(tokens[start:end])
    assert pieces == whole
    assert pieces.tokens() == tokens
    assert [pieces.at(i) for i in (0, 255, 256, 999)] == [0, 255, 256, 999]


@dataclass
class World:
    """Plays the dispatcher, the fleet and the client for one choice; time only moves here."""

    rng: random.Random
    max_tokens: int
    now: float = 0.0
    got: list[int] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    outstanding: list[Event] = field(default_factory=list)
    attempts: list[int] = field(default_factory=list)

    def token(self, index: int) -> int:
        return index * 7919 % 1009

    def deltas(self, worker: Place, attempt: int, first: int, last: int) -> list[Event]:
        events: list[Event] = []
        while first < last:
            size = self.rng.randint(1, 3)
            tokens = [self.token(i) for i in range(first, min(last, first + size))]
            finish = "stop" if first + len(tokens) == self.max_tokens else None
            events.append(Deltas(worker, delta(first, tokens, attempt=attempt, finish=finish)))
            first += len(tokens)
        return events

    def answer(self, need: NeedRoute) -> Event:
        if self.rng.random() < 0.15:
            return NoRoute(self.rng.choice((Absence.RETURNING, Absence.HELD, Absence.RETURNING)))
        source = self.rng.choice((None, P, P2))
        return Routed(self.rng.choice((D, D2)), source, frozenset(self.rng.choice(((), (P2,)))))

    def work(self, assign: Assign, given: int) -> None:
        """What the workers of an attempt will say, shuffled, repeated, cut short by faults."""
        events: list[Event] = []
        start = given
        if assign.source is not None:
            events += self.deltas(assign.source, assign.number, given, given + 1)
            start += self.rng.randint(0, 1)
        events += self.deltas(assign.decode, assign.number, start, self.max_tokens)
        if self.rng.random() < 0.4:
            events = events[: self.rng.randint(0, len(events))]
            lost = self.rng.choice([assign.decode, assign.decode, assign.source or assign.decode])
            events.append(self.rng.choice((WorkerLost(lost), self.refusal(assign))))
        for _ in range(self.rng.randint(0, 4)):
            if len(events) > 1:
                i = self.rng.randrange(len(events) - 1)
                events[i], events[i + 1] = events[i + 1], events[i]
                events.append(events[i])
        self.outstanding = [*self.outstanding[-5:], *events]

    def refusal(self, assign: Assign) -> Event:
        return WorkerRefused(assign.decode, assign.number, "no_memory", "", True)

    def carry_out(self, state: ChoiceState, effects: Sequence[Effect]) -> ChoiceState:
        todo = list(effects)
        while todo:
            effect = todo.pop(0)
            if isinstance(effect, Emit):
                assert not self.ended
                assert effect.index == len(self.got)
                self.got.extend(effect.tokens)
                if effect.finish:
                    self.ended.append("finish")
            elif isinstance(effect, Assign):
                self.attempts.append(effect.number)
                self.work(effect, len(state.journal))
            elif isinstance(effect, Fail):
                self.ended.append("fail")
            elif isinstance(effect, NeedRoute):
                state, more = step(state, self.answer(effect), self.now)
                todo.extend(more)
        return state


@pytest.mark.parametrize("seed", range(400))
def test_whatever_happens_tokens_are_contiguous_and_the_choice_ends(seed: int) -> None:
    rng = random.Random(seed)
    world = World(rng, max_tokens=rng.randint(1, 40))
    state, effects = begin(world.max_tokens, 60.0, 0.0)
    state = world.carry_out(state, effects)
    for _ in range(5000):
        if state.ended:
            break
        event = world.outstanding.pop(0) if world.outstanding else Tick()
        if isinstance(event, Tick) or rng.random() < 0.05:
            world.now = max(world.now, state.wake_at)
        state, effects = step(state, event, world.now)
        state = world.carry_out(state, effects)
    assert state.ended
    assert len(world.ended) == 1
    assert world.got == [world.token(i) for i in range(len(world.got))]
    assert world.attempts == list(range(1, len(world.attempts) + 1))
    if world.ended == ["finish"]:
        assert len(world.got) == world.max_tokens


@pytest.mark.parametrize("seed", range(60))
def test_the_short_way_of_a_token_is_the_long_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    world = World(rng, max_tokens=rng.randint(1, 40))
    state, effects = begin(world.max_tokens, 60.0, 0.0)
    state = world.carry_out(state, effects)
    for _ in range(300):
        event = world.outstanding.pop(0) if world.outstanding else Tick()
        with monkeypatch.context() as patched:
            patched.setattr(lifecycle, "_due", lambda *_: None)
            expected = step(state, event, world.now)
        assert step(state, event, world.now) == expected
        state = world.carry_out(expected[0], expected[1])
