"""One pair of workers that talks through a `Group`, and the thread that is the group's only user.

    put ──▶ queue ──▶ thread: join, then one parcel after another ──▶ done
                         └── the first thing that fails ends the pair: `failure` is set, the group is aborted

The thread waits for the other side; whoever puts never does. A pair that was abandoned is left to itself: its thread
ends within the time that the group waits.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch

from kvtransfer.transports.base import Payload, TransportFault
from kvtransfer.transports.groups import Group
from kvtransfer.transports.pool import Bytes

IDLE_S = 60.0
"""A sender without parcels leaves its group; the next parcel builds another. Longer than a link is kept idle."""

Move = Callable[[Group], None]


class Pair:
    """See the module."""

    def __init__(self, name: str, join: Callable[[], Group], idle_s: float | None, clock: Callable[[], float]) -> None:
        self.name = name
        self.began = self.moved_at = clock()
        """When it was made, and when a parcel last moved."""
        self.next_number = 0
        """Of the parcels, counted on both sides: a parcel's message that was lost must not shift the ones after it."""
        self.failure = ""
        self.ended = False
        self._join = join
        self._clock = clock
        self._idle_s = idle_s
        self._queue: queue.SimpleQueue[Move | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        """Between `put` and the end for idleness: a parcel that was put is sent, or the pair has failed."""
        self._thread = threading.Thread(target=self._run, name=f"kv-{name[:8]}", daemon=True)
        self._thread.start()

    def put(self, move: Move) -> bool:
        """False: the pair has ended."""
        with self._lock:
            if self.ended:
                return False
            self._queue.put(move)
            return True

    def abandon(self, failure: str) -> None:
        """No more of it; what was put and has not begun is not done."""
        with self._lock:
            self.ended = True
            self.failure = self.failure or failure
        self._queue.put(None)

    def wait(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        try:
            group = self._join()
            try:
                while (move := self._next()) is not None:
                    move(group)
                    self.moved_at = self._clock()
            finally:
                group.abort()
        except RuntimeError as error:  # torch has no narrower one for what befalls a group
            self.abandon(str(error).partition("\n")[0])

    def _next(self) -> Move | None:
        """What to do next; None: the pair has ended."""
        while True:
            try:
                move = self._queue.get(timeout=self._idle_s)
            except queue.Empty:
                with self._lock:
                    if self._queue.empty():
                        self.ended = True
                        return None
                continue
            return None if self.ended else move


class Arriving:
    """See `Landing`: a parcel that its sender was asked for, or will be."""

    def __init__(self, pair: Pair, buffer: Bytes, size: int, clock: Callable[[], float], wait_s: float) -> None:
        self._pair = pair
        self._buffer = buffer
        self._size = size
        self._clock = clock
        self._taken_at = clock()
        self._wait_s = wait_s
        self._done = False

    def move(self, group: Group) -> None:
        """On the pair's thread."""
        group.receive(torch.from_numpy(self._buffer), self._size)
        self._done = True

    def payload(self) -> Payload | None:
        if self._done:
            return self._buffer.data[: self._size].toreadonly()  # a slice of the array would not keep the buffer
        if self._pair.failure:
            raise TransportFault(self._pair.failure)
        if self._clock() >= max(self._taken_at, self._pair.moved_at) + self._wait_s:  # the thread itself hangs
            self._pair.abandon("the peer did not send within the time for it")
            raise TransportFault(self._pair.failure)
        return None
