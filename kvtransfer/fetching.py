"""The fetching side of one pair of workers: every transfer from one holder, as a pure state machine.

    Start ──▶ OPENING ──any answer──▶ RECEIVING ──all blocks in or missing, stream closed, notes in──▶ ended: ok
                 │ ANSWER_S               │ PROGRESS_S, lease, holder dead, refused, Abort, deadline
                 └────────────────────────┴──▶ ended: timeout | peer_lost | refused | aborted

`step` changes nothing in place: a state is a value, so a simulator can keep, compare and fork it.
"""

from __future__ import annotations

import math
from dataclasses import replace

from kvtransfer.fetching_state import (
    MAX_ACCOUNTED,
    OPENING,
    RECEIVING,
    Abort,
    Arrival,
    BlocksIn,
    Deliver,
    DeliverNote,
    Dropped,
    Effect,
    Ended,
    Event,
    Fetching,
    Received,
    Send,
    Start,
    Tick,
    Transfer,
)
from kvtransfer.messages import (
    AbortFetch,
    Confirm,
    Credit,
    Fetch,
    Missing,
    Note,
    Refusal,
    Renew,
    Stand,
    Standing,
)
from kvtransfer.protocol import (
    CLOSED,
    LEASE_GIVE_UP_S,
    LIVE,
    MAX_DEADLINE_S,
    MAX_INDEX,
    MAX_NOTES,
    MAX_REPAIRS,
    RENEW_S,
    UNKNOWN,
    WAITING,
    bits,
    mask_of,
)

Result = tuple[Fetching, list[Effect]]


def step(state: Fetching, event: Event, now: float) -> Result:
    """The next state and what must be done; total over whatever a peer sends. `ValueError`: a caller's mistake."""
    if isinstance(event, BlocksIn):
        return _blocks_in(state, event, now)
    if isinstance(event, Received):
        return _received(state, event, now)
    if isinstance(event, Tick):
        return _tick(state, now)
    if isinstance(event, Start):
        return _start(state, event, now)
    if isinstance(event, Abort):
        transfer = state.transfers.get(event.transfer_id)
        return (state, []) if transfer is None else _end(state, transfer, "aborted", now)
    return _end_all(state, "peer_lost", event.detail, now)


def next_deadline(state: Fetching) -> float:
    """When `Tick` has something to do at the latest; infinity: never."""
    if not state.transfers:
        return math.inf
    nearest = min(t.next_deadline for t in state.transfers.values())
    return min(nearest, state.renew_at, state.leased_from + LEASE_GIVE_UP_S)


def _start(state: Fetching, event: Start, now: float) -> Result:
    if event.transfer_id in state.transfers:
        raise ValueError("a transfer id is used once")
    wanted = {w.index: w for w in event.wanted}
    if len(wanted) != len(event.wanted) or any(not 0 <= i < MAX_INDEX for i in wanted):
        raise ValueError("each wanted index is listed once and within MAX_INDEX")
    transfer = Transfer(
        event.transfer_id,
        event.attempt,
        event.stream,
        wanted,
        started=now,
        deadline=now + min(event.deadline_s, MAX_DEADLINE_S),
        progress_at=now,
        last_block_at=now,
        pending=mask_of(wanted),
        granted=state.window,
        asked_at=now,
    )
    if not state.transfers:  # the fetch itself is what the holder grants the pair's lease on
        state = replace(state, leased_from=now, renew_at=now + RENEW_S, sent_at=())
    return _put(state, transfer), [_ask(state, transfer, transfer.pending, now)]


def _ask(state: Fetching, transfer: Transfer, mask: int, now: float) -> Send:
    return Send(
        Fetch(
            transfer.transfer_id,
            transfer.attempt,
            transfer.round,
            transfer.stream,
            state.layout,
            state.plain if transfer.round else state.offers,
            tuple(transfer.wanted[i] for i in bits(mask)),
            transfer.granted,
            transfer.notes,
            max(0.001, transfer.deadline - now),
        )
    )


def _put(state: Fetching, transfer: Transfer) -> Fetching:
    return replace(state, transfers={**state.transfers, transfer.transfer_id: transfer})


def _end(state: Fetching, transfer: Transfer, outcome: str, now: float, detail: str = "") -> Result:
    """Every way out of a transfer goes through here."""
    head = (transfer.transfer_id, transfer.attempt)
    rest = {k: t for k, t in state.transfers.items() if k != transfer.transfer_id}
    ended = Ended(
        transfer.transfer_id,
        tuple(bits(transfer.pending | transfer.lost)),
        outcome,
        transfer.num_bytes,
        (transfer.last_block_at if transfer.num_bytes else now) - transfer.started,
        transfer.corrupt,
        detail,
    )
    return replace(state, transfers=rest), [
        Send(Confirm(*head) if outcome == "ok" else AbortFetch(*head)),
        ended,
    ]


