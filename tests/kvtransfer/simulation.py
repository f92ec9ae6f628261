"""One fetcher and one holder, their two state machines in virtual time, and a network that does everything wrong.

Frames are the real ones: a flipped bit is a flipped bit in bytes, and only the digests can find it.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from kvtransfer import fetching, holding
from kvtransfer import fetching_state as fs
from kvtransfer import holding_state as hs
from kvtransfer.integrity import digest, is_intact, seal, unseal
from kvtransfer.messages import BlockHeader, Blocks, Offer, Place
from kvtransfer.protocol import GONE_S, HOLD_CAP_S
from mesh.errors import BadFrame
from tests.kvtransfer.pairs import LAYOUT, content, name, transfer_id, wanted

HOLDER, FETCHER = 7, 9
LINK = b"link"
TICK_S = 0.25
DEADLINE_S = 25.0


@dataclass(frozen=True, slots=True)
class Faults:
    """Probabilities per frame, and whether processes die."""

    loss: float = 0.0
    duplicate: float = 0.0
    corrupt: float = 0.0
    jitter_s: float = 0.0
    """Above 0, frames overtake each other."""
    deaths: bool = False
    mute_engine: float = 0.0
    """Probability that an engine's answer never comes."""


@dataclass(slots=True, eq=False)
class Outcome:
    """What the fetcher was told of its transfers."""

    wanted: dict[bytes, frozenset[int]] = field(default_factory=dict)
    delivered: dict[bytes, dict[int, bytes]] = field(default_factory=dict)
    notes: dict[bytes, list[bytes]] = field(default_factory=dict)
    ended: dict[bytes, fs.Ended] = field(default_factory=dict)
    released: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)


