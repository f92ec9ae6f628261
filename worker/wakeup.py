"""Wakes the I/O loop's poll from another thread or a signal handler."""

from __future__ import annotations

import os
import threading


class Wakeup:
    """An eventfd that may be set at any time, also when its loop has just ended."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._closed = False
        self._lock = threading.RLock()  # re-entrant: a signal handler may interrupt `close` on the same thread

    def set(self) -> None:
        with self._lock:
            if not self._closed:
                os.eventfd_write(self.fd, 1)

    def clear(self) -> None:
        """To be called when `fd` is readable."""
        os.eventfd_read(self.fd)

    def close(self) -> None:
        with self._lock:
            if not self._closed:
                self._closed = True
                os.close(self.fd)
