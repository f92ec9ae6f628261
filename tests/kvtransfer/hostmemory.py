"""Device memory that is none: what `cuda` does with it can be tried without a device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from kvtransfer.transports.base import Payload, TransportFault
from kvtransfer.transports.devicememory import Done
from kvtransfer.transports.pool import Bytes, fill


class HostSlab:
    def __init__(self, memory: HostMemory, data: Bytes, handle: bytes) -> None:
        self.handle = handle
        self.size = len(data)
        self.closed = False
        self._memory = memory
        self._data = data

    def write(self, at: int, parts: Sequence[Payload]) -> None:
        if self._memory.broken:
            raise RuntimeError("the device is lost")
        fill(self._data[at:], parts)

    def read(self, at: int, target: Bytes) -> Done:
        """The copy is made, and over, when it has been asked for `memory.asks` times."""
        asked = itertools.count(1)

        def done() -> bool:
            if self._memory.broken:
                raise RuntimeError("the device is lost")
            if next(asked) < self._memory.asks:
                return False
            target[:] = self._data[at : at + len(target)]
            return True

        return done

    def close(self) -> None:
        self.closed = True


class HostMemory:
    """See `Memory`: shared by the two ends."""

    def __init__(self, asks: float = 2) -> None:
        self.asks = asks
        self.full = False
        self.broken = False
        self.opened: list[HostSlab] = []
        self._slabs: dict[bytes, Bytes] = {}

    def own(self, size: int) -> HostSlab:
        if self.full:
            raise RuntimeError("out of memory")
        handle = f"slab {len(self._slabs)}".encode()
        self._slabs[handle] = np.zeros(size, dtype=np.uint8)
        return HostSlab(self, self._slabs[handle], handle)

    def open(self, handle: bytes) -> HostSlab:
        if handle not in self._slabs:
            raise TransportFault("no such slab")
        self.opened.append(HostSlab(self, self._slabs[handle], handle))
        return self.opened[-1]
