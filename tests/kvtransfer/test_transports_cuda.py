"""What only `cuda` can get wrong, on memory that is no device's; and with a device, what only a device shows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import msgpack
import numpy as np
import pytest
import torch

from kvtransfer.linktest import link_times
from kvtransfer.messages import Place
from kvtransfer.transports.base import TransportFault
from kvtransfer.transports.choice import open_transports
from kvtransfer.transports.cuda import READ_S, CudaTransport
from kvtransfer.transports.devicememory import decode
from kvtransfer.transports.shm import SHM_DIR, Segment, ShmTransport
from tests.kvtransfer.hostmemory import HostMemory
from tests.kvtransfer.pairs import Clock

SLOT_BYTES = 3000
FIELDS = ["uuid", b"event", b"handle", 100, 0, b"counter", 0, b"event", True]
needs_device = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def memory() -> HostMemory:
    return HostMemory()


@pytest.fixture
def ends(memory: HostMemory) -> Iterator[tuple[CudaTransport, CudaTransport, Clock]]:
    clock = Clock()
    sender, receiver = CudaTransport(memory, "h", SLOT_BYTES), CudaTransport(memory, "h", SLOT_BYTES, clock)
    yield sender, receiver, clock
    sender.close()
    receiver.close()


Ends = tuple[CudaTransport, CudaTransport, Clock]


def post(sender: CudaTransport, data: bytes) -> Place:
    out = sender.post([data], b"")
    assert out is not None
    return out.place


def test_bytes_land_when_their_copy_is_done_and_not_before(ends: Ends, memory: HostMemory) -> None:
    sender, receiver, _ = ends
    memory.asks = 3
    landing = receiver.take(post(sender, b"bytes"), 5, None)
    assert [landing.payload(), landing.payload()] == [None, None]
    assert landing.payload() == b"bytes"


def test_a_slot_that_is_overwritten_during_the_copy_is_a_fault(ends: Ends) -> None:
    sender, receiver, _ = ends
    place = post(sender, b"old")
    landing = receiver.take(place, 3, None)
    assert landing.payload() is None
    sender.reclaim(place.slot, place.seq)
    assert post(sender, b"new").slot == place.slot
    with pytest.raises(TransportFault, match="overwritten"):
        landing.payload()


def test_a_copy_that_never_ends_and_a_device_that_is_lost_are_faults(ends: Ends, memory: HostMemory) -> None:
    sender, receiver, clock = ends
    place = post(sender, b"bytes")
    memory.asks = float("inf")
    landing = receiver.take(place, 5, None)
    clock.now += READ_S - 0.1
    assert landing.payload() is None
    clock.now += 0.1
    with pytest.raises(TransportFault):
        landing.payload()
    landing = receiver.take(place, 5, None)
    memory.broken = True
    with pytest.raises(TransportFault, match="lost"):
        landing.payload()
    assert sender.post([b"x"], b"") is None, "another transport is used"


def test_a_slab_is_opened_once_and_closed_when_its_sender_is_gone(ends: Ends, memory: HostMemory) -> None:
    sender, receiver, _ = ends
    places = [post(sender, b"a"), post(sender, b"b")]
    for place in places:
        receiver.take(place, 1, None)
    assert [slab.closed for slab in memory.opened] == [False]
    receiver.forget(places[0].segment)
    assert [slab.closed for slab in memory.opened] == [True]


def test_the_file_beside_a_slab_is_private_and_gone_after_close(ends: Ends) -> None:
    sender, _, _ = ends
    path = SHM_DIR / post(sender, b"x").segment
    assert path.stat().st_mode & 0o777 == 0o600
    sender.close()
    assert not path.exists()


def test_no_room_on_the_device_or_beside_it_is_no_error(memory: HostMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    memory.full = True
    sender = CudaTransport(memory, "h", SLOT_BYTES)
    assert sender.post([b"x"], b"") is None
    memory.full = False
    assert sender.post([b"x"], b"") is None, "not tried with every parcel"
    sender.close()

    def full(size: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(Segment, "own", full)
    sender = CudaTransport(memory, "h", SLOT_BYTES)
    assert sender.post([b"x"], b"") is None


def test_places_that_cannot_be_are_faults(ends: Ends) -> None:
    sender, receiver, _ = ends
    place = post(sender, b"abc")
    for slot in (-1, place.slot + 1, 1 << 40):
        with pytest.raises(TransportFault):
            receiver.take(replace(place, slot=slot), 3, None)
    for size in (-1, SLOT_BYTES + 1000):
        with pytest.raises(TransportFault):
            receiver.take(place, size, None)


def test_a_file_that_belongs_to_no_slab_is_a_fault(ends: Ends) -> None:
    _, receiver, _ = ends
    other = ShmTransport("h", SLOT_BYTES)
    out = other.post([b"\xff" * SLOT_BYTES], b"")
    assert out is not None
    with pytest.raises(TransportFault):
        receiver.take(Place("cuda", out.place.segment, 0, 2), 3, None)
    other.close()


@pytest.mark.parametrize("handle", [b"", b"\xc1", msgpack.packb(FIELDS[:-1]), msgpack.packb([*FIELDS[:-1], "yes"])])
def test_a_handle_that_is_none_is_a_fault(handle: bytes) -> None:
    assert decode(msgpack.packb(FIELDS)) == FIELDS
    with pytest.raises(TransportFault):
        decode(handle)


def test_a_worker_on_a_cpu_has_no_cuda() -> None:
    found = open_transports(("cuda", "zmq"), host="h", block_bytes=9, exchange=None)
    assert list(found) == ["zmq"]


@pytest.mark.gpu
@needs_device
def test_blocks_between_two_processes_on_one_device() -> None:
    pages = np.zeros((64, 192 << 10), dtype=np.uint8)
    assert len(link_times("cuda", pages, 2)) == 2


@pytest.mark.gpu
@needs_device
def test_a_slab_of_another_process_that_was_killed_is_a_fault_or_what_it_was() -> None:
    script = (
        "import sys, torch; from kvtransfer.transports.cuda import CudaTransport;"
        "from kvtransfer.transports.devicememory import CudaMemory;"
        "sender = CudaTransport(CudaMemory(torch.device('cuda', 0)), 'h', 3000);"
        "place = sender.post([b'bytes'], b'').place; print(place.segment, place.slot, place.seq, flush=True);"
        "sys.stdin.read()"
    )
    command = [sys.executable, "-c", script]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    segment, slot, seq = child.stdout.readline().split()
    receiver = open_transports(("cuda",), host="h", block_bytes=3000, exchange=None, device="cuda:0")["cuda"]
    child.kill()
    child.communicate()
    with pytest.raises(TransportFault):
        receiver.take(Place("cuda", segment, int(slot) + 1, int(seq)), 5, None)
    receiver.close()
