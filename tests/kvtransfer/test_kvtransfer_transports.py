"""What only shared memory can get wrong, which transport a pair uses, and buffers that are used again."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtransfer.messages import Offer, Place
from kvtransfer.transports import shm
from kvtransfer.transports.base import Posted, Transport, TransportFault
from kvtransfer.transports.choice import choose, offers, open_transports
from kvtransfer.transports.pool import BufferPool
from kvtransfer.transports.shm import Segment, ShmTransport

SLOT_BYTES = 3000


def posted(transport: Transport, *parts: bytes) -> Posted:
    result = transport.post(parts, b"")
    assert result is not None
    return result


def test_a_slot_that_was_reused_is_a_fault() -> None:
    sender, receiver = ShmTransport("here", SLOT_BYTES), ShmTransport("here", SLOT_BYTES)
    try:
        old = posted(sender, b"old")
        sender.reclaim(old.place.slot, old.place.seq)
        new = posted(sender, b"new")
        assert new.place.slot == old.place.slot
        with pytest.raises(TransportFault):
            receiver.take(old.place, 3, None)
        assert receiver.take(new.place, 3, None) == b"new"
    finally:
        sender.close()
        receiver.close()


def test_a_slot_is_reclaimed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "SEGMENT_BYTES", 8192)
    sender = ShmTransport("here", SLOT_BYTES)
    try:
        first, second = posted(sender, b"1"), posted(sender, b"2")
        assert sender.post([b"3"], b"") is None  # both slots are out
        for _ in range(2):
            sender.reclaim(first.place.slot, first.place.seq)
        third = posted(sender, b"3")
        assert third.place.slot == first.place.slot
        assert sender.post([b"4"], b"") is None
        sender.reclaim(first.place.slot, first.place.seq)  # late: the slot is another's now
        assert sender.post([b"4"], b"") is None
        assert second.place.slot != third.place.slot
    finally:
        sender.close()


@pytest.mark.parametrize(
    "place",
    [
        Place("shm", "", 0, 2),
        Place("shm", "../../etc/passwd", 0, 2),
        Place("shm", "kvmesh-1-" + "0" * 32, 0, 2),
    ],
)
def test_a_segment_that_is_none_is_a_fault(place: Place) -> None:
    receiver = ShmTransport("here", SLOT_BYTES)
    with pytest.raises(TransportFault):
        receiver.take(place, 3, None)
    receiver.close()


@pytest.mark.parametrize("slot", [-8, 4, 1 << 40, -(1 << 40)])
def test_a_slot_outside_the_segment_is_a_fault(slot: int) -> None:
    sender, receiver = ShmTransport("here", SLOT_BYTES), ShmTransport("here", SLOT_BYTES)
    out = posted(sender, b"abc")
    with pytest.raises(TransportFault):
        receiver.take(Place("shm", out.place.segment, slot, 2), 3, None)
    with pytest.raises(TransportFault):
        receiver.take(Place("shm", out.place.segment, out.place.slot, 1 << 63), 3, None)
    sender.close()
    receiver.close()


def test_a_segment_is_private_and_gone_after_close() -> None:
    sender = ShmTransport("here", SLOT_BYTES)
    path = shm.SHM_DIR / posted(sender, b"x").place.segment
    assert path.stat().st_mode & 0o777 == 0o600
    sender.close()
    assert not path.exists()


def test_only_dead_owners_segments_are_removed() -> None:
    alive = Segment.own(4096)
    script = (
        "import os; from kvtransfer.transports.shm import Segment;"
        "print(Segment.own(4096).path, flush=True); os._exit(9)"
    )
    orphan = Path(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout.strip())
    try:
        assert orphan.exists()
        assert shm.remove_orphans() >= 1
        assert not orphan.exists()
        assert alive.path.exists()
    finally:
        alive.close(unlink=True)


def test_a_segment_that_is_taken_for_an_orphan_before_it_is_locked_is_made_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lock = fcntl.flock
    early: list[Path] = []

    def lock_late(fd: int, operation: int) -> None:
        if not early:
            early.append(Path(os.readlink(f"/proc/self/fd/{fd}")))
            shm.remove_orphans()
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    segment = Segment.own(4096)
    assert segment.path.exists()
    assert not early[0].exists()
    segment.close(unlink=True)


def test_a_segment_that_is_being_removed_is_left_to_its_remover(monkeypatch: pytest.MonkeyPatch) -> None:
    lock = fcntl.flock
    removers: list[int] = []

    def lock_second(fd: int, operation: int) -> None:
        if not removers:
            path = os.readlink(f"/proc/self/fd/{fd}")
            removers.append(os.open(path, os.O_RDWR))
            lock(removers[0], operation)
            os.unlink(path)
        lock(fd, operation)

    monkeypatch.setattr(fcntl, "flock", lock_second)
    segment = Segment.own(4096)
    os.close(removers[0])
    assert segment.path.exists()
    segment.close(unlink=True)


def test_no_room_in_shared_memory_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shm, "SEGMENT_BYTES", 100)
    sender = ShmTransport("here", SLOT_BYTES)
    assert sender.post([b"x"], b"") is None
    sender.close()


def test_the_fetchers_preference_decides_among_what_both_share() -> None:
    mine = open_transports(("shm", "zmq"), host="here", block_bytes=100, exchange=None)
    try:
        here, there = shm.scope("here"), shm.scope("there")
        assert choose((Offer("shm", here), Offer("zmq", "")), mine).name == "shm"
        assert choose((Offer("zmq", ""), Offer("shm", here)), mine).name == "zmq"
        assert choose((Offer("shm", there), Offer("zmq", "")), mine).name == "zmq"
        assert choose((Offer("rdma", ""),), mine).name == "zmq"
        assert choose((), mine).name == "zmq"
        assert [o.transport for o in offers(mine)] == ["shm", "zmq"]
    finally:
        for transport in mine.values():
            transport.close()


def test_without_shared_memory_there_is_still_the_connection(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shm, "SHM_DIR", tmp_path / "none")
    assert list(open_transports(("shm",), host="here", block_bytes=100, exchange=None)) == ["zmq"]
    assert os.listdir(tmp_path) == []


def test_a_buffer_comes_back_when_its_last_view_is_gone() -> None:
    pool = BufferPool(1000)
    whole = pool.get(600)
    whole[:] = 7
    view = whole.data.toreadonly()[100:200]
    del whole
    assert pool.num_free == 0
    other = pool.get(600)
    other[:] = 9
    assert bytes(view) == b"\x07" * 100
    del view
    assert pool.num_free == 1
    pool.get(600)
    assert pool.num_free == 1


def test_a_buffer_larger_than_the_pools_is_just_memory() -> None:
    pool = BufferPool(10)
    assert len(pool.get(11)) == 11
    assert pool.num_free == 0
