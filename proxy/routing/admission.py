"""How much the proxy takes on: the bound on live requests, and the budget of retries.

Only what workers refused draws on the budget's permission: a fleet that says no must not be asked ever more
often. Work whose worker died or leaves is placed again at once (it counts, but is never held): it was admitted, it is
bounded by what was running, and holding it would turn one dead worker into failed requests.
"""

from __future__ import annotations

import math
from collections import deque

from mesh.errors import RequestError

MAX_RETRY_AFTER_S = 30
"""Clients that are told to come back later than this give up."""
RETRY_WINDOW_S = 10.0
RETRY_SHARE = 0.1
RETRY_FLOOR = 3
"""Retries per window that are always allowed: a small fleet has few requests to take a share of."""


class RetryBudget:
    """At most a tenth of the last ten seconds' requests, plus three, are retries."""

    def __init__(self) -> None:
        self._requests: deque[float] = deque()
        self._retries: deque[float] = deque()

    def request(self, now: float) -> None:
        self._requests.append(now)
        self._forget(now)

    def spend(self, now: float, *, ask: bool) -> bool:
        """Counts a retry. With `ask`, only if the budget has room; False: not now."""
        self._forget(now)
        if ask and len(self._retries) >= RETRY_FLOOR + RETRY_SHARE * len(self._requests):
            return False
        self._retries.append(now)
        return True

    def _forget(self, now: float) -> None:
        for times in (self._requests, self._retries):
            while times and now - times[0] > RETRY_WINDOW_S:
                times.popleft()


def overloaded(live: int, limit: int, owed_tokens: int, tokens_per_s: float) -> RequestError | None:
    """The refusal of one more request, with the time the present work needs as Retry-After; None:
    admitted."""
    if live < limit:
        return None
    wait = owed_tokens / tokens_per_s if tokens_per_s > 0 else 1.0
    return RequestError(
        503,
        f"The server is at its limit of {limit} requests.",
        type="server_error",
        code="overloaded",
        retry_after=min(MAX_RETRY_AFTER_S, max(1, math.ceil(wait))),
    )


def draining() -> RequestError:
    return RequestError(503, "The server is shutting down.", type="server_error", code="draining", retry_after=5)
