"""Memory of a CPU's pool, taken from the system before it is written.

`kernels.blocks.allocate_pool` costs nothing until its pages are written. Then the system clears each huge page within
the step that writes it first, which takes a tenth of a millisecond, in a virtual machine several: 3 % of a prompt.
Blocks are first used in ascending order, so a thread can take what comes next.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import threading

from torch import Tensor

MADV_POPULATE_WRITE = 23
"""Of Linux 5.14: takes the pages without changing what they hold."""
AHEAD_BYTES = 128 << 20
"""Taken while a worker warms up, before it is ready."""
PIECE_BYTES = 2 << 20
"""One huge page per call: while it lasts, the process cannot map other memory."""

log = logging.getLogger("kvmesh.kernels")


class PagesAhead:
    """Keeps half of `AHEAD_BYTES` or more, behind the highest block that was written, in memory. Used by one thread."""

    def __init__(self, pool: Tensor) -> None:
        """`pool` is whole pages of the system, on a CPU."""
        self._pool = pool
        self._block_bytes = pool[0].nbytes
        self._taken = 0
        """Bytes from the pool's beginning."""
        self._thread: threading.Thread | None = None
        self.reach(-1)

    def reach(self, block: int) -> None:
        """This block, and none above it, may be written next."""
        behind = (block + 1) * self._block_bytes
        if self._taken >= min(behind + AHEAD_BYTES // 2, self._pool.nbytes):
            return
        if self._thread is not None and self._thread.is_alive():
            return
        first = max(self._taken, behind) // mmap.PAGESIZE * mmap.PAGESIZE
        self._taken = min(behind + AHEAD_BYTES, self._pool.nbytes)
        self._thread = threading.Thread(target=_take, args=(self._pool, first, self._taken), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Until what was asked for is there."""
        if self._thread is not None:
            self._thread.join()


def _take(pool: Tensor, first: int, stop: int) -> None:
    take = ctypes.CDLL(None, use_errno=True).madvise  # not `mmap.madvise`: that keeps the interpreter's lock
    take.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    start = pool.data_ptr()
    while first < stop:
        end = min((first // PIECE_BYTES + 1) * PIECE_BYTES, stop)
        if take(start + first, end - first, MADV_POPULATE_WRITE):
            log.debug("memory is not taken ahead: error %d", ctypes.get_errno())  # an older kernel; or none is left
            return
        first = end
