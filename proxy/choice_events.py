"""What happens to a choice (events) and what is to be done about it (effects); see `proxy.lifecycle`.

What exists once per token is a named tuple: it is made in a quarter of the time that a frozen dataclass takes.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

from mesh.messages import TokenDelta, TokenLogprob
from proxy.routing.place import Place


class Absence(Enum):
    """Why there is no route now."""

    NONE = "none"
    """No worker, and none known to come back."""
    RETURNING = "returning"
    """A worker was lost or drained lately: it is probably being restarted."""
    HELD = "held"
    """Workers exist; the retry budget is spent, or all of them have just refused this choice."""


@dataclass(frozen=True, slots=True)
class Routed:
    """The answer to `NeedRoute`."""

    decode: Place
    source: Place | None
    """The prefill worker, if there is one."""
    holders: frozenset[Place]
    """Of whom the decode worker is told that they have the prompt's beginning."""


@dataclass(frozen=True, slots=True)
class NoRoute:
    """The other answer to `NeedRoute`."""

    absence: Absence


class Deltas(NamedTuple):
    worker: Place
    delta: TokenDelta


@dataclass(frozen=True, slots=True)
class WorkerRefused:
    worker: Place
    attempt: int
    code: str
    message: str
    retryable: bool


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The worker ended, fell silent, or forgot what it had been given."""

    worker: Place


@dataclass(frozen=True, slots=True)
class ClientGone:
    reason: str


@dataclass(frozen=True, slots=True)
class StopReached:
    """The proxy found a stop string: the choice has all it needs."""


@dataclass(frozen=True, slots=True)
class FleetChanged:
    """A worker came or became free: those that wait should ask again."""


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


Event = Routed | NoRoute | Deltas | WorkerRefused | WorkerLost | ClientGone | StopReached | FleetChanged | Tick


class Emit(NamedTuple):
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: str | None
    prompt_logprobs: tuple[TokenLogprob | None, ...]


@dataclass(frozen=True, slots=True)
class NeedRoute:
    """Choose workers for a new attempt, and answer with `Routed` or `NoRoute` at once."""

    exclude: frozenset[Place]
    retry: str
    """Empty: the first attempt. Otherwise why the last one ended: `lost`, `refused`, `gap`, `diverged`."""


@dataclass(frozen=True, slots=True)
class Assign:
    """Send the new attempt to its workers."""

    number: int
    decode: Place
    source: Place | None


@dataclass(frozen=True, slots=True)
class SendAbort:
    worker: Place
    attempt: int
    reason: str


@dataclass(frozen=True, slots=True)
class Finish:
    """The choice is over and the client has its finish reason (or wants nothing more)."""


@dataclass(frozen=True, slots=True)
class Fail:
    """The choice cannot be completed; fields as in `mesh.errors.RequestError`."""

    status: int
    message: str
    type: str
    code: str
    retry_after: int | None = None


Effect = Emit | NeedRoute | Assign | SendAbort | Finish | Fail
