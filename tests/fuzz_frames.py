"""Structured fuzzing of every decoder of frames: only the typed refusal may escape, and memory stays in proportion.

    python -m tests.fuzz_frames --inputs 1000000 [--seed 0]

Valid frames of every message are mutated: bits flipped, cut, spliced with others, lengths and types swapped, nested
deeply, given sizes that they do not have; or one value in them is replaced and they are packed again, so that they pass
the outer checks. What still decodes goes into the state machines of a transfer, which must be total. Every so often an
input's peak of memory is taken.
"""

from __future__ import annotations

import argparse
import random
import struct
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import msgpack
import xxhash

from kvtransfer import fetching, holding
from kvtransfer import fetching_state as fs
from kvtransfer import holding_state as hs
from kvtransfer import messages as kv
from kvtransfer.channel import LINK_BYTES, Opener, Sealer, Unsealable
from kvtransfer.integrity import is_intact, seal, unseal
from kvtransfer.protocol import MAX_TRANSFERS_PER_PEER
from kvtransfer.transports.base import Transport, TransportFault
from kvtransfer.transports.cuda import CudaTransport
from kvtransfer.transports.inline import InlineTransport
from kvtransfer.transports.pool import BufferPool
from kvtransfer.transports.shm import ShmTransport
from mesh import messages, wire
from mesh.errors import BadFrame
from tests.kvtransfer.hostmemory import HostMemory
from tests.kvtransfer.pairs import LAYOUT, content, name, transfer_id, wanted
from tests.mesh.test_wire import filled

SEEDS_PER_MESSAGE = 6
ME, OTHER = 7, 9
LINK = b"\x01" * LINK_BYTES
FLEET = b"f" * 32
T = transfer_id(1)
STEPS_PER_STATE = 300
MEMORY_FLOOR = 8 << 20
MEMORY_FACTOR = 80
"""Bytes that one byte of a frame may cost: a tuple of one is 48 and what is in it 32."""
HEADERS = (0xC4, 0xC5, 0xC6, 0xC7, 0xC8, 0xC9, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xDE, 0xDF)
ODD_VALUES: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**63, -(2**63), 2**64 - 1, 1.5, float("nan"), float("inf"), "", "x" * 5000,
    b"", b"\x00" * 16, b"x" * 5000, [], [[]], [0] * 3000, [[[[]]]],
)  # fmt: skip
MESSAGES = [cls for cls, _ in wire._by_tag.values() if cls.__module__ in (messages.__name__, kv.__name__)]
KV_MESSAGES = [cls for cls in MESSAGES if cls.__module__ == kv.__name__]


def flip(frame: bytes, chance: random.Random) -> bytes:
    data = bytearray(frame)
    for _ in range(chance.choice((1, 1, 2, 8))):
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def cut(frame: bytes, chance: random.Random) -> bytes:
    return frame[: chance.randrange(len(frame))]


def tear(frame: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(frame))
    return frame[:at] + frame[at + chance.randrange(1, 20) :]


def double(frame: bytes, chance: random.Random) -> bytes:
    a, b = sorted(chance.randrange(len(frame) + 1) for _ in range(2))
    return frame[:b] + frame[a:]


def swap_type(frame: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(frame))
    return frame[:at] + bytes((chance.randrange(0x80, 0x100),)) + frame[at + 1 :]


def claim_length(frame: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(frame))
    size = struct.pack(">I", chance.choice((0, 255, 65535, 1 << 20, (1 << 20) - 1, 1 << 26, (1 << 32) - 1)))
    return frame[:at] + bytes((chance.choice(HEADERS),)) + size + frame[at:]


def nest(frame: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(frame))
    head = chance.choice((b"\x91", b"\x81", b"\xdd\x00\x10\x00\x00", b"\xdd\x00\x00\x02\x00", b"\xdc\xff\xff"))
    return frame[:at] + head * chance.choice((3, 100, 1000, 2000)) + frame[at:]


def pad(frame: bytes, chance: random.Random) -> bytes:
    """So long that a declared size is no longer above the frame's own."""
    size = chance.choice((1000, 5000, 20_000))
    return (b"\xdd" + struct.pack(">I", size)) * chance.choice((1, 300, 1000)) + frame + bytes(size)


BYTE_MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    flip, flip, cut, tear, double, swap_type, claim_length, nest,
)  # fmt: skip


def mangled(value: Any, chance: random.Random) -> Any:
    """`value`, a tree of lists, with one node replaced."""
    if isinstance(value, list) and value and chance.random() < 0.85:
        at = chance.randrange(len(value))
        changed = list(value)
        match chance.randrange(8):
            case 0:
                del changed[at]
            case 1:
                changed.insert(at, changed[at])
            case _:
                changed[at] = mangled(changed[at], chance)
        return changed
    return chance.choice(ODD_VALUES)


