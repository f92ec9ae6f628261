"""A TCP relay that damages what ZeroMQ sends through it, message by message, from a seed.

    python -m tests.kvtransfer.relay --frames 10000

sends sealed KV messages through it, every one of them damaged, and says how many were accepted: none must be.
"""

from __future__ import annotations

import argparse
import random
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import BufferedReader

import zmq

from kvtransfer.channel import LINK_BYTES, Opener, Sealer, Unsealable
from kvtransfer.transports.pool import BufferPool

GREETING_BYTES = 64
MORE, LONG, COMMAND = 1, 2, 4
"""Flags of a ZMTP 3 frame."""
FLIP, CUT, REPEAT, SWAP = "flip", "cut", "repeat", "swap"
RAW, DELAY, RESET, STALL = "raw", "delay", "reset", "stall"
CORRUPTING = (FLIP, CUT)
SEALED = (FLIP, CUT, REPEAT, SWAP)
"""Faults that leave ZMTP whole, so that only the seal can find them."""
EVERY = (*SEALED, RAW, DELAY, RESET, STALL)
DELAY_S = 0.02
SPARED_BYTES = 200
"""Messages up to this size pass: greetings and the test's own marks."""


@dataclass(slots=True, eq=False)
class Frame:
    flags: int
    body: bytearray

    def encoded(self) -> bytes:
        if len(self.body) > 255:
            return struct.pack(">BQ", self.flags | LONG, len(self.body)) + self.body
        return bytes((self.flags & ~LONG, len(self.body))) + self.body


@dataclass(frozen=True, slots=True)
class Hit:
    """What becomes of one message."""

    kind: str
    """Of the fault, or nothing."""
    out: bytes
    """To be sent."""
    wait_s: float | None
    """Before that; None: for ever."""


class Faults:
    """What is done to the messages of one direction, and how often it was."""

    def __init__(self, kinds: Sequence[str], seed: int, rate: float = 1.0) -> None:
        self.done: Counter[str] = Counter()
        self._kinds = kinds
        self._rate = rate
        self._chance = random.Random(seed)
        self._held: bytes | None = None
        """A message that will follow the next."""

    def choose(self, frames: list[Frame]) -> tuple[str, float | None]:
        """The kind of the fault that this message suffers, or nothing, and how long it waits; None: for ever."""
        if sum(len(f.body) for f in frames) <= SPARED_BYTES or self._chance.random() >= self._rate:
            return "", 0.0
        kind = self._chance.choice(self._kinds)
        kind = "" if kind == SWAP and self._held is not None else kind
        return kind, {DELAY: DELAY_S, STALL: None}.get(kind, 0.0)

    def apply(self, frames: list[Frame]) -> Hit:
        kind, wait_s = self.choose(frames)
        self.done.update([kind] if kind else [])
        if kind == SWAP:
            self._held = b"".join(f.encoded() for f in frames)
            return Hit(kind, b"", wait_s)
        if kind == FLIP:
            body = self._body(frames)
            body[self._chance.randrange(len(body))] ^= 1 << self._chance.randrange(8)
        elif kind == CUT:
            body = self._body(frames)
            del body[self._chance.randrange(len(body)) :]
        out = b"".join(f.encoded() for f in frames)
        if kind == REPEAT:
            out += out
        elif kind == RAW:  # whatever it hits: flags, lengths, bodies
            damaged = bytearray(out)
            damaged[self._chance.randrange(min(12, len(damaged)))] ^= 1 << self._chance.randrange(8)
            out = bytes(damaged)
        held, self._held = self._held, None
        return Hit(kind, out + (held or b""), wait_s)

    def _body(self, frames: list[Frame]) -> bytearray:
        return self._chance.choice([f.body for f in frames if f.body])


