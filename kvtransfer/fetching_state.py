"""The nouns of the fetching side: its state, what happens to it, and what it asks its shell to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvtransfer.messages import Offer
from kvtransfer.protocol import ANSWER_S, MAX_INDEX, PROGRESS_S, Wanted
from mesh.layout import KvLayout

OPENING = "opening"
RECEIVING = "receiving"
MAX_ACCOUNTED = 16 * MAX_INDEX
"""Ceiling for what a holder claims to have sent, so that no claim makes a number that does not fit a message."""

Payload = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Transfer:
    """One fetch that has not ended. Sets of block indexes are bits of an integer."""

    transfer_id: bytes
    attempt: int
    stream: str
    wanted: Mapping[int, Wanted]
    """By index; never changed."""
    started: float
    deadline: float
    progress_at: float
    last_block_at: float
    pending: int
    """Neither accepted nor given up."""
    granted: int
    asked_at: float
    """When the latest `Fetch` left."""
    phase: str = OPENING
    retried: int = 0
    lost: int = 0
    round: int = 0
    repairs: int = 0
    accounted: int = 0
    """Blocks the holder has sent, whatever became of them; the window slides over this."""
    notes: int = 0
    notes_due: int = 0
    closed: bool = False
    num_bytes: int = 0
    corrupt: int = 0

    @property
    def complete(self) -> bool:
        return self.pending == 0 and self.closed and self.notes >= self.notes_due

    @property
    def next_deadline(self) -> float:
        wait = self.progress_at + (ANSWER_S if self.phase == OPENING else PROGRESS_S)
        return min(self.deadline, wait)


@dataclass(frozen=True, slots=True)
class Fetching:
    """Everything this worker fetches from one incarnation of one holder."""

    me: int
    holder: int
    layout: KvLayout
    """The holder's: blocks are asked for and checked as it has them."""
    offers: tuple[Offer, ...]
    plain: tuple[Offer, ...]
    """Offers of a refetch: only what needs nothing shared, since a broken segment may be why."""
    window: int
    transfers: Mapping[bytes, Transfer] = field(default_factory=dict)
    renew_at: float = 0.0
    seq: int = 0
    sent_at: tuple[tuple[int, float], ...] = ()
    """When the last renewals left."""
    leased_from: float = 0.0
    """When the latest renewal that was answered left."""


@dataclass(frozen=True, slots=True)
class Start:
    transfer_id: bytes
    attempt: int
    stream: str
    wanted: tuple[Wanted, ...]
    deadline_s: float


@dataclass(frozen=True, slots=True)
class Abort:
    transfer_id: bytes


@dataclass(frozen=True, slots=True)
class Received:
    """A control message and the incarnations in its envelope."""

    sender: int
    receiver: int
    message: Any


@dataclass(frozen=True, slots=True)
class Arrival:
    """A block as its header names it; `intact`: the digest fits."""

    index: int
    name: bytes
    valid_tokens: int
    payload: Payload
    intact: bool


@dataclass(frozen=True, slots=True)
class BlocksIn:
    sender: int
    receiver: int
    transfer_id: bytes
    attempt: int
    blocks: tuple[Arrival, ...]


@dataclass(frozen=True, slots=True)
class PeerLost:
    """The connection to the holder broke, or never was."""

    detail: str = "the connection to the holder broke"


@dataclass(frozen=True, slots=True)
class Tick:
    pass


@dataclass(frozen=True, slots=True)
class Send:
    message: Any


@dataclass(frozen=True, slots=True)
class Deliver:
    transfer_id: bytes
    index: int
    payload: Payload


@dataclass(frozen=True, slots=True)
class DeliverNote:
    transfer_id: bytes
    payload: bytes


@dataclass(frozen=True, slots=True)
class Ended:
    transfer_id: bytes
    missing: tuple[int, ...]
    outcome: str
    num_bytes: int
    seconds: float
    """From the fetch to its last block; to its end when no block came."""
    corrupt: int
    detail: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A message or block that was not accepted, by reason."""

    reason: str


Event = Start | Abort | Received | BlocksIn | PeerLost | Tick
Effect = Send | Deliver | DeliverNote | Ended | Dropped
