"""The holding state machine by itself: no socket, no clock."""

from __future__ import annotations

from dataclasses import replace

import pytest

from kvtransfer import holding
from kvtransfer import holding_state as hs
from kvtransfer.messages import (
    AbortFetch,
    Confirm,
    Credit,
    Fetch,
    Missing,
    Note,
    Offer,
    Refusal,
    Renew,
    Standing,
)
from kvtransfer.protocol import MAX_TRANSFERS_PER_PEER, RENEW_S, STREAM_WAIT_S, Wanted
from tests.kvtransfer.pairs import LAYOUT, content, name, transfer_id, wanted

ME, PEER = 9, 7
T = transfer_id(1)
LINK = b"link"
OFFERS = (Offer("shm", "here"), Offer("zmq", ""))


def ask(number: int = 1, **changes: object) -> hs.Received:
    fetch = Fetch(transfer_id(number), 1, 0, "s", LAYOUT, OFFERS, wanted(range(3)), 2, 0, 60.0)
    return hs.Received(LINK, ME, PEER, replace(fetch, **changes))  # type: ignore[arg-type]


def hold(*events: hs.Event, now: float = 0.0, state: hs.Holding | None = None) -> tuple[hs.Holding, list[hs.Effect]]:
    state = state if state is not None else hs.Holding(PEER, LAYOUT)
    effects: list[hs.Effect] = []
    for event in events:
        state, more = holding.step(state, event, now)
        effects += more
    return state, effects


def produced(number: int) -> hs.Produced:
    return hs.Produced("s", ((name(number), content(name(number))),))


def provided(number: int, *, held: bool = False) -> hs.Provided:
    return hs.Provided(((name(number), content(name(number)) if held else None),))


def said(effects: list[hs.Effect], kind: type) -> list[object]:
    return [e.message for e in effects if isinstance(e, hs.Send) and isinstance(e.message, kind)]


def shipped(effects: list[hs.Effect]) -> list[int]:
    return [w.index for e in effects if isinstance(e, hs.SendBlocks) for w, _ in e.blocks]


def test_blocks_go_out_within_the_credit_and_not_beyond() -> None:
    state, effects = hold(hs.OpenStream("s"), ask(), produced(0), produced(1), produced(2))
    assert shipped(effects) == [0, 1]
    credit = hs.Received(LINK, ME, PEER, Credit(T, 1, 3))
    _, effects = hold(credit, credit, state=state)
    assert shipped(effects) == [2]


def test_what_is_held_is_asked_for_at_once_and_again_when_the_stream_closes() -> None:
    state, effects = hold(hs.OpenStream("s"), ask(credit=9))
    assert [e.names for e in effects if isinstance(e, hs.Need)] == [(name(0), name(1), name(2))]
    state, effects = hold(provided(0, held=True), *(provided(n) for n in (1, 2)), state=state)
    assert shipped(effects) == [0]
    assert said(effects, Missing) == []
    state, effects = hold(hs.CloseStream("s"), state=state)
    assert [e.names for e in effects if isinstance(e, hs.Need)] == [(name(1), name(2))]
    _, effects = hold(provided(1, held=True), provided(2), state=state)
    assert shipped(effects) == [1]
    assert said(effects, Missing) == [Missing(T, 1, (2,))]
    (last,) = said(effects, Standing)
    assert isinstance(last, Standing)
    assert (last.transfers[0].phase, last.transfers[0].owed) == ("closed", 0)


def test_a_stream_that_never_opens_makes_everything_missing() -> None:
    state, _ = hold(ask(), *(provided(n) for n in range(3)))
    renew = hs.Received(LINK, ME, PEER, Renew(1, (T,)))
    now = 0.0
    while now < STREAM_WAIT_S:
        state, effects = hold(renew, hs.Tick(), now=now, state=state)
        assert said(effects, Missing) == []
        now += RENEW_S
    state, _ = hold(renew, hs.Tick(), now=STREAM_WAIT_S, state=state)
    _, effects = hold(*(provided(n) for n in range(3)), now=STREAM_WAIT_S, state=state)
    assert said(effects, Missing) == [Missing(T, 1, (0, 1, 2))]


@pytest.mark.parametrize(
    ("end", "when"),
    [(hs.Tick(), STREAM_WAIT_S), (hs.LinkLost(LINK), 1.0), (hs.Received(LINK, ME, PEER, AbortFetch(T, 1)), 1.0)],
)
def test_nothing_is_wanted_of_a_stream_that_never_opens_once_nobody_waits(end: hs.Event, when: float) -> None:
    state, effects = hold(ask())
    assert hs.WantsChanged("s") in effects
    assert len(state.wants("s")) == 3
    state, effects = hold(end, now=when, state=replace(state, leases={LINK: hs.Lease(ME, when)}))
    assert hs.WantsChanged("s") in effects
    assert state.wants("s") == frozenset()


def test_the_notes_of_a_closed_stream_go_before_the_word_that_all_is_on_its_way() -> None:
    """Of nothing but notes: whoever reads that word first thinks the notes lost, and asks again."""
    _, effects = hold(hs.OpenStream("s"), hs.GiveNote("s", b"first"), hs.CloseStream("s"), ask(wanted=()))
    (note, standing, *_) = [e.message for e in effects if isinstance(e, hs.Send)]
    assert isinstance(note, Note)
    assert isinstance(standing, Standing)
    assert (standing.transfers[0].owed, standing.transfers[0].notes) == (0, 1)


