"""Buffers that are used again: a fresh page of memory costs the kernel more than the copy into it."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]

KEEP_BYTES = 64 << 20
"""Kept for reuse: two transfers' windows."""


def fill(target: Bytes, parts: Sequence[bytes | memoryview]) -> None:
    """Copies `parts`, one after another, to the beginning of `target`."""
    at = 0
    for part in parts:
        np.copyto(target[at : at + len(part)], np.frombuffer(part, dtype=np.uint8))
        at += len(part)


class BufferPool:
    """Buffers of up to `size` bytes. One comes back by itself, on any thread, when it and its last memoryview are gone;
    numpy's slices of it do not keep it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._free: deque[Bytes] = deque(maxlen=max(1, KEEP_BYTES // size))

    def get(self, size: int) -> Bytes:
        """`size` bytes, contents undefined."""
        if size > self._size:
            return np.empty(size, dtype=np.uint8)
        try:
            whole = self._free.pop()
        except IndexError:
            whole = np.empty(self._size, dtype=np.uint8)
        view = whole[:size]
        returning: weakref.finalize[Any, Bytes] = weakref.finalize(view, self._free.append, whole)
        returning.atexit = False
        return view

    def joined(self, parts: Sequence[bytes | memoryview]) -> Bytes:
        """A copy of `parts`, one after another."""
        whole = self.get(sum(len(p) for p in parts))
        fill(whole, parts)
        return whole

    @property
    def num_free(self) -> int:
        return len(self._free)
