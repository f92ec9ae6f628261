"""The holding side: every stream of this worker and every peer's transfer from it, as a pure state machine.

    stream     OPEN ──close──▶ CLOSED ──last fetcher left | UNCLAIMED_S | HOLD_CAP_S──▶ released
    transfer   Fetch ──▶ waiting ──opened──▶ live ──closed──▶ closed ──Confirm | Abort | lease | deadline──▶ gone
                  └─ its stream is open, closed, released, or not named ─┘

A transfer asks the engine at once for what exists already, lowest index first; what does not exist yet goes out as it
is produced. When the stream closes, what is still owed is asked for once more, and what is not held is `Missing`.
"""

from __future__ import annotations

import math
from dataclasses import replace

from kvtransfer.admission import refused
from kvtransfer.holding_state import (
    CloseStream,
    Dropped,
    Effect,
    Event,
    Finished,
    GiveNote,
    Holding,
    Key,
    Lease,
    LinkLost,
    OpenStream,
    Produced,
    Provided,
    Received,
    Released,
    ReleaseStream,
    Send,
    Serving,
    Stream,
    WantsChanged,
)
from kvtransfer.messages import (
    AbortFetch,
    Confirm,
    Credit,
    Fetch,
    Note,
    Refusal,
    Renew,
    Stand,
    Standing,
)
from kvtransfer.protocol import (
    CLOSED,
    EXPIRY_SLACK_S,
    GONE_S,
    LEASE_TTL_S,
    LIVE,
    MAX_GONE,
    MAX_INDEX,
    MAX_LISTED,
    MAX_NOTES,
    MAX_STREAM_CHARS,
    PROVIDE_S,
    RENEW_S,
    STREAM_WAIT_S,
    UNKNOWN,
    WAITING,
    mask_of,
)
from kvtransfer.serving import pump, take

Result = tuple[Holding, list[Effect]]


def step(state: Holding, event: Event, now: float) -> Result:
    """The next state and what must be done; total over whatever a peer sends. `ValueError`: a caller's mistake."""
    effects: list[Effect] = []
    if isinstance(event, Produced):
        state = _produced(state, event, now, effects)
    elif isinstance(event, Provided):
        state = _provided(state, event, now, effects)
    elif isinstance(event, Received):
        state = _received(state, event, now, effects)
    elif isinstance(event, OpenStream):
        state = _open(state, event.stream, now)
    elif isinstance(event, GiveNote):
        state = _give_note(state, event, effects)
    elif isinstance(event, CloseStream):
        state = _close(state, event.stream, now, effects)
    elif isinstance(event, ReleaseStream):
        state = _forget(state, event.stream, now, effects)
    elif isinstance(event, LinkLost):
        state = _end_link(state, event.link, "peer_lost", now, effects)
    else:
        state = _tick(state, now, effects)
    return state, effects


def next_deadline(state: Holding) -> float:
    """When `Tick` has something to do at the latest; infinity: never."""
    return min(
        min((s.next_deadline for s in state.streams.values()), default=math.inf),
        min((s.next_deadline for s in state.servings.values()), default=math.inf),
        min((lease.heard_at + LEASE_TTL_S for lease in state.leases.values()), default=math.inf),
    )


def _put(state: Holding, serving: Serving) -> Holding:
    return replace(state, servings={**state.servings, serving.key: serving})


def _pump(state: Holding, serving: Serving, now: float, effects: list[Effect]) -> Holding:
    return _put(state, pump(serving, state.depth, now, effects))


def _produced(state: Holding, event: Produced, now: float, effects: list[Effect]) -> Holding:
    for key in state.by_stream.get(event.stream, ()):
        serving = state.servings[key]
        due = serving.owed & ~serving.ready_mask
        found = [
            (index, payload)
            for name, payload in event.blocks
            if (index := serving.index_of.get(name)) is not None and due >> index & 1
        ]
        if found:
            state = _pump(state, take(serving, found, state.depth), now, effects)
    return state


