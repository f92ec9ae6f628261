"""The `Fetch` protocol in words, its bounds, and the nouns that both sides share.

    fetching worker                                   holding worker
      Fetch(transfer, stream, wanted, credit) ──────▶   may come before, during or after the stream is open
                                      ◀────── Standing  the answer: what the holder knows of this transfer
                                      ◀────── Blocks    held blocks at once, others as they are produced
      Credit(total granted)           ──────▶           the window slides
      SlotsReturned                   ──────▶           shared-memory slots are free again
                                      ◀────── Note      opaque bytes on the stream, in order
                                      ◀────── Missing   neither held nor produced any more
                                      ◀────── Standing  closed, nothing owed: all is on its way
      Fetch(round + 1, what is lacking) ────▶           refetch of a damaged or lost block, once per block
      Confirm | AbortFetch            ──────▶           the holder lets go of the stream
      Renew(live transfers), every 2 s ─────▶           the lease of the pair; answered by Standing

A transfer is named by a random id, a stream (the holder's production of blocks) by a string that both sides were told,
a block by its content. `Standing` is a snapshot, so losing, repeating or reordering messages costs a round trip and
never a wrong block: the fetcher accepts each index once, only in the name it asked for, from the incarnation it asked,
with a digest that fits. Every state of both sides has a deadline below.

`fetching.step` and `holding.step` are the two state machines: pure functions of state, event and time.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mesh.blockhash import HASH_BYTES

TRANSFER_ID_BYTES = 16
NAME_BYTES = HASH_BYTES
MAX_INDEX = 1 << 17
"""Positions in a block table: 2 M tokens at 16 per block, above any context. Bounds the bit sets below."""
MAX_WANTED = 1 << 16
"""Blocks of one `Fetch`; its frame stays under `MAX_CONTROL_BYTES`."""
MAX_CONTROL_BYTES = 4 << 20
MAX_STREAM_CHARS = 512
MAX_OFFERS = 8
MAX_ATTEMPT = 1 << 31
MAX_NOTES = 64
MAX_NOTE_BYTES = 1 << 16
"""A note is a first token with its log-probabilities, some KiB; kept by the holder until the stream ends."""
MAX_DEADLINE_S = 24 * 3600.0
MAX_TRANSFERS = 1024
"""That one worker serves at once; more are refused as busy. Above `max_num_seqs` of four decode workers."""
MAX_TRANSFERS_PER_PEER = 512
"""So that one peer alone cannot make the holder busy for the others."""

MAX_LISTED = 4 * MAX_TRANSFERS_PER_PEER
"""In one `Renew`: a fetcher may have asked for more than it was granted, and hears so only a moment later."""

WINDOW_BYTES = 32 << 20
"""Sent and not yet accounted for, per transfer: covers 10 GB/s times the 3 ms between two turns of a busy I/O loop."""
READY_BYTES = 256 << 20
"""Blocks a holder keeps in hand (asked of its engine, or produced out of credit), over all transfers."""
MIN_WINDOW_BLOCKS = 4
MAX_WINDOW_BLOCKS = 1024
"""Blocks may be some hundred bytes in tests and MiBs in production; the window is never silly for either."""

ANSWER_S = 5.0
"""From `Fetch` to the first answer. A live holder's I/O thread answers in milliseconds; this covers a stalled host."""
PROGRESS_S = 10.0
"""Without a new block, note or word that the stream is still open. Above `PROVIDE_S`, so the holder speaks first."""
RENEW_S = 2.0
LEASE_TTL_S = 10.0
"""The holder counts from receipt: four lost renewals are tolerated."""
LEASE_GIVE_UP_S = 8.0
"""The fetcher counts from its own sending, so whatever the clocks, it gives up before the holder does."""
PROVIDE_S = 8.0
"""For the holder's engine to answer which blocks it holds: longer than any step."""
STREAM_WAIT_S = 30.0
"""A `Fetch` waits so long for its stream to open: the two workers hear of a request within moments of each other."""
UNCLAIMED_S = 30.0
"""A finished stream that nobody fetched is released: its fetcher died or was never told."""
HOLD_CAP_S = 120.0
"""No finished stream holds blocks longer, whoever renews: held blocks are the prefill worker's scarcest resource."""
OPEN_CAP_S = 3600.0
"""A stream that is never closed is a fault of its worker; it must not stay for ever."""
GONE_S = 60.0
"""How long a released stream's name is remembered, so that a late `Fetch` is answered at once and not made to wait."""
MAX_GONE = 4096
EXPIRY_SLACK_S = 2.0
"""The holder keeps a transfer so much longer than the fetcher's own deadline for it."""
MAX_REPAIRS = 3
"""Times that a transfer is asked for anew as a whole (holder forgot it, a note was lost)."""

WAITING = "waiting"
LIVE = "live"
CLOSED = "closed"
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Wanted:
    """A block that the fetching worker lacks."""

    index: int
    """Position in the request's block table; chosen by the fetcher, echoed by the holder."""
    name: bytes
    valid_tokens: int


def mask_of(indexes: Iterable[int]) -> int:
    """A set of block indexes as the bits of one integer: immutable, and cheap to copy and combine."""
    mask = 0
    for index in indexes:
        mask |= 1 << index
    return mask


def bits(mask: int) -> Iterator[int]:
    """The indexes in `mask`, ascending."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def window_blocks(block_bytes: int) -> int:
    """Blocks that a fetcher lets be under way at once."""
    return max(MIN_WINDOW_BLOCKS, min(MAX_WINDOW_BLOCKS, WINDOW_BYTES // block_bytes))