class Simulation:
    """`run` plays one seed to its end."""

    def __init__(self, seed: int, faults: Faults, *, blocks: int = 24, transfers: int = 2) -> None:
        self.chance = random.Random(seed)
        self.faults = faults
        self.now = 0.0
        self.outcome = Outcome()
        plain = (Offer("zmq", ""),)
        self.fetcher = fs.Fetching(FETCHER, HOLDER, LAYOUT, plain, plain, window=5)
        self.holder = hs.Holding(HOLDER, LAYOUT)
        self.alive = {HOLDER, FETCHER}
        self.held: set[bytes] = set()
        self._queue: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._last_arrival = 0.0
        for number in range(transfers):
            self._plan(number, blocks)
        if faults.deaths:
            victim = self.chance.choice([HOLDER, FETCHER])
            self._at(self.chance.uniform(0, 8), lambda: self._kill(victim))

    def run(self) -> Outcome:
        end = DEADLINE_S + HOLD_CAP_S + GONE_S + 40
        while self.now < end:
            while self._queue and self._queue[0][0] <= self.now:
                heapq.heappop(self._queue)[2]()
            self._fetch_step(fs.Tick())
            self._hold_step(hs.Tick())
            self.now += TICK_S if self._busy() else 5.0
        return self.outcome

    def _busy(self) -> bool:
        return bool(self._queue or self.fetcher.transfers)

    def _at(self, delay: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._queue, (self.now + delay, self._count, action))

    def _plan(self, number: int, blocks: int) -> None:
        """A request: its fetch, its prefill, perhaps an abort, each when it pleases."""
        stream, transfer = f"r{number}", transfer_id(number)
        base = number * 1000
        names = range(base, base + blocks)
        self.held |= {name(n) for n in names[: self.chance.randrange(blocks // 2)]}
        asked = wanted(names)
        self.outcome.wanted[transfer] = frozenset(names)
        start = fs.Start(transfer, 1, stream, asked, DEADLINE_S)
        self._at(self.chance.uniform(0, 3), lambda: self._fetch_step(start))
        opened = self.chance.uniform(0, 3)
        self._at(opened, lambda: self._hold_step(hs.OpenStream(stream)))
        for n in names:
            opened += self.chance.uniform(0, 0.3)
            self._at(opened, lambda n=n: self._complete(stream, n))  # type: ignore[misc]
        self._at(opened, lambda: self._hold_step(hs.GiveNote(stream, b"note of " + stream.encode())))
        self._at(opened, lambda: self._hold_step(hs.CloseStream(stream)))
        if self.chance.random() < 0.15:
            self._at(self.chance.uniform(0, 10), lambda: self._fetch_step(fs.Abort(transfer)))

    def _complete(self, stream: str, number: int) -> None:
        """The holder's engine finishes a block."""
        block = name(number)
        self.held.add(block)
        if block in self.holder.wants(stream):
            self._hold_step(hs.Produced(stream, ((block, content(block)),)))

    def _kill(self, who: int) -> None:
        self.alive.discard(who)
        if self.chance.random() < 0.5:  # the other side's socket monitor sees it; otherwise only silence
            if who == HOLDER:
                self._fetch_step(fs.PeerLost())
            else:
                self._hold_step(hs.LinkLost(LINK))

    def _fetch_step(self, event: fs.Event) -> None:
        if FETCHER not in self.alive:
            return
        before = self.fetcher
        self.fetcher, effects = fetching.step(before, event, self.now)
        for effect in effects:
            self._fetch_effect(effect)

    def _fetch_effect(self, effect: fs.Effect) -> None:
        if isinstance(effect, fs.Send):
            frame = seal(effect.message, FETCHER, HOLDER)
            self._carry(frame, b"", lambda f, _: self._to_holder(f))
        elif isinstance(effect, fs.Deliver):
            blocks = self.outcome.delivered.setdefault(effect.transfer_id, {})
            assert effect.index not in blocks, "a block is delivered once"
            assert effect.transfer_id not in self.outcome.ended, "nothing comes after the end"
            blocks[effect.index] = bytes(effect.payload)
        elif isinstance(effect, fs.DeliverNote):
            self.outcome.notes.setdefault(effect.transfer_id, []).append(effect.payload)
        elif isinstance(effect, fs.Ended):
            assert effect.transfer_id not in self.outcome.ended, "a transfer ends once"
            self.outcome.ended[effect.transfer_id] = effect
        else:
            self.outcome.dropped.append(effect.reason)

    def _hold_step(self, event: hs.Event) -> None:
        if HOLDER not in self.alive:
            return
        self.holder, effects = holding.step(self.holder, event, self.now)
        for effect in effects:
            self._hold_effect(effect)

    def _hold_effect(self, effect: hs.Effect) -> None:
        if isinstance(effect, hs.Send):
            self._carry(seal(effect.message, HOLDER, FETCHER), b"", self._to_fetcher)
        elif isinstance(effect, hs.SendBlocks):
            self._send_blocks(effect)
        elif isinstance(effect, hs.Need):
            for block in effect.names:
                if self.chance.random() >= self.faults.mute_engine:
                    self._at(self.chance.uniform(0, 0.5), lambda b=block: self._provide(b))  # type: ignore[misc]
        elif isinstance(effect, hs.Released):
            assert effect.stream not in self.outcome.released, "a stream is released once"
            self.outcome.released.append(effect.stream)
        elif isinstance(effect, hs.Dropped):
            self.outcome.dropped.append(effect.reason)

    def _provide(self, block: bytes) -> None:
        self._hold_step(hs.Provided(((block, content(block) if block in self.held else None),)))

    def _send_blocks(self, effect: hs.SendBlocks) -> None:
        head = (effect.transfer_id, effect.attempt, HOLDER, effect.fetcher)
        headers = tuple(
            BlockHeader(w.index, w.name, w.valid_tokens, len(p), digest(*head, w.index, w.name, w.valid_tokens, p))
            for w, p in effect.blocks
        )
        message = Blocks(effect.transfer_id, effect.attempt, Place("zmq", "", 0, 0), headers)
        payload = b"".join(p for _, p in effect.blocks)
        self._carry(seal(message, HOLDER, FETCHER), payload, self._to_fetcher)

    def _carry(self, frame: bytes, payload: bytes, arrive: Callable[[bytes, bytes], None]) -> None:
        """The network."""
        for _ in range(2 if self.chance.random() < self.faults.duplicate else 1):
            if self.chance.random() < self.faults.loss:
                continue
            f, p = frame, payload
            if self.chance.random() < self.faults.corrupt:
                if payload and self.chance.random() < 0.7:
                    p = self._flip(payload)
                else:
                    f = self._flip(frame)
            delay = 0.001 + self.chance.random() * self.faults.jitter_s
            if not self.faults.jitter_s:  # an ordered connection
                self._last_arrival = max(self._last_arrival, self.now + delay)
                delay = self._last_arrival - self.now
            self._at(delay, lambda f=f, p=p: arrive(f, p))  # type: ignore[misc]

    def _flip(self, data: bytes) -> bytes:
        damaged = bytearray(data)
        damaged[self.chance.randrange(len(damaged))] ^= 1 << self.chance.randrange(8)
        return bytes(damaged)

    def _to_holder(self, frame: bytes) -> None:
        try:
            envelope = unseal(frame)
        except BadFrame:
            return
        self._hold_step(hs.Received(LINK, envelope.sender, envelope.receiver, envelope.message))

    def _to_fetcher(self, frame: bytes, payload: bytes) -> None:
        try:
            envelope = unseal(frame)
        except BadFrame:
            return
        message = envelope.message
        if not isinstance(message, Blocks):
            self._fetch_step(fs.Received(envelope.sender, envelope.receiver, message))
            return
        arrivals = []
        for i, h in enumerate(message.blocks):
            part = payload[i * LAYOUT.block_bytes : (i + 1) * LAYOUT.block_bytes]
            intact = is_intact(h, message.transfer_id, message.attempt, envelope.sender, envelope.receiver, part)
            arrivals.append(fs.Arrival(h.index, h.name, h.valid_tokens, part, intact))
        self._fetch_step(
            fs.BlocksIn(envelope.sender, envelope.receiver, message.transfer_id, message.attempt, tuple(arrivals))
        )
