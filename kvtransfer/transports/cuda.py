"""`cuda`: memory of a CUDA device, between processes of one host; no bytes pass through the other's host memory.

The sender owns a slab of device memory, cut into slots, and a small file of shared memory beside it:

    header    number of slots, their stride, the slab's handle
    numbers   each slot's sequence number, see `slots`

The place of a parcel names that file, as `shm`'s does: so it is private, is found again when its owner is dead, and the
handle is read once and not with every message. The numbers are host memory: a sender changes one before it enqueues a
copy, so a receiver that finds the same number after its own copy has the parcel whole.

The engine hands out blocks, and takes them, in host memory. So a parcel crosses the bus twice more than it would have
to, and nothing is won over `shm` yet.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvtransfer.messages import Place
from kvtransfer.transports.base import Landing, Payload, Posted, TransportFault
from kvtransfer.transports.devicememory import Done, Memory, Slab
from kvtransfer.transports.pool import BufferPool, Bytes
from kvtransfer.transports.shm import MAX_OPEN_SEGMENTS, PAGE_BYTES, Segment, remove_orphans, scope
from kvtransfer.transports.slots import Slots

NAME = "cuda"
SLAB_BYTES = 64 << 20
"""Two transfers' windows, as for `shm`."""
ALIGN_BYTES = 512
READ_S = 2.0
"""A copy that takes longer hangs: under the protocol's `ANSWER_S`, because what a holder says next waits behind it."""
_HEAD = struct.Struct("<QQI")


@dataclass(slots=True, eq=False)
class Shared:
    """A slab and the file beside it."""

    slab: Slab
    file: Segment
    count: int
    stride: int

    def number(self, slot: int) -> int:
        return int(self.file.numbers[PAGE_BYTES // 8 + slot])

    def close(self, *, own: bool) -> None:
        self.slab.close()
        self.file.close(unlink=own)


class Reading:
    """See `Landing`: a copy out of a slab."""

    def __init__(self, shared: Shared, place: Place, target: Bytes, done: Done, clock: Callable[[], float]) -> None:
        self._shared = shared
        self._place = place
        self._target = target
        self._done = done
        self._clock = clock
        self._limit = clock() + READ_S

    def payload(self) -> Payload | None:
        try:
            done = self._done()
        except RuntimeError as error:
            raise TransportFault(str(error).partition("\n")[0]) from None
        if not done:
            if self._clock() >= self._limit:
                raise TransportFault("the copy does not end")
            return None
        if self._shared.number(self._place.slot) != self._place.seq:
            raise TransportFault("the slot was overwritten during the copy")
        return self._target.data.toreadonly()


class CudaTransport:
    """See `Transport`. The own slab is made with the first parcel; where that fails, `post` has no room."""

    name = NAME

    def __init__(self, memory: Memory, host: str, slot_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises `OSError` where there is no shared memory."""
        self.scope = scope(host)
        self._memory = memory
        self._clock = clock
        self._stride = -(-slot_bytes // ALIGN_BYTES) * ALIGN_BYTES
        self._own: Shared | None = None
        self._made = False
        self._slots = Slots(0)
        self._open: dict[str, Shared] = {}
        self._pool = BufferPool(slot_bytes)
        remove_orphans()

    def post(self, parts: Sequence[Payload], link: bytes) -> Posted | None:
        if not self._made:
            self._made = True
            self._own = self._make()
        if self._own is None or sum(len(p) for p in parts) > self._stride:
            return None
        free = self._slots.begin()
        if free is None:
            return None
        slot, seq = free
        numbers = self._own.file.numbers
        numbers[PAGE_BYTES // 8 + slot] = seq - 1
        try:
            self._own.slab.write(slot * self._stride, parts)
        except RuntimeError:
            self._slots.reclaim(slot, seq)
            return None
        numbers[PAGE_BYTES // 8 + slot] = seq
        return Posted(Place(NAME, self._own.file.path.name, slot, seq), None)

    def _make(self) -> Shared | None:
        count = max(1, SLAB_BYTES // self._stride)
        try:
            slab = self._memory.own(count * self._stride)
        except RuntimeError:  # no room on the device
            return None
        try:
            file = Segment.own(PAGE_BYTES + -(-count * 8 // PAGE_BYTES) * PAGE_BYTES)
        except OSError:
            slab.close()
            return None
        head = _HEAD.pack(count, self._stride, len(slab.handle)) + slab.handle
        file.bytes[: len(head)] = memoryview(head)
        self._slots = Slots(count)
        return Shared(slab, file, count, self._stride)

    def take(self, place: Place, size: int, frame: Payload | None) -> Landing:
        shared = self._open_of(place.segment)
        if not 0 <= place.slot < shared.count or not 0 <= size <= shared.stride:
            raise TransportFault("no such slot")
        if shared.number(place.slot) != place.seq:
            raise TransportFault("the slot holds something else")
        target = self._pool.get(size)
        try:
            done = shared.slab.read(place.slot * shared.stride, target)
        except RuntimeError as error:
            raise TransportFault(str(error).partition("\n")[0]) from None
        return Reading(shared, place, target, done, self._clock)

    def _open_of(self, name: str) -> Shared:
        shared = self._open.get(name)
        if shared is None:
            file = Segment.open(name)
            try:
                shared = self._opened(file)
            except TransportFault:
                file.close(unlink=False)
                raise
            if len(self._open) >= MAX_OPEN_SEGMENTS:
                self.forget(next(iter(self._open)))
            self._open[name] = shared
        return shared

    def _opened(self, file: Segment) -> Shared:
        if len(file.bytes) < PAGE_BYTES:
            raise TransportFault("not a file beside device memory")
        count, stride, length = _HEAD.unpack(file.bytes[: _HEAD.size].tobytes())
        if _HEAD.size + length > PAGE_BYTES or PAGE_BYTES + 8 * count > len(file.bytes):
            raise TransportFault("not a file beside device memory")
        slab = self._memory.open(file.bytes[_HEAD.size : _HEAD.size + length].tobytes())
        if count * stride > slab.size:
            slab.close()
            raise TransportFault("the slab has another size than its file says")
        return Shared(slab, file, count, stride)

    def skip(self, place: Place, size: int) -> None:
        """The slot is the sender's again when it is returned."""

    def reclaim(self, slot: int, seq: int) -> None:
        self._slots.reclaim(slot, seq)

    def forget(self, segment: str) -> None:
        shared = self._open.pop(segment, None)
        if shared is not None:
            shared.close(own=False)

    def close(self) -> None:
        for name in list(self._open):
            self.forget(name)
        if self._own is not None:
            self._own.close(own=True)
            self._own = None
