"""Virtual time: what happens when, and in which order."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from tests.simulation.oracle import Violation

MOST_EVENTS = 50_000
"""A seed takes some thousands."""


class Timeline:
    """Actions by their time; those of one instant in the order in which they were asked for."""

    def __init__(self) -> None:
        self.now = 0.0
        self.num_events = 0
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._asked = 0

    def at(self, when: float, action: Callable[[], None]) -> None:
        self._asked += 1
        heapq.heappush(self._queue, (max(when, self.now), self._asked, action))

    def after(self, delay: float, action: Callable[[], None]) -> None:
        self.at(self.now + delay, action)

    def run(self, until: float) -> None:
        """Plays everything up to `until`."""
        queue = self._queue
        while queue and queue[0][0] <= until:
            self.now, _, action = heapq.heappop(queue)
            self.num_events += 1
            if self.num_events > MOST_EVENTS:
                raise Violation(f"{MOST_EVENTS} events, and no end")
            action()
        self.now = max(self.now, until)
