"""What an endpoint tells the worker, and what it counts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvtransfer.transports.base import Payload


@dataclass(frozen=True, slots=True)
class NeedBlocks:
    """Holder: which of these are held? Each is answered by `KvEndpoint.provide`, with the bytes or None."""

    stream: str
    names: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class WantedChanged:
    """Holder: the blocks of `stream` to give to `KvEndpoint.produced` as they are completed, from now on."""

    stream: str
    names: frozenset[bytes]


@dataclass(frozen=True, slots=True)
class StreamReleased:
    """Holder: nobody will fetch from this stream any more.

    `reason` is `confirmed`, `aborted`, `lease` (not renewed), `peer_lost`, `expired` (the fetch's deadline),
    `unclaimed` or `cap`.
    """

    stream: str
    reason: str


@dataclass(frozen=True, slots=True)
class BlockArrived:
    """Fetcher: a block that was checked; `payload` is read-only and belongs to the receiver."""

    transfer_id: bytes
    index: int
    payload: Payload


@dataclass(frozen=True, slots=True)
class Noted:
    """Fetcher: the next note of the stream."""

    transfer_id: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class FetchEnded:
    """Fetcher: the last event of a transfer."""

    transfer_id: bytes
    missing: tuple[int, ...]
    """Wanted indexes that did not arrive; may be empty or not whatever the outcome."""
    outcome: str
    """`ok`, `timeout`, `peer_lost`, `refused` or `aborted`."""
    num_bytes: int
    seconds: float
    """From the fetch to its last block."""
    corrupt: int
    """Blocks that came damaged, refetched ones included."""
    detail: str


Event = NeedBlocks | WantedChanged | StreamReleased | BlockArrived | Noted | FetchEnded


@dataclass(frozen=True, slots=True)
class TransferStats:
    """An endpoint's counters since its start, and what is open now."""

    fetching: int
    """Transfers that this worker runs as fetcher."""
    serving: int
    """Transfers of others that this worker serves."""
    held_streams: int
    links: int
    """Connections to holders."""
    slots: int
    """Parcels posted to shared memory or the local exchange and not returned."""
    bytes_in: Mapping[str, int]
    """By transport."""
    bytes_out: Mapping[str, int]
    blocks_in: int
    blocks_out: int
    corrupt: int
    dropped: Mapping[str, int]
    """Messages and blocks that were not accepted, by reason."""
    ended: Mapping[str, int]
    """Own fetches, by outcome."""

    @property
    def open_transfers(self) -> int:
        return self.fetching + self.serving


@dataclass(slots=True, eq=False)
class Counters:
    """The live side of `TransferStats`."""

    bytes_in: dict[str, int] = field(default_factory=dict)
    bytes_out: dict[str, int] = field(default_factory=dict)
    blocks_in: int = 0
    blocks_out: int = 0
    corrupt: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    ended: dict[str, int] = field(default_factory=dict)

    def drop(self, reason: str) -> None:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1

    def end(self, outcome: str) -> None:
        self.ended[outcome] = self.ended.get(outcome, 0) + 1

    def received(self, transport: str, size: int) -> None:
        self.bytes_in[transport] = self.bytes_in.get(transport, 0) + size

    def sent(self, transport: str, size: int, blocks: int) -> None:
        self.bytes_out[transport] = self.bytes_out.get(transport, 0) + size
        self.blocks_out += blocks