def _end_all(state: Fetching, outcome: str, detail: str, now: float) -> Result:
    effects: list[Effect] = []
    for transfer in state.transfers.values():
        state, more = _end(state, transfer, outcome, now, detail)
        effects += more
    return state, effects


def _received(state: Fetching, event: Received, now: float) -> Result:
    message = event.message
    renewed = isinstance(message, Refusal) and message.code == "stale_incarnation"
    if event.receiver != state.me or (event.sender != state.holder and not renewed):
        return state, [Dropped("incarnation")]
    if isinstance(message, Standing):
        return _standing(state, message, now)
    if not isinstance(message, (Missing, Note, Refusal)):
        return state, [Dropped("unexpected")]
    transfer = state.transfers.get(message.transfer_id)
    if transfer is None:
        return state, [Dropped("transfer")]
    if transfer.attempt != message.attempt:
        return state, [Dropped("attempt")]
    if isinstance(message, Refusal):
        return _end(state, transfer, "refused", now, f"{message.code}: {message.detail}")
    if isinstance(message, Note):
        return _note(state, transfer, message, now)
    absent = mask_of(i for i in message.indexes if 0 <= i < MAX_INDEX) & transfer.pending
    heard = replace(transfer, phase=RECEIVING, pending=transfer.pending & ~absent, lost=transfer.lost | absent)
    return _settle(state, heard, [], now)


def _note(state: Fetching, transfer: Transfer, note: Note, now: float) -> Result:
    if note.seq != transfer.notes:  # repeated, or one before it was lost: `Standing` will tell
        return state, [Dropped("note")]
    heard = replace(transfer, phase=RECEIVING, notes=transfer.notes + 1, progress_at=now)
    return _settle(state, heard, [DeliverNote(transfer.transfer_id, note.payload)], now)


def _blocks_in(state: Fetching, event: BlocksIn, now: float) -> Result:
    if event.sender != state.holder or event.receiver != state.me:
        return state, [Dropped("incarnation") for _ in event.blocks]
    transfer = state.transfers.get(event.transfer_id)
    if transfer is None or transfer.attempt != event.attempt:
        return state, [Dropped("transfer" if transfer is None else "attempt") for _ in event.blocks]
    effects: list[Effect] = []
    damaged = corrupt = num_bytes = 0
    pending = transfer.pending
    for block in event.blocks:
        fault = _fault(transfer, block)
        bit = 1 << block.index if 0 <= block.index < MAX_INDEX else 0
        if fault is not None:
            corrupt += 1
            damaged |= bit
            effects.append(Dropped(fault))
        elif not pending & bit:
            effects.append(Dropped("duplicate"))
        else:
            pending &= ~bit
            num_bytes += len(block.payload)
            effects.append(Deliver(transfer.transfer_id, block.index, block.payload))
    transfer = replace(
        transfer,
        phase=RECEIVING,
        pending=pending,
        accounted=min(transfer.accounted + len(event.blocks), MAX_ACCOUNTED),
        num_bytes=transfer.num_bytes + num_bytes,
        corrupt=transfer.corrupt + corrupt,
        progress_at=now if num_bytes else transfer.progress_at,
        last_block_at=now if num_bytes else transfer.last_block_at,
    )
    if damaged & pending:
        transfer = _refetch(state, transfer, damaged & pending, effects, now)
    return _settle(state, transfer, effects, now)


def _fault(transfer: Transfer, block: Arrival) -> str | None:
    """Why a block is not the one that was asked for."""
    if not block.intact:
        return "digest"
    wanted = transfer.wanted.get(block.index)
    if wanted is None:
        return "index"
    if wanted.name != block.name or wanted.valid_tokens != block.valid_tokens:
        return "identity"
    return None


def _refetch(state: Fetching, transfer: Transfer, mask: int, effects: list[Effect], now: float) -> Transfer:
    """Asks once more for the blocks in `mask`; those that were asked for twice already are given up."""
    again, given_up = mask & ~transfer.retried, mask & transfer.retried
    transfer = replace(
        transfer,
        pending=transfer.pending & ~given_up,
        lost=transfer.lost | given_up,
        retried=transfer.retried | again,
        round=transfer.round + (1 if again else 0),
        asked_at=now if again else transfer.asked_at,
    )
    if again:
        effects.append(_ask(state, transfer, again, now))
    return transfer


