"""One process in virtual time: its own clock, its pauses, its end."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from tests.simulation.timeline import Timeline

TURN_S = 0.001
"""From what wakes an I/O loop to its turn, which takes all that has come meanwhile."""


class Host(ABC):
    """What every simulated process is. One object is one life: a restart is another object."""

    def __init__(self, name: str, timeline: Timeline, *, clock_at: float = 0.0, clock_rate: float = 1.0) -> None:
        self.name = name
        self.timeline = timeline
        self.alive = True
        self.slow_s = 0.0
        """Added to the way of every message from and to this process."""
        self._clock_at = clock_at
        self._clock_rate = clock_rate
        self._paused_until = 0.0
        self._turn_at = float("inf")

    def clock(self) -> float:
        """Its monotonic clock: no two processes agree on it, and it may jump ahead."""
        return self._clock_at + self.timeline.now * self._clock_rate

    def jump(self, seconds: float) -> None:
        self._clock_at += seconds
        self.wake()

    def pause(self, seconds: float) -> None:
        """Stops it as SIGSTOP does: nothing runs, its sockets still fill."""
        self._paused_until = max(self._paused_until, self.timeline.now + seconds)
        self.wake()

    def soon(self, action: Callable[..., Any], *arguments: Any, delay: float = 0.0) -> None:
        """Runs `action` in this process after `delay`, later if it is paused then, never if it is dead."""

        def run() -> None:
            if not self.alive:
                return
            if self.timeline.now < self._paused_until:
                self.timeline.at(self._paused_until, run)
            else:
                action(*arguments)

        self.timeline.after(delay, run)

    def wake(self, delay: float = TURN_S) -> None:
        """Has `turn` run after `delay` at the latest."""
        when = max(self.timeline.now + delay, self._paused_until)
        if not self.alive or when >= self._turn_at:
            return
        self._turn_at = when
        self.timeline.at(when, lambda: self._run_turn(when))

    def _run_turn(self, when: float) -> None:
        if not self.alive or when != self._turn_at:
            return  # an earlier one has been asked for since, and asks for its successor
        self._turn_at = float("inf")
        if self.timeline.now < self._paused_until:
            self.wake()
        else:
            self.turn()

    def wake_at_clock(self, when: float, latest: float) -> None:
        """Has `turn` run when this process's clock shows `when`, within `latest` seconds in any case."""
        self.wake(max(0.0, min(latest, (when - self.clock()) / self._clock_rate)))

    @abstractmethod
    def turn(self) -> None:
        """One round of the process's I/O loop."""