class Relay:
    """Listens on loopback and forwards to `port` there; what comes back from there suffers `faults`, and what is said
    to it `outward`."""

    def __init__(self, port: int, faults: Faults, outward: Faults | None = None) -> None:
        self._target = port
        self._faults = faults
        self._outward = outward or Faults((), 0, rate=0.0)
        self._stopped = threading.Event()
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.1)
        self.port: int = self._listener.getsockname()[1]
        self._start(self._accept)

    def _start(self, body: Callable[..., None], *args: socket.socket | Faults) -> None:
        thread = threading.Thread(target=body, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stopped.is_set():
            try:
                near = self._listener.accept()[0]
            except TimeoutError:
                continue
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            near.settimeout(None)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets += [near, far]
            self._start(self._forward, near, far, self._outward)
            self._start(self._forward, far, near, self._faults)

    def _forward(self, source: socket.socket, target: socket.socket, faults: Faults) -> None:
        try:
            with source.makefile("rb") as stream:
                for _ in range(GREETING_BYTES):  # piecemeal: each side waits for the other's before it goes on
                    target.sendall(stream.read(1))
                for frames in _messages(stream):
                    if frames[0].flags & COMMAND:
                        target.sendall(frames[0].encoded())
                        continue
                    hit = faults.apply(frames)
                    if hit.kind == RESET:
                        target.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                        break
                    if hit.wait_s != 0.0:
                        self._stopped.wait(hit.wait_s)
                    target.sendall(hit.out)
        except OSError:
            pass
        _end(source, target)

    def close(self) -> None:
        self._stopped.set()
        self._listener.close()
        _end(*self._sockets)
        for thread in self._threads:
            thread.join(5)


def _end(*ends: socket.socket) -> None:
    for end in ends:
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


def _messages(stream: BufferedReader) -> Iterator[list[Frame]]:
    """ZMTP frames in messages; commands are messages of one frame."""
    frames: list[Frame] = []
    while head := stream.read(1):
        size = int.from_bytes(stream.read(8 if head[0] & LONG else 1), "big")
        frames.append(Frame(head[0], bytearray(stream.read(size))))
        if not head[0] & MORE:
            yield frames
            frames = []


@dataclass(frozen=True, slots=True)
class Outcome:
    sent: int
    accepted: int
    refused: Counter[str]
    done: Counter[str]


BATCH = 64
PAYLOAD_BYTES = 512
WAIT_MS = 10_000


def body_of(number: int) -> bytes:
    return random.Random(number).randbytes(PAYLOAD_BYTES)


def send_through(faults: Faults, frames: int) -> Outcome:
    """Sends `frames` sealed messages through a relay; raises `AssertionError` when one is accepted that was not sent
    so, or one is accepted twice."""
    fleet, link, pool = b"f" * 32, b"\x01" * LINK_BYTES, BufferPool(1 << 12)
    sealer, opener = Sealer(fleet, link, pool), Opener(fleet, link, pool)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    holder, fetcher = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    holder.linger = fetcher.linger = 0
    relay = Relay(holder.bind_to_random_port("tcp://127.0.0.1"), faults)
    accepted: set[int] = set()
    refused: Counter[str] = Counter()
    try:
        fetcher.setsockopt(zmq.ROUTING_ID, link)
        fetcher.connect(f"tcp://127.0.0.1:{relay.port}")
        fetcher.send(b"")
        assert holder.poll(WAIT_MS), "the relay does not connect"
        holder.recv_multipart()
        for first in range(0, frames, BATCH):
            last = min(first + BATCH, frames)
            for number in range(first, last):
                frame, payload = sealer.seal(number.to_bytes(8, "big"), body_of(number))
                holder.send_multipart([link, frame, bytes(payload or b"")])
            holder.send_multipart([link, sealer.seal(b"mark", None)[0]])
            _take(fetcher, opener, accepted, refused)
        holder.send_multipart([link, sealer.seal(b"mark", None)[0]])
        _take(fetcher, opener, accepted, refused)  # what was held back behind the last batch's mark
    finally:
        relay.close()
        context.destroy(linger=0)
    return Outcome(frames, len(accepted), refused, faults.done)


def _take(fetcher: zmq.Socket[bytes], opener: Opener, accepted: set[int], refused: Counter[str]) -> None:
    """Reads up to the batch's mark, and what was held back behind it with the next."""
    while True:
        assert fetcher.poll(WAIT_MS), "the relay lost the mark"
        parts = fetcher.recv_multipart()
        try:
            message, payload = opener.open(parts[0], parts[1] if len(parts) > 1 else None)
        except Unsealable as error:
            refused[error.reason] += 1
            continue
        if message == b"mark":
            return
        number = int.from_bytes(message, "big")
        assert number not in accepted, f"message {number} was accepted twice"
        assert payload is not None
        assert bytes(payload) == body_of(number), f"message {number} was accepted with other bytes"
        accepted.add(number)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frames", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    outcome = send_through(Faults(CORRUPTING, args.seed), args.frames)
    refused = ", ".join(f"{count} {reason}" for reason, count in sorted(outcome.refused.items()))
    seconds = time.monotonic() - began
    print(f"{outcome.sent} frames corrupted, {outcome.accepted} accepted, refused: {refused} ({seconds:.1f} s)")
    return 1 if outcome.accepted or sum(outcome.refused.values()) != args.frames else 0


if __name__ == "__main__":
    sys.exit(main())
