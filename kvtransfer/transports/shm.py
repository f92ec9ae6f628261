"""`shm`: POSIX shared memory between processes of one host; one copy in, one copy out, no system call.

The sender owns one segment, a file of `SHM_DIR` cut into slots:

    slot    sequence number (8 bytes, padded to 64; see `slots`), then up to `slot_bytes` of payload

The file is locked for as long as its owner lives, whatever name spaces of process ids the two are in: who can
lock a file that is not his own has found one whose owner is dead, and removes it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvtransfer.messages import Place
from kvtransfer.transports.base import Payload, Posted, TransportFault
from kvtransfer.transports.pool import BufferPool, Bytes, fill
from kvtransfer.transports.slots import Slots

NAME = "shm"
SHM_DIR = Path("/dev/shm")
SEGMENT_BYTES = 64 << 20
"""Two transfers' windows: more only helps a receiver that is slower than its own window."""
FREE_SHARE = 4
"""At most one part in so many of the free shared memory: several workers share it, and containers often have 64 MiB."""
MIN_SLOTS = 2
HEADER_BYTES = 64
PAGE_BYTES = 4096
MAX_OPEN_SEGMENTS = 256
"""Of other workers; each is address space and a reference that keeps its memory alive."""
_SEGMENT_NAME = re.compile(r"kvmesh-[0-9]{1,10}-[0-9a-f]{32}")

Numbers = npt.NDArray[np.uint64]


def scope(host: str) -> str:
    """Equal exactly where two processes see the same shared memory: containers of one host have their own."""
    return f"{host}/{SHM_DIR.stat().st_dev}"


def remove_orphans() -> int:
    """Removes the segments of dead owners; returns how many."""
    removed = 0
    for path in SHM_DIR.glob("kvmesh-*"):
        if _SEGMENT_NAME.fullmatch(path.name) is None:
            continue
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:  # another user's, or just removed
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink(missing_ok=True)
            removed += 1
        except OSError:  # its owner lives
            pass
        finally:
            os.close(fd)
    return removed


def _create() -> tuple[Path, int]:
    """A new file, locked. Between its making and its locking it looks like an orphan: one that another process has
    begun to remove is left to it."""
    while True:
        path = SHM_DIR / f"kvmesh-{os.getpid()}-{secrets.token_hex(16)}"
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                return path, fd
        except BlockingIOError:
            pass
        os.close(fd)


class Segment:
    """A mapped file. `own` makes and locks one, `open` maps another process's."""

    def __init__(self, path: Path, fd: int, size: int, prot: int) -> None:
        self.path = path
        self._fd = fd
        self._map = mmap.mmap(fd, size, prot=prot)
        self.bytes: Bytes = np.frombuffer(self._map, dtype=np.uint8)
        self.numbers: Numbers = np.frombuffer(self._map, dtype=np.uint64)

    @classmethod
    def own(cls, size: int) -> Segment:
        """A new segment of `size` bytes, all of them reserved. Raises `OSError`."""
        path, fd = _create()
        try:
            os.posix_fallocate(fd, 0, size)  # without it, a full file system kills the writer with SIGBUS
            return cls(path, fd, size, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError:
            os.close(fd)
            path.unlink(missing_ok=True)
            raise

    @classmethod
    def open(cls, name: str) -> Segment:
        """The segment `name` of another process of this user, read-only. Raises `TransportFault`."""
        if _SEGMENT_NAME.fullmatch(name) is None:
            raise TransportFault("not the name of a segment")
        path = SHM_DIR / name
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise TransportFault(f"{name}: {error.strerror}") from None
        try:
            status = os.fstat(fd)
            if status.st_uid != os.geteuid():
                raise TransportFault(f"{name} belongs to another user")
            return cls(path, fd, status.st_size, mmap.PROT_READ)
        except (OSError, ValueError) as error:
            os.close(fd)
            raise TransportFault(f"{name}: {error}") from None
        except TransportFault:
            os.close(fd)
            raise

    def close(self, *, unlink: bool) -> None:
        if unlink:
            self.path.unlink(missing_ok=True)
        self.bytes = np.empty(0, dtype=np.uint8)  # the views keep the map open
        self.numbers = np.empty(0, dtype=np.uint64)
        self._map.close()
        os.close(self._fd)


class ShmTransport:
    """See `Transport`. The own segment is made with the first parcel; where that fails, `post` has no room."""

    name = NAME

    def __init__(self, host: str, slot_bytes: int) -> None:
        """Raises `OSError` where there is no shared memory."""
        self.scope = scope(host)
        self._stride = -(-(HEADER_BYTES + slot_bytes) // PAGE_BYTES) * PAGE_BYTES
        self._segment: Segment | None = None
        self._made = False
        self._slots = Slots(0)
        self._open: dict[str, Segment] = {}
        self._pool = BufferPool(slot_bytes)
        remove_orphans()

    def post(self, parts: Sequence[Payload], link: bytes) -> Posted | None:
        if not self._made:
            self._make()
        size = sum(len(p) for p in parts)
        if self._segment is None or size > self._stride - HEADER_BYTES:
            return None
        free = self._slots.begin()
        if free is None:
            return None
        slot, seq = free
        base = slot * self._stride
        self._segment.numbers[base // 8] = seq - 1
        fill(self._segment.bytes[base + HEADER_BYTES :], parts)
        self._segment.numbers[base // 8] = seq
        return Posted(Place(NAME, self._segment.path.name, base, seq), None)

    def _make(self) -> None:
        self._made = True
        try:
            status = os.statvfs(SHM_DIR)
            room = min(SEGMENT_BYTES, status.f_bavail * status.f_frsize // FREE_SHARE)
            slots = room // self._stride
            if slots < MIN_SLOTS:
                return
            self._segment = Segment.own(slots * self._stride)
        except OSError:  # shared memory is an optimisation: the parcel goes by the connection
            return
        self._slots = Slots(slots)

    def take(self, place: Place, size: int, frame: Payload | None) -> Payload:
        segment = self._segment_of(place.segment)
        start = place.slot + HEADER_BYTES
        inside = place.slot >= 0 and place.slot % 8 == 0 and size >= 0 and start + size <= len(segment.bytes)
        if not inside or int(segment.numbers[place.slot // 8]) != place.seq:
            raise TransportFault("the slot holds something else")
        copy = self._pool.get(size)
        np.copyto(copy, segment.bytes[start : start + size])
        if int(segment.numbers[place.slot // 8]) != place.seq:
            raise TransportFault("the slot was overwritten during the copy")
        return copy.data.toreadonly()

    def skip(self, place: Place, size: int) -> None:
        """The slot is the sender's again when it is returned."""

    def _segment_of(self, name: str) -> Segment:
        segment = self._open.get(name)
        if segment is None:
            segment = Segment.open(name)
            if len(self._open) >= MAX_OPEN_SEGMENTS:
                self.forget(next(iter(self._open)))
            self._open[name] = segment
        return segment

    def reclaim(self, slot: int, seq: int) -> None:
        self._slots.reclaim(slot // self._stride, seq)

    def forget(self, segment: str) -> None:
        known = self._open.pop(segment, None)
        if known is not None:
            known.close(unlink=False)

    def close(self) -> None:
        for name in list(self._open):
            self.forget(name)
        if self._segment is not None:
            self._segment.close(unlink=True)
            self._segment = None
