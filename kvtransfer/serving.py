"""One transfer as its holder moves it on: send what is in hand, ask for what may be held, conclude."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from kvtransfer.holding_state import Effect, Need, Payload, Send, SendBlocks, Serving
from kvtransfer.messages import Missing, Standing
from kvtransfer.protocol import CLOSED, bits, mask_of


def pump(serving: Serving, depth: int, now: float, effects: list[Effect]) -> Serving:
    """As far as credit lets it send and memory (`depth` blocks in hand or asked for) lets it ask."""
    serving = _send_ready(serving, effects)
    serving = _ask_engine(serving, depth, now, effects)
    return _conclude(serving, effects) if serving.phase == CLOSED else serving


def take(serving: Serving, blocks: Sequence[tuple[int, Payload | None]], depth: int) -> Serving:
    """Notes what is known of blocks that are owed: in hand, absent, or (out of room) to be asked for later."""
    ready = list(serving.ready)
    room = depth + max(0, serving.granted - serving.sent)
    known = absent = in_hand = 0
    for index, payload in blocks:
        bit = 1 << index
        known |= bit
        if payload is None:
            absent |= bit
        elif len(ready) < room and not in_hand & bit:
            in_hand |= bit
            ready.append((index, payload))
    return replace(
        serving,
        asked=serving.asked & ~known,
        absent=(serving.absent & ~known) | absent,
        ready=tuple(ready),
        ready_mask=serving.ready_mask | in_hand,
    )


def _send_ready(serving: Serving, effects: list[Effect]) -> Serving:
    count = min(len(serving.ready), serving.granted - serving.sent)
    if count <= 0:
        return serving
    going = serving.ready[:count]
    mask = mask_of(index for index, _ in going)
    effects.append(
        SendBlocks(
            serving.link,
            serving.fetcher,
            serving.transfer_id,
            serving.attempt,
            serving.offers,
            tuple((serving.by_index[index], payload) for index, payload in going),
        )
    )
    return replace(
        serving,
        ready=serving.ready[count:],
        ready_mask=serving.ready_mask & ~mask,
        owed=serving.owed & ~mask,
        sent=serving.sent + count,
    )


def _ask_engine(serving: Serving, depth: int, now: float, effects: list[Effect]) -> Serving:
    """Asks for blocks that may be held, in waves: the engine answers between two steps, so few and large ones."""
    open_ = serving.owed & ~(serving.asked | serving.absent | serving.ready_mask)
    room = depth - len(serving.ready) - serving.asked.bit_count()
    if not open_ or room <= 0 or (serving.asked and room < depth // 2):
        return serving
    wave = [index for index, _ in zip(bits(open_), range(room), strict=False)]
    effects.append(Need(serving.stream, tuple(serving.by_index[i].name for i in wave)))
    return replace(serving, asked=serving.asked | mask_of(wave), asked_at=now)


def _conclude(serving: Serving, effects: list[Effect]) -> Serving:
    """A closed stream: what is absent now stays absent; the peer is told when nothing is owed any more."""
    missing = serving.owed & serving.absent
    if missing and not serving.asked:
        effects.append(Send(serving.link, Missing(serving.transfer_id, serving.attempt, tuple(bits(missing)))))
        serving = replace(serving, owed=serving.owed & ~missing)
    if serving.owed == 0 and serving.announced != serving.round:
        effects.append(Send(serving.link, Standing(0, (serving.stand,))))
        serving = replace(serving, announced=serving.round)
    return serving
