"""What two KV endpoints say to each other, tags 32 to 63. Both incarnations are in every envelope.

All control messages are one frame. `Blocks` may be followed by a payload frame: the bytes of its blocks, one after
another, when they do not travel by shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvtransfer.protocol import Wanted
from mesh.layout import KvLayout
from mesh.wire import message


@dataclass(frozen=True, slots=True)
class Offer:
    """A transport by which the fetcher can receive."""

    transport: str
    scope: str
    """Both sides can use it when they are in the same scope: the host for shared memory, the process for local."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where the bytes of a `Blocks` message are; empty fields mean: in the frame that follows."""

    transport: str
    segment: str
    slot: int
    seq: int


@dataclass(frozen=True, slots=True)
class BlockHeader:
    index: int
    name: bytes
    valid_tokens: int
    length: int
    digest: bytes


@message(32)
@dataclass(frozen=True, slots=True)
class Fetch:
    """Asks for blocks. Repeating it is harmless; a higher `round` asks again for what `wanted` then lists."""

    transfer_id: bytes
    attempt: int
    round: int
    stream: str
    """Empty: no stream, only blocks that are held now."""
    layout: KvLayout
    """In which the fetcher expects the blocks, since that is the holder's; it converts them itself."""
    offers: tuple[Offer, ...]
    """In order of preference."""
    wanted: tuple[Wanted, ...]
    credit: int
    """Blocks that may be sent in all over the transfer's life, as in `Credit`."""
    notes: int
    """Notes of the stream already received."""
    deadline_s: float
    """Relative, from receipt."""


@message(33)
@dataclass(frozen=True, slots=True)
class Blocks:
    transfer_id: bytes
    attempt: int
    place: Place
    blocks: tuple[BlockHeader, ...]


@message(34)
@dataclass(frozen=True, slots=True)
class Missing:
    """The holder has not got these and will not."""

    transfer_id: bytes
    attempt: int
    indexes: tuple[int, ...]


@message(35)
@dataclass(frozen=True, slots=True)
class Credit:
    transfer_id: bytes
    attempt: int
    total: int
    """Blocks that may be sent in all; only ever grows, so repeats and reordering do no harm."""


@message(36)
@dataclass(frozen=True, slots=True)
class Confirm:
    """The fetcher has what it can get; the holder may let go."""

    transfer_id: bytes
    attempt: int


@message(37)
@dataclass(frozen=True, slots=True)
class AbortFetch:
    transfer_id: bytes
    attempt: int


@message(38)
@dataclass(frozen=True, slots=True)
class Renew:
    """Renews the lease on everything between two workers and lists what the fetcher still runs."""

    seq: int
    transfers: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Stand:
    """What the holder knows of one transfer."""

    transfer_id: bytes
    attempt: int
    round: int
    phase: str
    """`waiting` for its stream, `live`, `closed` (nothing more is produced) or `unknown`."""
    sent: int
    granted: int
    """The credit it knows of; less than was given: a `Credit` was lost."""
    owed: int
    notes: int
    """Notes given on the stream so far."""


@message(39)
@dataclass(frozen=True, slots=True)
class Standing:
    """Answers `Fetch` and `Renew`; also sent unasked when a closed stream owes nothing more."""

    seq: int
    """Of the `Renew` that is answered; 0 otherwise."""
    transfers: tuple[Stand, ...]


@message(40)
@dataclass(frozen=True, slots=True)
class Refusal:
    transfer_id: bytes
    attempt: int
    code: str
    """`stale_incarnation`, `layout`, `busy`, `malformed`."""
    detail: str
    """For `layout`: the first field that differs, with both values."""


@message(41)
@dataclass(frozen=True, slots=True)
class Note:
    transfer_id: bytes
    attempt: int
    seq: int
    payload: bytes


@message(42)
@dataclass(frozen=True, slots=True)
class SlotsReturned:
    """The fetcher has copied these `(slot, seq)` out of the holder's segment."""

    transport: str
    slots: tuple[tuple[int, int], ...]