def _repair(state: Fetching, transfer: Transfer, now: float) -> Result:
    """The holder and we disagree on the whole: ask for everything that is pending anew."""
    if transfer.repairs == MAX_REPAIRS:
        return _end(state, transfer, "timeout", now, "the holder keeps forgetting the transfer")
    transfer = replace(
        transfer,
        repairs=transfer.repairs + 1,
        round=transfer.round + 1,
        accounted=0,
        granted=state.window,
        asked_at=now,
    )
    return _put(state, transfer), [_ask(state, transfer, transfer.pending, now)]


def _standing(state: Fetching, message: Standing, now: float) -> Result:
    left = {seq: sent for seq, sent in state.sent_at}.get(message.seq, -math.inf)
    state = replace(state, leased_from=max(state.leased_from, left))
    effects: list[Effect] = []
    for stand in message.transfers:
        transfer = state.transfers.get(stand.transfer_id)
        if transfer is None or (stand.phase != UNKNOWN and stand.attempt != transfer.attempt):
            effects.append(Dropped("transfer" if transfer is None else "attempt"))
            continue
        state, more = _stand(state, transfer, stand, left, now)
        effects += more
    return state, effects


def _stand(state: Fetching, transfer: Transfer, stand: Stand, left: float, now: float) -> Result:
    """`left`: when the renewal that this answers left; a `Fetch` that left earlier must have arrived by then."""
    if stand.phase == UNKNOWN:
        return _repair(state, transfer, now) if left >= transfer.asked_at else (state, [])
    transfer = _heard(transfer, stand, now)
    effects: list[Effect] = []
    if stand.round < transfer.round and left >= transfer.asked_at:  # the refetch was lost
        transfer = replace(transfer, asked_at=now)
        effects.append(_ask(state, transfer, transfer.pending & transfer.retried, now))
    elif stand.phase == CLOSED and stand.owed == 0 and stand.round == transfer.round:
        # Everything was sent before this message, on an ordered connection: what is not here is lost.
        if transfer.pending:
            transfer = _refetch(state, transfer, transfer.pending, effects, now)
        elif transfer.notes < transfer.notes_due:
            return _repair(state, transfer, now)
    if stand.granted < transfer.granted:
        effects.append(Send(Credit(transfer.transfer_id, transfer.attempt, transfer.granted)))
    return _settle(state, transfer, effects, now)


def _heard(transfer: Transfer, stand: Stand, now: float) -> Transfer:
    closed = stand.phase == CLOSED
    alive = stand.phase in (WAITING, LIVE) or (closed and not transfer.closed) or transfer.phase == OPENING
    return replace(
        transfer,
        phase=RECEIVING,
        closed=closed or transfer.closed,
        accounted=min(max(transfer.accounted, stand.sent), MAX_ACCOUNTED),
        notes_due=max(transfer.notes_due, min(stand.notes, MAX_NOTES)),
        progress_at=now if alive else transfer.progress_at,
    )


def _settle(state: Fetching, transfer: Transfer, effects: list[Effect], now: float) -> Result:
    """Ends the transfer if it is complete, else slides the window."""
    if transfer.complete:
        state, more = _end(state, transfer, "ok", now)
        return state, effects + more
    left = transfer.granted - transfer.accounted
    if left <= state.window // 2 and transfer.pending.bit_count() > left:
        transfer = replace(transfer, granted=transfer.accounted + state.window)
        effects.append(Send(Credit(transfer.transfer_id, transfer.attempt, transfer.granted)))
    return _put(state, transfer), effects


def _tick(state: Fetching, now: float) -> Result:
    if not state.transfers:
        return state, []
    if now >= state.leased_from + LEASE_GIVE_UP_S:
        return _end_all(state, "peer_lost", "the lease was not renewed", now)
    effects: list[Effect] = []
    for transfer in [t for t in state.transfers.values() if now >= t.next_deadline]:
        waited = "its deadline" if now >= transfer.deadline else f"a sign of progress ({transfer.phase})"
        state, more = _end(state, transfer, "timeout", now, f"past {waited}")
        effects += more
    if state.transfers and now >= state.renew_at:
        seq = state.seq + 1
        sent_at = (*state.sent_at[-int(LEASE_GIVE_UP_S / RENEW_S) :], (seq, now))
        state = replace(state, seq=seq, sent_at=sent_at, renew_at=now + RENEW_S)
        effects.append(Send(Renew(seq, tuple(state.transfers))))
    return state, effects
