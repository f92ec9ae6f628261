"""Who may come in: how many requests are inside, and whether more are let in at all."""

from __future__ import annotations

from mesh.errors import RequestError

RETRY_DRAINING_S = 1
"""Another proxy, or this one's successor, answers right away."""
RETRY_OVERLOADED_S = 1


class Door:
    """Counts the requests that make work. On shutdown: set `draining`, then wait for `in_flight` to become 0."""

    def __init__(self, limit: int) -> None:
        self.draining = False
        self.in_flight = 0
        self._limit = limit

    def enter(self) -> None:
        """Every `enter` that returns is followed by one `leave`. Raises `RequestError` 503."""
        if self.draining:
            raise RequestError(
                503,
                "This server is shutting down and takes no new requests.",
                type="server_error",
                code="draining",
                retry_after=RETRY_DRAINING_S,
            )
        if self.in_flight >= self._limit:
            raise RequestError(
                503,
                "The server is overloaded. Please try again shortly.",
                type="server_error",
                code="overloaded",
                retry_after=RETRY_OVERLOADED_S,
            )
        self.in_flight += 1

    def leave(self) -> None:
        self.in_flight -= 1