def _provided(state: Holding, event: Provided, now: float, effects: list[Effect]) -> Holding:
    for serving in [s for s in state.servings.values() if s.asked]:
        found = [
            (index, payload)
            for name, payload in event.blocks
            if (index := serving.index_of.get(name)) is not None and serving.asked >> index & 1
        ]
        if found:
            state = _pump(state, take(serving, found, state.depth), now, effects)
    return state


def _open(state: Holding, name: str, now: float) -> Holding:
    if not name or len(name) > MAX_STREAM_CHARS:
        raise ValueError(f"a stream's name has 1 to {MAX_STREAM_CHARS} characters")
    if name in state.streams:
        return state
    waiting = state.by_stream.get(name, ())
    stream = Stream(name, now, claimed=bool(waiting))
    servings = {**state.servings, **{k: replace(state.servings[k], phase=LIVE) for k in waiting}}
    gone = {n: t for n, t in state.gone.items() if n != name}
    return replace(state, streams={**state.streams, name: stream}, servings=servings, gone=gone)


def _give_note(state: Holding, event: GiveNote, effects: list[Effect]) -> Holding:
    stream = state.streams.get(event.stream)
    if stream is None:  # released meanwhile: nobody is left to read it
        return state
    if len(stream.notes) >= MAX_NOTES:
        raise ValueError(f"a stream carries at most {MAX_NOTES} notes")
    stream = replace(stream, notes=(*stream.notes, event.payload))
    servings = dict(state.servings)
    for key in state.by_stream.get(event.stream, ()):
        serving = servings[key] = replace(servings[key], notes=stream.notes)
        note = Note(serving.transfer_id, serving.attempt, len(stream.notes) - 1, event.payload)
        effects.append(Send(serving.link, note))
    return replace(state, streams={**state.streams, event.stream: stream}, servings=servings)


def _close(state: Holding, name: str, now: float, effects: list[Effect]) -> Holding:
    stream = state.streams.get(name)
    if stream is None or stream.closed_at is not None:
        return state
    state = replace(state, streams={**state.streams, name: replace(stream, closed_at=now)})
    if stream.claimed and not state.by_stream.get(name):
        effects.append(Released(name, stream.left))
        return _forget(state, name, now, effects)
    return _finish_servings(state, name, now, effects)


def _finish_servings(state: Holding, stream: str, now: float, effects: list[Effect]) -> Holding:
    """Nothing more will be produced for `stream`: its transfers get what is held."""
    for key in state.by_stream.get(stream, ()):
        serving = state.servings[key]
        if serving.phase != CLOSED:
            state = _pump(state, replace(serving, phase=CLOSED, absent=0), now, effects)
    return state


def _forget(state: Holding, name: str, now: float, effects: list[Effect]) -> Holding:
    """Drops a stream; transfers that still run on it are served from what stays cached."""
    if name not in state.streams:
        return state
    streams = {n: s for n, s in state.streams.items() if n != name}
    gone = {**state.gone, name: now}
    if len(gone) > MAX_GONE:
        gone.pop(next(iter(gone)))
    return _finish_servings(replace(state, streams=streams, gone=gone), name, now, effects)


def _end(state: Holding, serving: Serving, reason: str, now: float, effects: list[Effect]) -> Holding:
    """Every way out of a transfer goes through here."""
    servings = {k: s for k, s in state.servings.items() if k != serving.key}
    others = tuple(k for k in state.by_stream[serving.stream] if k != serving.key)
    by_stream = {n: k for n, k in state.by_stream.items() if n != serving.stream}
    if others:
        by_stream[serving.stream] = others
    leases = state.leases
    if not any(link == serving.link for link, _ in servings):
        leases = {link: lease for link, lease in leases.items() if link != serving.link}
    state = replace(state, servings=servings, by_stream=by_stream, leases=leases)
    effects.append(Finished(serving.link, serving.transfer_id))
    stream = state.streams.get(serving.stream)
    if stream is None:
        if serving.phase == WAITING:
            effects.append(WantsChanged(serving.stream))
        return state
    if others or stream.closed_at is None:
        effects.append(WantsChanged(serving.stream))
        return replace(state, streams={**state.streams, stream.name: replace(stream, left=reason)})
    effects.append(Released(serving.stream, reason))
    return _forget(state, serving.stream, now, effects)


