"""The life of a launched mesh as a machine without I/O: what to start, signal and say, given what happened.

    STARTING ──all ready──▶ SERVING ──stop──▶ DRAINING ──proxy gone──▶ LEAVING ──workers gone──▶ CLOSING ──▶ DONE
       │ └──stop──────────────────────────────────────────────────────────▲
       └──a process cannot start──▶ DONE

A process that ends while STARTING or SERVING is started again after a delay that doubles from 0.2 s to 30 s and is
forgotten after 60 s of running. One that says it cannot start, or ends with an exit code that says so, before the
mesh ever served, ends everything: starting it again would say the same. A second stop kills whatever runs.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum

from mesh.errors import EXIT_ENVIRONMENT, EXIT_USAGE, EXIT_WORKER
from mesh.progress import READY, Failed, Phase

FIRST_DELAY_S = 0.2
MAX_DELAY_S = 30.0
STABLE_S = 60.0
"""A process that ran so long had no part in the failure before; its delay starts anew."""
MAX_STARTS = 5
"""Lives that a process gets before the mesh has served once; a sixth would end like them."""
LEAVE_GRACE_S = 5.0
"""Beyond its drain time, for a process to close its sockets; then it is killed."""
SIGNAL_GAP_S = 1.0
"""Between two equal signals to a process: of two that come at once it sees one."""
STARTUP_CODES = range(EXIT_USAGE, EXIT_ENVIRONMENT + 1)
EXIT_KILLED = 130
"""Asked twice to stop: 128 + SIGINT, as shells count."""


class Kind(Enum):
    STORE = "store"
    PROXY = "proxy"
    WORKER = "worker"


class State(Enum):
    STARTING = "starting"
    SERVING = "serving"
    DRAINING = "draining"
    """The proxy admits nothing and finishes its streams; the workers still work for it."""
    LEAVING = "leaving"
    """The proxy is gone; the workers finish and go."""
    CLOSING = "closing"
    """Only the store is left."""
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Exited:
    name: str
    code: int
    """As `subprocess` counts: negative for a signal."""
    last_words: str = ""
    """The last line it printed."""


@dataclass(frozen=True, slots=True)
class Reported:
    name: str
    report: Phase | Failed


@dataclass(frozen=True, slots=True)
class DoorOpen:
    """The proxy answers that it is ready."""


@dataclass(frozen=True, slots=True)
class StopAsked:
    """Ctrl-C or SIGTERM."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = Exited | Reported | DoorOpen | StopAsked | Tick


@dataclass(frozen=True, slots=True)
class Spawn:
    name: str


@dataclass(frozen=True, slots=True)
class Signal:
    """To the process and everything it started."""

    name: str
    number: signal.Signals


@dataclass(frozen=True, slots=True)
class Announce:
    """The mesh serves: show the start screen."""


@dataclass(frozen=True, slots=True)
class Note:
    """A line for the person at the terminal."""

    level: str
    text: str


@dataclass(frozen=True, slots=True)
class End:
    """Leave with `code`, killing what still runs; `message` is the one line that says why."""

    code: int
    message: str = ""


Effect = Spawn | Signal | Announce | Note | End


@dataclass(slots=True, eq=False)
class Life:
    """One process over all its restarts."""

    name: str
    kind: Kind
    running: bool = False
    ready: bool = False
    phase: str = ""
    fraction: float | None = None
    started: float = 0.0
    starts: int = 0
    delay: float = 0.0
    restart_at: float | None = None
    failure: Failed | None = None