class Fuzzer:
    """See the module; `run` raises `AssertionError` at the first input that is not refused as it should be."""

    def __init__(self, seed: int) -> None:
        self._chance = random.Random(seed)
        self._corpus = [
            wire.encode(self._seed_of(cls), OTHER, ME) for cls in MESSAGES for _ in range(SEEDS_PER_MESSAGE)
        ]
        self._kv = [wire.encode(self._seed_of(cls), OTHER, ME) for cls in KV_MESSAGES for _ in range(SEEDS_PER_MESSAGE)]
        self._pool = BufferPool(1 << 16)
        self._shm = ShmTransport("fuzz", 4096)
        self._cuda = CudaTransport(HostMemory(asks=1), "fuzz", 4096)
        self._inline = InlineTransport(4096)
        for transport in (
            self._shm,
            self._cuda,
        ):  # slots are made with the first parcel
            posted = transport.post([b"p"], b"")
            assert posted is not None
            transport.reclaim(posted.place.slot, posted.place.seq)
        self._now = 0.0
        self._steps = 0
        self._holding = hs.Holding(ME, LAYOUT)
        self._fetching = fs.Fetching(ME, OTHER, LAYOUT, (), (), 8)
        self.outcomes: Counter[str] = Counter()
        self.peak = 0
        """Bytes beyond a frame's own proportion that an input took, at most."""

    def close(self) -> None:
        self._shm.close()
        self._cuda.close()

    def _seed_of(self, cls: type) -> Any:
        """Random values, but those that lead deeper into a transfer's state are what that has."""
        message = filled(cls, self._chance)
        known: dict[str, Any] = {"transfer_id": T, "attempt": 1, "layout": LAYOUT, "stream": "s", "deadline_s": 5.0}
        known |= {"wanted": wanted(range(4)), "credit": 8, "notes": 0, "round": self._chance.randrange(3), "offers": ()}
        names = {f.name for f in fields(cls)}
        changed = {k: v for k, v in known.items() if k in names} if cls.__module__ == kv.__name__ else {}
        return replace(message, **changed)

    def mutated(self, corpus: list[bytes]) -> bytes:
        frame = self._chance.choice(corpus)
        kind = self._chance.random()
        if kind < 0.45:
            tree = mangled(msgpack.unpackb(frame, max_array_len=1 << 20), self._chance)
            return bytes(msgpack.packb(tree))
        if kind < 0.55:
            other = self._chance.choice(corpus)
            return frame[: self._chance.randrange(len(frame) + 1)] + other[self._chance.randrange(len(other)) :]
        return self._chance.choice(BYTE_MUTATIONS)(frame, self._chance)

    def run(self, inputs: int, *, memory_every: int) -> None:
        targets = (self.control, self.control, self.transfer, self.transfer, self.sealed, self.payload)
        for number in range(inputs):
            if number % memory_every:
                self._once(targets[number % len(targets)], number)
                continue
            target = self._chance.choice((self.large, *targets))
            tracemalloc.start()
            size = self._once(target, number)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            self.peak = max(self.peak, peak - MEMORY_FACTOR * size)
            assert self.peak <= MEMORY_FLOOR, f"input {number}: {size} bytes took {peak} bytes of memory"

    def _once(self, target: Callable[[], tuple[str, int]], number: int) -> int:
        try:
            outcome, size = target()
        except Exception as error:
            raise AssertionError(f"input {number}, {target.__name__}: {error!r}") from error
        self.outcomes[f"{target.__name__}: {outcome}"] += 1
        return size

    def control(self) -> tuple[str, int]:
        """What a proxy or a worker reads from its control connection."""
        return self._decoded(self.mutated(self._corpus))

    def large(self) -> tuple[str, int]:
        """The same, with sizes that only a long frame may declare."""
        return self._decoded(pad(self._chance.choice(self._corpus), self._chance))

    @staticmethod
    def _decoded(frame: bytes) -> tuple[str, int]:
        try:
            wire.decode(frame)
        except BadFrame:
            return "refused", len(frame)
        return "decoded", len(frame)

    def transfer(self) -> tuple[str, int]:
        """What an endpoint reads; its checksum holds, so that the decoder and the state machines see it."""
        frame = self.mutated(self._kv)
        whole = frame + bytes(xxhash.xxh3_64_digest(frame)) if self._chance.random() < 0.95 else frame
        try:
            envelope = unseal(memoryview(whole))
        except BadFrame:
            return "refused", len(frame)
        self._step(envelope)
        return "decoded", len(frame)

    def _step(self, envelope: wire.Envelope) -> None:
        if self._steps % STEPS_PER_STATE == 0:
            self._renew()
        self._steps += 1
        self._now += self._chance.choice((0.0, 0.001, 0.5))
        sender, receiver, message = envelope.sender, envelope.receiver, envelope.message
        if isinstance(message, kv.Blocks):
            arrivals = tuple(self._arrival(message, header, sender, receiver) for header in message.blocks)
            event = fs.BlocksIn(sender, receiver, message.transfer_id, message.attempt, arrivals)
            self._fetching, _ = fetching.step(self._fetching, event, self._now)
        else:
            self._fetching, _ = fetching.step(self._fetching, fs.Received(sender, receiver, message), self._now)
        self._holding, _ = holding.step(self._holding, hs.Received(LINK, sender, receiver, message), self._now)
        self._fetching, _ = fetching.step(self._fetching, fs.Tick(), self._now)
        self._holding, _ = holding.step(self._holding, hs.Tick(), self._now)
        assert len(self._holding.servings) <= MAX_TRANSFERS_PER_PEER

    @staticmethod
    def _arrival(message: kv.Blocks, header: kv.BlockHeader, sender: int, receiver: int) -> fs.Arrival:
        part = content(name(0))
        intact = is_intact(header, message.transfer_id, message.attempt, sender, receiver, part)
        return fs.Arrival(header.index, header.name, header.valid_tokens, part, intact)

    def _renew(self) -> None:
        """Both sides of a transfer that is under way."""
        self._holding = hs.Holding(ME, LAYOUT)
        self._holding, _ = holding.step(self._holding, hs.OpenStream("s"), self._now)
        self._fetching = fs.Fetching(ME, OTHER, LAYOUT, (), (), 8)
        start = fs.Start(T, 1, "s", wanted(range(4)), 60.0)
        self._fetching, _ = fetching.step(self._fetching, start, self._now)

    def sealed(self) -> tuple[str, int]:
        """What a fetcher reads from a bulk connection: nothing that was changed may open."""
        sealer, opener = Sealer(FLEET, LINK, self._pool), Opener(FLEET, LINK, self._pool)
        payload = self._chance.randbytes(64) if self._chance.random() < 0.5 else None
        opener.open(*sealer.seal(b"", None))
        frame, body = sealer.seal(seal(kv.Confirm(T, 1), ME, OTHER), payload)
        changed, changed_body = frame, None if body is None else bytes(body)
        mutation = self._chance.choice(BYTE_MUTATIONS)
        if changed_body is not None and self._chance.random() < 0.5:
            changed_body = mutation(changed_body, self._chance)
        else:
            changed = mutation(changed, self._chance)
        same = changed == frame and (body is None) == (changed_body is None) and changed_body == (body and bytes(body))
        try:
            opener.open(changed, changed_body)
        except Unsealable as error:
            assert not same
            return error.reason, len(changed)
        assert same, "a changed message was accepted"
        return "unchanged", len(changed)

    def payload(self) -> tuple[str, int]:
        """Where a `Blocks` message says its bytes are: slots of shared or device memory, the frame behind it."""
        parts = [b"p" * self._chance.choice((1, 100, 4096))]
        sender: Transport = self._chance.choice((self._shm, self._cuda))
        posted = sender.post(parts, b"")
        assert posted is not None
        place, size = posted.place, len(parts[0])
        odd = self._chance.choice((0, -8, 8, 7, 4096, 1 << 40, -(1 << 63), 1 << 64))
        match self._chance.randrange(5):
            case 0:
                place = replace(place, slot=place.slot + odd)
            case 1:
                place = replace(place, seq=self._chance.choice((odd, place.seq + 1, place.seq - 2)))
            case 2:
                segment = flip(place.segment.encode(), self._chance).decode("latin-1")
                place = replace(
                    place, segment=self._chance.choice((segment, "../" * 9 + "etc/passwd", "", "\x00", "."))
                )
            case 3:
                size += odd
            case _:
                pass
        outcomes = []
        frame = self._chance.choice((None, b"", parts[0], b"x" * 5000))
        receivers: tuple[Transport, ...] = (self._shm, self._cuda, self._inline)
        for transport in receivers:
            try:
                taken = transport.take(place, size, frame if transport is self._inline else None)
                taken = taken if isinstance(taken, bytes | memoryview) else taken.payload() or b""
            except TransportFault:
                outcomes.append("refused")
                continue
            assert len(taken) == size
            outcomes.append("taken")
        sender.reclaim(posted.place.slot, posted.place.seq)
        return "/".join(outcomes), 100 + len(parts[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    fuzzer = Fuzzer(args.seed)
    began = time.monotonic()
    try:
        fuzzer.run(args.inputs, memory_every=50)
    finally:
        fuzzer.close()
    for outcome, count in sorted(fuzzer.outcomes.items()):
        print(f"{count:>9}  {outcome}")
    print(f"{args.inputs} inputs, nothing else escaped; {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