def _end_link(state: Holding, link: bytes, reason: str, now: float, effects: list[Effect]) -> Holding:
    for serving in [s for s in state.servings.values() if s.link == link]:
        state = _end(state, serving, reason, now, effects)
    return state


def _received(state: Holding, event: Received, now: float, effects: list[Effect]) -> Holding:
    message = event.message
    lease = state.leases.get(event.link)
    if event.receiver != state.me or (lease is not None and lease.fetcher != event.sender):
        if isinstance(message, Fetch):
            detail = f"this is incarnation {state.me}"
            refusal = Refusal(message.transfer_id, message.attempt, "stale_incarnation", detail)
            effects.append(Send(event.link, refusal))
        effects.append(Dropped("incarnation"))
        return state
    if isinstance(message, Renew):
        return _renewed(state, event.link, message, now, effects)
    if isinstance(message, Fetch):
        return _fetch(state, event, message, now, effects)
    if not isinstance(message, (Credit, Confirm, AbortFetch)):
        effects.append(Dropped("unexpected"))
        return state
    serving = state.servings.get((event.link, message.transfer_id))
    if serving is None or serving.attempt != message.attempt:
        effects.append(Dropped("transfer" if serving is None else "attempt"))
        return state
    if isinstance(message, Credit):
        granted = max(serving.granted, min(message.total, serving.sent + MAX_INDEX))
        return _pump(state, replace(serving, granted=granted), now, effects)
    reason = "confirmed" if isinstance(message, Confirm) else "aborted"
    return _end(state, serving, reason, now, effects)


def _renewed(state: Holding, link: bytes, message: Renew, now: float, effects: list[Effect]) -> Holding:
    """Renews, ends what the fetcher no longer runs, and answers how each of its transfers stands."""
    if len(message.transfers) > MAX_LISTED:
        effects.append(Dropped("malformed"))
        return state
    if link in state.leases:
        lease = replace(state.leases[link], heard_at=now)
        state = replace(state, leases={**state.leases, link: lease})
    listed = set(message.transfers)
    for serving in [s for s in state.servings.values() if s.link == link]:
        # A transfer younger than one period may have been asked for after this renewal was written.
        if serving.transfer_id not in listed and now - serving.fetched_at > RENEW_S:
            state = _end(state, serving, "lease", now, effects)
    stands = []
    for transfer_id in message.transfers:
        known = state.servings.get((link, transfer_id))
        stands.append(known.stand if known else Stand(transfer_id, 0, 0, UNKNOWN, 0, 0, 0, 0))
    effects.append(Send(link, Standing(message.seq, tuple(stands))))
    return state


def _fetch(state: Holding, event: Received, fetch: Fetch, now: float, effects: list[Effect]) -> Holding:
    reason = refused(state, event.link, fetch)
    if reason is not None:
        effects.append(Send(event.link, Refusal(fetch.transfer_id, fetch.attempt, *reason)))
        effects.append(Dropped("refused"))
        return state
    known = state.servings.get((event.link, fetch.transfer_id))
    if known is not None and (known.attempt != fetch.attempt or known.stream != fetch.stream):
        effects.append(Dropped("attempt"))
        return state
    lease = Lease(event.sender, now, event.version)
    state = replace(state, leases={**state.leases, event.link: lease})
    if known is not None and fetch.round <= known.round:
        effects.append(Send(event.link, Standing(0, (known.stand,))))
        return _put(state, replace(known, fetched_at=now))
    serving = _new_serving(state, event, fetch, now) if known is None else _asked_again(known, fetch, now)
    state = _claim(_put(state, serving), serving)
    # the notes first: a `Standing` that says closed and nothing owed says that all is on its way
    for seq in range(fetch.notes, len(serving.notes)):
        effects.append(Send(event.link, Note(fetch.transfer_id, fetch.attempt, seq, serving.notes[seq])))
    effects.append(Send(event.link, Standing(0, (serving.stand,))))
    if serving.phase != CLOSED:
        effects.append(WantsChanged(serving.stream))
    return _pump(state, serving, now, effects)


