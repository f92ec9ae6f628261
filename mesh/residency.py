"""How a worker tells the proxies which blocks it holds: straight over its connections, or through Redis.

Residency is a hint. A publisher never blocks its caller and never raises: a proxy that knows nothing routes a
request less well, and a worker that is asked for a block it no longer holds says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from mesh.messages import BlockEvents, WorkerInfo
from mesh.residency_redis import RedisPublisher

EVENT_NAMES = 16_384
"""Names in one message: a quarter of a megabyte, which delays no token behind it noticeably."""


class Publisher(Protocol):
    """Used by one thread."""

    def publish(self, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """Full blocks that became, and that ceased to be, reusable."""

    def reset(self, held: Sequence[bytes]) -> None:
        """All the blocks that are reusable now."""

    def close(self) -> None:
        """The worker leaves; what it held is gone."""


class DirectPublisher:
    """Hands `BlockEvents` to the worker's own connections."""

    def __init__(self, send: Callable[[BlockEvents], None]) -> None:
        self._send = send
        self._seq = 0

    def publish(self, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        self._events(False, stored, removed)

    def reset(self, held: Sequence[bytes]) -> None:
        self._events(True, held, ())

    def close(self) -> None:
        """Nothing to say: a proxy drops what it knows of a worker that leaves."""

    def _events(self, reset: bool, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        """In messages of bounded size; a name both removed and stored in one call ends up stored."""
        while True:
            self._seq += 1
            now_removed, removed = removed[:EVENT_NAMES], removed[EVENT_NAMES:]
            room = 0 if removed else EVENT_NAMES
            now_stored, stored = stored[:room], stored[room:]
            self._send(BlockEvents(self._seq, reset, tuple(now_stored), tuple(now_removed)))
            reset = False
            if not stored and not removed:
                return


def open_publisher(store: str, worker: WorkerInfo, send: Callable[[BlockEvents], None]) -> Publisher:
    """The publisher for `store`: `memory` (events go through `send`) or a Redis URL (`send` is not used).

    Raises `StartupError` for a URL that means nothing; a server that does not answer is tried again for ever.
    """
    if store == "memory":
        return DirectPublisher(send)
    return RedisPublisher(store, worker)
