"""Which `Fetch` a holder refuses, and with which words."""

from __future__ import annotations

from kvtransfer.holding_state import Holding
from kvtransfer.messages import Fetch
from kvtransfer.protocol import (
    MAX_ATTEMPT,
    MAX_DEADLINE_S,
    MAX_INDEX,
    MAX_OFFERS,
    MAX_STREAM_CHARS,
    MAX_TRANSFERS,
    MAX_TRANSFERS_PER_PEER,
    MAX_WANTED,
    NAME_BYTES,
    TRANSFER_ID_BYTES,
)


def refused(state: Holding, link: bytes, fetch: Fetch) -> tuple[str, str] | None:
    """The code and detail of a `Refusal`, or None when the transfer may begin."""
    difference = state.layout.difference(fetch.layout)
    if difference:
        return "layout", difference
    malformed = _malformed(state, fetch)
    if malformed is not None:
        return "malformed", malformed
    mine = sum(1 for other, _ in state.servings if other == link)
    if (link, fetch.transfer_id) not in state.servings and (
        len(state.servings) >= MAX_TRANSFERS or mine >= MAX_TRANSFERS_PER_PEER
    ):
        return "busy", f"{len(state.servings)} transfers"
    return None


def _malformed(state: Holding, fetch: Fetch) -> str | None:
    """Which bound a `Fetch` breaks."""
    if len(fetch.transfer_id) != TRANSFER_ID_BYTES:
        return "transfer_id"
    if not 0 <= fetch.attempt <= MAX_ATTEMPT or not 0 <= fetch.round <= MAX_ATTEMPT:
        return "attempt"
    if len(fetch.stream) > MAX_STREAM_CHARS:
        return "stream"
    if len(fetch.offers) > MAX_OFFERS:
        return "offers"
    if not 0 < fetch.deadline_s <= MAX_DEADLINE_S or fetch.credit < 1 or fetch.notes < 0:
        return "deadline, credit or notes"
    if len(fetch.wanted) > MAX_WANTED or len({w.index for w in fetch.wanted}) != len(fetch.wanted):
        return "wanted"
    for w in fetch.wanted:
        if not (0 <= w.index < MAX_INDEX and len(w.name) == NAME_BYTES):
            return "wanted"
        if not 0 < w.valid_tokens <= state.layout.block_tokens:
            return "valid_tokens"
    if len({w.name for w in fetch.wanted}) != len(fetch.wanted):
        return "wanted"
    return None