def test_repeating_a_fetch_sends_nothing_twice() -> None:
    _, effects = hold(hs.OpenStream("s"), ask(credit=9), ask(credit=9), produced(0), ask(credit=9))
    assert shipped(effects) == [0]
    assert len([e for e in effects if isinstance(e, hs.Need)]) == 1


def test_a_refetch_sends_again_by_what_it_offers() -> None:
    state, _ = hold(hs.OpenStream("s"), ask(credit=9), produced(0))
    again = ask(round=1, wanted=wanted([0]), credit=9, offers=OFFERS[1:])
    state, effects = hold(again, state=state)
    assert [e.names for e in effects if isinstance(e, hs.Need)] == [(name(0),)]
    _, effects = hold(provided(0, held=True), state=state)
    assert [e.offers for e in effects if isinstance(e, hs.SendBlocks)] == [OFFERS[1:]]
    assert shipped(effects) == [0]


def test_a_renewal_that_does_not_list_a_transfer_ends_it() -> None:
    state, _ = hold(hs.OpenStream("s"), ask())
    young, _ = hold(hs.Received(LINK, ME, PEER, Renew(1, ())), now=RENEW_S, state=state)
    assert len(young.servings) == 1
    state, effects = hold(hs.Received(LINK, ME, PEER, Renew(2, ())), now=RENEW_S + 0.1, state=state)
    assert state.servings == {}
    assert hs.Finished(LINK, T) in effects


def test_a_renewal_of_something_unknown_says_so() -> None:
    _, effects = hold(hs.Received(LINK, ME, PEER, Renew(5, (T,))))
    (answer,) = said(effects, Standing)
    assert isinstance(answer, Standing)
    assert (answer.seq, answer.transfers[0].phase) == (5, "unknown")


def test_another_links_transfer_cannot_be_touched() -> None:
    state, _ = hold(hs.OpenStream("s"), ask())
    for message in (AbortFetch(T, 1), Confirm(T, 1), Credit(T, 1, 99)):
        after, effects = hold(hs.Received(b"other", 5, PEER, message), state=state)
        assert after == state
        assert effects == [hs.Dropped("transfer")]


@pytest.mark.parametrize(
    ("event", "code", "detail"),
    [
        (replace(ask(), receiver=6), "stale_incarnation", "this is incarnation 7"),
        (ask(layout=replace(LAYOUT, dtype="float16")), "layout", "dtype is float32, not float16"),
        (ask(layout=replace(LAYOUT, layers=3)), "layout", "layers is 2, not 3"),
        (ask(wanted=wanted([1, 1])), "malformed", "wanted"),
        (ask(wanted=(Wanted(0, name(0), 5),)), "malformed", "valid_tokens"),
    ],
)
def test_refusals_are_typed(event: hs.Received, code: str, detail: str) -> None:
    state, effects = hold(event)
    assert said(effects, Refusal) == [Refusal(T, 1, code, detail)]
    assert state.servings == {}


def test_one_peer_cannot_take_every_place() -> None:
    state, effects = hold(*(ask(n) for n in range(MAX_TRANSFERS_PER_PEER + 1)))
    (refusal,) = said(effects, Refusal)
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.transfer_id) == ("busy", transfer_id(MAX_TRANSFERS_PER_PEER))
    assert len(state.servings) == MAX_TRANSFERS_PER_PEER


def test_an_open_stream_survives_its_fetcher_and_serves_the_next() -> None:
    abort = hs.Received(LINK, ME, PEER, AbortFetch(T, 1))
    state, effects = hold(hs.OpenStream("s"), ask(), abort)
    assert not any(isinstance(e, hs.Released) for e in effects)
    state, effects = hold(ask(2, credit=9), produced(0), state=state)
    assert shipped(effects) == [0]
    confirm = hs.Received(LINK, ME, PEER, Confirm(transfer_id(2), 1))
    state, effects = hold(hs.CloseStream("s"), confirm, state=state)
    assert [e for e in effects if isinstance(e, hs.Released)] == [hs.Released("s", "confirmed")]
    assert (state.streams, state.servings, state.leases) == ({}, {}, {})


def test_a_stream_whose_fetcher_left_is_released_as_soon_as_it_is_finished() -> None:
    abort = hs.Received(LINK, ME, PEER, AbortFetch(T, 1))
    _, effects = hold(hs.OpenStream("s"), ask(), abort, hs.CloseStream("s"))
    assert hs.Released("s", "aborted") in effects


def test_a_late_fetch_of_a_released_stream_is_answered_at_once() -> None:
    state, _ = hold(hs.OpenStream("s"), hs.CloseStream("s"), hs.ReleaseStream("s"), ask())
    _, effects = hold(*(provided(n) for n in range(3)), state=state)
    assert said(effects, Missing) == [Missing(T, 1, (0, 1, 2))]


def test_more_blocks_than_memory_are_asked_for_in_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.holding_state.READY_BYTES", 8 * LAYOUT.block_bytes)
    state, effects = hold(ask(stream="", wanted=wanted(range(20)), credit=100))
    asked = [e.names for e in effects if isinstance(e, hs.Need)]
    assert [len(names) for names in asked] == [8]
    seen = list(asked[0])
    while asked:
        state, effects = hold(*(hs.Provided(tuple((n, content(n)) for n in names)) for names in asked), state=state)
        asked = [e.names for e in effects if isinstance(e, hs.Need)]
        seen += [n for names in asked for n in names]
    assert seen == [name(n) for n in range(20)]
    assert state.servings[(LINK, T)].sent == 20
