"""The nouns of the holding side: its state, what happens to it, and what it asks its shell to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvtransfer.messages import Offer, Stand
from kvtransfer.protocol import (
    CLOSED,
    HOLD_CAP_S,
    MAX_WINDOW_BLOCKS,
    MIN_WINDOW_BLOCKS,
    OPEN_CAP_S,
    PROVIDE_S,
    READY_BYTES,
    STREAM_WAIT_S,
    UNCLAIMED_S,
    WAITING,
    Wanted,
)
from mesh.layout import KvLayout
from mesh.wire import KV

Payload = bytes | memoryview
Key = tuple[bytes, bytes]
"""Link and transfer id: a peer can only ever touch its own transfers."""


@dataclass(frozen=True, slots=True)
class Stream:
    """The production of blocks and notes under one name, from `open_stream` until it is released."""

    name: str
    opened_at: float
    closed_at: float | None = None
    notes: tuple[bytes, ...] = ()
    claimed: bool = False
    """Somebody fetched from it."""
    left: str = ""
    """Why the last of its fetchers left."""

    @property
    def next_deadline(self) -> float:
        if self.closed_at is None:
            return self.opened_at + OPEN_CAP_S
        return self.closed_at + (HOLD_CAP_S if self.claimed else UNCLAIMED_S)


@dataclass(frozen=True, slots=True)
class Serving:
    """One peer's transfer as the holder serves it. Sets of block indexes are bits of an integer."""

    link: bytes
    fetcher: int
    """The fetching worker's incarnation."""
    transfer_id: bytes
    attempt: int
    stream: str
    phase: str
    by_index: Mapping[int, Wanted]
    """These two are never changed in place."""
    index_of: Mapping[bytes, int]
    owed: int
    """Wanted, not sent yet."""
    granted: int
    offers: tuple[Offer, ...]
    since: float
    fetched_at: float
    """When the latest `Fetch` came."""
    expires: float
    round: int = 0
    sent: int = 0
    asked: int = 0
    """Of the engine, not answered yet."""
    asked_at: float = 0.0
    absent: int = 0
    """The engine says it does not hold these; asked again when the stream closes."""
    ready: tuple[tuple[int, Payload], ...] = ()
    """In hand, waiting for credit."""
    ready_mask: int = 0
    notes: tuple[bytes, ...] = ()
    announced: int = -1
    """The round for which the peer was told that nothing is owed any more."""

    @property
    def key(self) -> Key:
        return (self.link, self.transfer_id)

    @property
    def stand(self) -> Stand:
        return Stand(
            self.transfer_id,
            self.attempt,
            self.round,
            self.phase,
            self.sent,
            self.granted,
            self.owed.bit_count(),
            len(self.notes),
        )

    @property
    def next_deadline(self) -> float:
        nearest = min(self.expires, self.asked_at + PROVIDE_S) if self.asked else self.expires
        return min(nearest, self.since + STREAM_WAIT_S) if self.phase == WAITING else nearest


@dataclass(frozen=True, slots=True)
class Lease:
    """One connection's word that its fetcher lives."""

    fetcher: int
    heard_at: float
    version: int = KV.highest
    """Of the protocol, in which it is answered."""


@dataclass(frozen=True, slots=True)
class Holding:
    """Everything this worker gives to others."""

    me: int
    layout: KvLayout
    streams: Mapping[str, Stream] = field(default_factory=dict)
    servings: Mapping[Key, Serving] = field(default_factory=dict)
    by_stream: Mapping[str, tuple[Key, ...]] = field(default_factory=dict)
    leases: Mapping[bytes, Lease] = field(default_factory=dict)
    """By link; exactly the links that have a transfer."""
    gone: Mapping[str, float] = field(default_factory=dict)
    """Streams that were released lately, and when."""

    @property
    def depth(self) -> int:
        """Blocks that one transfer may keep in hand: an equal share of the memory for it."""
        share = READY_BYTES // self.layout.block_bytes // max(1, len(self.servings))
        return max(MIN_WINDOW_BLOCKS, min(MAX_WINDOW_BLOCKS, share))

    def wants(self, stream: str) -> frozenset[bytes]:
        """Names that `stream`'s fetchers still wait for and that are not in hand; none of a stream that ended."""
        names: set[bytes] = set()
        for key in self.by_stream.get(stream, ()):
            serving = self.servings[key]
            if serving.phase == CLOSED:
                continue
            due = serving.owed & ~serving.ready_mask
            names.update(name for name, index in serving.index_of.items() if due >> index & 1)
        return frozenset(names)

    def phase_of(self, stream: str) -> str:
        """The phase of a transfer that asks for `stream` now."""
        known = self.streams.get(stream)
        if known is not None:
            return CLOSED if known.closed_at is not None else "live"
        return CLOSED if not stream or stream in self.gone else WAITING


@dataclass(frozen=True, slots=True)
class OpenStream:
    stream: str


@dataclass(frozen=True, slots=True)
class Produced:
    stream: str
    blocks: tuple[tuple[bytes, Payload], ...]
    """Name and bytes of each."""


@dataclass(frozen=True, slots=True)
class Provided:
    """The engine's answers to `Need`; None: not held."""

    blocks: tuple[tuple[bytes, Payload | None], ...]


@dataclass(frozen=True, slots=True)
class GiveNote:
    stream: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class CloseStream:
    stream: str


@dataclass(frozen=True, slots=True)
class ReleaseStream:
    stream: str


@dataclass(frozen=True, slots=True)
class Received:
    """A control message, the connection it came on, and what its envelope says."""

    link: bytes
    sender: int
    receiver: int
    message: Any
    version: int = KV.highest


@dataclass(frozen=True, slots=True)
class LinkLost:
    link: bytes


@dataclass(frozen=True, slots=True)
class Tick:
    pass


@dataclass(frozen=True, slots=True)
class Send:
    link: bytes
    message: Any


@dataclass(frozen=True, slots=True)
class SendBlocks:
    link: bytes
    fetcher: int
    transfer_id: bytes
    attempt: int
    offers: tuple[Offer, ...]
    blocks: tuple[tuple[Wanted, Payload], ...]


@dataclass(frozen=True, slots=True)
class Need:
    """Ask the engine which of these it holds."""

    stream: str
    names: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class WantsChanged:
    stream: str


@dataclass(frozen=True, slots=True)
class Released:
    """Nobody will fetch from this stream any more."""

    stream: str
    reason: str


@dataclass(frozen=True, slots=True)
class Finished:
    """A transfer is over: whatever was set aside for it is free."""

    link: bytes
    transfer_id: bytes


@dataclass(frozen=True, slots=True)
class Dropped:
    """A message that was not accepted, by reason."""

    reason: str


Event = OpenStream | Produced | Provided | GiveNote | CloseStream | ReleaseStream | Received | LinkLost | Tick
Effect = Send | SendBlocks | Need | WantsChanged | Released | Finished | Dropped