def _new_serving(state: Holding, event: Received, fetch: Fetch, now: float) -> Serving:
    stream = state.streams.get(fetch.stream)
    return Serving(
        event.link,
        event.sender,
        fetch.transfer_id,
        fetch.attempt,
        fetch.stream,
        state.phase_of(fetch.stream),
        {w.index: w for w in fetch.wanted},
        {w.name: w.index for w in fetch.wanted},
        owed=mask_of(w.index for w in fetch.wanted),
        granted=min(fetch.credit, MAX_INDEX),
        offers=fetch.offers,
        since=now,
        fetched_at=now,
        expires=now + fetch.deadline_s + EXPIRY_SLACK_S,
        round=fetch.round,
        notes=stream.notes if stream is not None else (),
    )


def _asked_again(serving: Serving, fetch: Fetch, now: float) -> Serving:
    """A refetch: what it lists is owed (again), by the transports it now offers."""
    again = mask_of(w.index for w in fetch.wanted)
    by_index = {**serving.by_index, **{w.index: w for w in fetch.wanted}}
    return replace(
        serving,
        by_index=by_index,
        index_of={w.name: w.index for w in by_index.values()},
        owed=serving.owed | again,
        absent=serving.absent & ~again,
        granted=max(serving.granted, min(fetch.credit, serving.sent + MAX_INDEX)),
        offers=fetch.offers,
        round=fetch.round,
        fetched_at=now,
    )


def _claim(state: Holding, serving: Serving) -> Holding:
    keys = state.by_stream.get(serving.stream, ())
    if serving.key not in keys:
        state = replace(state, by_stream={**state.by_stream, serving.stream: (*keys, serving.key)})
    stream = state.streams.get(serving.stream)
    if stream is None or stream.claimed:
        return state
    return replace(state, streams={**state.streams, stream.name: replace(stream, claimed=True)})


def _tick(state: Holding, now: float, effects: list[Effect]) -> Holding:
    for link, lease in list(state.leases.items()):
        if now >= lease.heard_at + LEASE_TTL_S:
            state = _end_link(state, link, "lease", now, effects)
    for serving in [s for s in state.servings.values() if now >= s.next_deadline]:
        state = _overdue(state, serving.key, now, effects)
    for stream in [s for s in state.streams.values() if now >= s.next_deadline]:
        reason = "cap" if stream.claimed or stream.closed_at is None else "unclaimed"
        effects.append(Released(stream.name, reason))
        state = _forget(state, stream.name, now, effects)
    if any(now >= since + GONE_S for since in state.gone.values()):
        state = replace(state, gone={n: since for n, since in state.gone.items() if now < since + GONE_S})
    return state


def _overdue(state: Holding, key: Key, now: float, effects: list[Effect]) -> Holding:
    serving = state.servings.get(key)
    if serving is None:
        return state
    if now >= serving.expires:
        return _end(state, serving, "expired", now, effects)
    if serving.asked and now >= serving.asked_at + PROVIDE_S:  # the engine did not answer: as if it held none
        serving = replace(serving, absent=serving.absent | serving.asked, asked=0)
    if serving.phase == WAITING and now >= serving.since + STREAM_WAIT_S:
        serving = replace(serving, phase=CLOSED, absent=0)
        effects.append(WantsChanged(serving.stream))
    return _pump(state, serving, now, effects)