@dataclass(slots=True, eq=False)
class Lifecycle:
    """The whole mesh. `now` is the same monotonic clock, in seconds, in every call."""

    members: Sequence[tuple[str, Kind]]
    drain_timeout: float
    state: State = State.STARTING
    lives: dict[str, Life] = field(default_factory=dict)
    deadline: float | None = None
    """When the current state of stopping ends by force."""
    drained_by: float = 0.0
    hurried: bool = False
    """The proxy was told a second time."""

    def start(self, now: float) -> list[Effect]:
        """Everything at once: what depends on another waits for it by itself."""
        self.lives = {name: Life(name, kind) for name, kind in self.members}
        return [self._spawn(life, now) for life in self.lives.values()]

    def step(self, event: Event, now: float) -> list[Effect]:
        """What to do about `event`."""
        match event:
            case Exited(name=name):
                effects = self._exited(self.lives[name], event, now)
            case Reported(name=name, report=report):
                effects = self._reported(self.lives[name], report)
            case DoorOpen() if self.awaits_door:
                self.state = State.SERVING
                effects = [Announce()]
            case StopAsked():
                effects = self._stop(now)
            case _:
                effects = []
        return effects + self._timers(now)

    @property
    def awaits_door(self) -> bool:
        """Every worker is ready, so the proxy can be asked whether it is."""
        workers = self._of(Kind.WORKER)
        return self.state is State.STARTING and all(w.ready for w in workers)

    @property
    def next_timer(self) -> float | None:
        """When `step` wants a `Tick` at the latest."""
        restarts = [life.restart_at for life in self.lives.values() if life.restart_at is not None]
        return min([*restarts, *([self.deadline] if self.deadline is not None else [])], default=None)

    def _of(self, *kinds: Kind) -> list[Life]:
        return [life for life in self.lives.values() if life.kind in kinds]

    def _spawn(self, life: Life, now: float) -> Effect:
        life.running, life.ready = True, False
        life.phase, life.fraction, life.failure = "", None, None
        life.started, life.restart_at = now, None
        life.starts += 1
        return Spawn(life.name)

    def _reported(self, life: Life, report: Phase | Failed) -> list[Effect]:
        if isinstance(report, Failed):
            life.failure = report
            return []
        life.phase, life.fraction = report.name, report.fraction
        back = report.name == READY and not life.ready and life.starts > 1 and self.state is State.SERVING
        life.ready = life.ready or report.name == READY
        return [Note("info", f"{life.name} is back")] if back else []

    def _exited(self, life: Life, event: Exited, now: float) -> list[Effect]:
        was_ready = life.ready
        life.running = life.ready = False
        if self.state not in (State.STARTING, State.SERVING):
            return self._advance(now)
        reason = _reason(life, event)
        if self.state is State.STARTING and not was_ready:
            code = life.failure.exit_code if life.failure else event.code
            if code in STARTUP_CODES:
                return self._end(code, reason or f"{life.name} cannot start (exit code {code})")
            if life.starts >= MAX_STARTS:
                why = f"{life.name} ended {life.starts} times before it was ready, {_how(event.code)}"
                return self._end(EXIT_WORKER, f"{why}: {reason}" if reason else why)
        stable = now - life.started >= STABLE_S
        life.delay = FIRST_DELAY_S if stable or not life.delay else min(MAX_DELAY_S, 2 * life.delay)
        life.restart_at = now + life.delay
        what = f"{life.name} ended, {_how(event.code)}; starting it again in {life.delay:.1f} s"
        return [Note("warning", f"{what}: {reason}" if life.failure else what)]

    def _stop(self, now: float) -> list[Effect]:
        for life in self.lives.values():
            life.restart_at = None
        match self.state:
            case State.SERVING:
                self.state = State.DRAINING
                self.deadline = self.drained_by = now + max(SIGNAL_GAP_S, self.drain_timeout)
                note = Note("info", f"draining for at most {self.drain_timeout:.0f} s; once more stops at once")
                return [note, *self._signal(signal.SIGTERM, Kind.PROXY), *self._advance(now)]
            case State.STARTING:
                self.drained_by = now
                return [*self._signal(signal.SIGTERM, Kind.PROXY), *self._leave(now)]
            case State.DONE:
                return []
            case _:
                return self._end(EXIT_KILLED, "stopped at once, as asked")

    def _timers(self, now: float) -> list[Effect]:
        effects: list[Effect] = []
        for life in self.lives.values():
            if life.restart_at is not None and now >= life.restart_at and self.state is not State.DONE:
                effects.append(self._spawn(life, now))
        if self.deadline is not None and now >= self.deadline and self.state is not State.DONE:
            effects += self._hurry(now)
        return effects

    def _hurry(self, now: float) -> list[Effect]:
        """Time is over: the proxy is told again and ends its streams with error events; then who is left is killed."""
        late = [life.name for life in self._leaving() if life.running]
        note = Note("warning", f"{', '.join(late)} did not finish in time")
        if self.state is State.DRAINING and not self.hurried:
            self.hurried, self.deadline = True, now + LEAVE_GRACE_S
            return [note, *(Signal(name, signal.SIGTERM) for name in late)]
        self.deadline = None
        return [note, *(Signal(name, signal.SIGKILL) for name in late)]

    def _leaving(self) -> list[Life]:
        """Whom the current state waits for."""
        match self.state:
            case State.DRAINING:
                return self._of(Kind.PROXY)
            case State.LEAVING:
                return self._of(Kind.PROXY, Kind.WORKER)
            case _:
                return list(self.lives.values())

    def _advance(self, now: float) -> list[Effect]:
        """The next state of stopping, once nobody is left that this one waits for."""
        if any(life.running for life in self._leaving()):
            return []
        match self.state:
            case State.DRAINING:
                return self._leave(now)
            case State.LEAVING:
                self.state, self.deadline = State.CLOSING, now + LEAVE_GRACE_S
                return [*self._signal(signal.SIGTERM, Kind.STORE), *self._advance(now)]
            case _:
                return self._end(0, "")

    def _leave(self, now: float) -> list[Effect]:
        self.state = State.LEAVING
        self.deadline = max(now, self.drained_by) + LEAVE_GRACE_S
        return [*self._signal(signal.SIGTERM, Kind.WORKER), *self._advance(now)]

    def _signal(self, number: signal.Signals, kind: Kind) -> list[Effect]:
        return [Signal(life.name, number) for life in self._of(kind) if life.running]

    def _end(self, code: int, message: str) -> list[Effect]:
        self.state, self.deadline = State.DONE, None
        return [End(code, message)]


def _reason(life: Life, event: Exited) -> str:
    """What the process itself said."""
    if life.failure:
        return life.failure.message
    return event.last_words.partition("kvmesh: ")[2] or event.last_words


def _how(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"
