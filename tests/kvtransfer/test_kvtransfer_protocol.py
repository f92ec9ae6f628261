"""The two state machines by themselves: no socket, no clock."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest

import kvtransfer
from kvtransfer import fetching, holding
from kvtransfer import fetching_state as fs
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
    Stand,
    Standing,
)
from kvtransfer.protocol import (
    ANSWER_S,
    LEASE_GIVE_UP_S,
    LEASE_TTL_S,
    MAX_TRANSFERS_PER_PEER,
    PROGRESS_S,
    RENEW_S,
    STREAM_WAIT_S,
    Wanted,
    bits,
    mask_of,
)
from tests.kvtransfer.pairs import LAYOUT, content, name, transfer_id, wanted

ME, PEER = 9, 7
T = transfer_id(1)
LINK = b"link"
OFFERS = (Offer("shm", "here"), Offer("zmq", ""))
PURE = {
    "protocol.py",
    "fetching.py",
    "fetching_state.py",
    "holding.py",
    "holding_state.py",
    "serving.py",
    "admission.py",
    "messages.py",
}


def fetcher() -> fs.Fetching:
    return fs.Fetching(ME, PEER, LAYOUT, OFFERS, OFFERS[1:], window=4)


def started(count: int = 3) -> fs.Fetching:
    state, _ = fetching.step(fetcher(), fs.Start(T, 1, "s", wanted(range(count)), 60.0), 0.0)
    return state


def arrival(number: int, *, intact: bool = True) -> fs.Arrival:
    return fs.Arrival(number, name(number), LAYOUT.block_tokens, content(name(number)), intact)


def blocks(*arrivals: fs.Arrival, sender: int = PEER, receiver: int = ME, attempt: int = 1) -> fs.BlocksIn:
    return fs.BlocksIn(sender, receiver, T, attempt, arrivals)


def stand(phase: str = "live", **changes: int) -> fs.Received:
    values = {"round": 0, "sent": 0, "granted": 4, "owed": 0, "notes": 0, **changes}
    one = Stand(
        T, 1, values["round"], phase, values["sent"], values["granted"], values["owed"], values["notes"]
    )
    return fs.Received(PEER, ME, Standing(0, (one,)))


def play(state: fs.Fetching, *events: fs.Event, now: float = 1.0) -> tuple[fs.Fetching, list[fs.Effect]]:
    effects: list[fs.Effect] = []
    for event in events:
        state, more = fetching.step(state, event, now)
        effects += more
    return state, effects


def ended(effects: list[fs.Effect]) -> fs.Ended | None:
    return next((e for e in effects if isinstance(e, fs.Ended)), None)


def sent(effects: list[fs.Effect], kind: type) -> list[object]:
    return [e.message for e in effects if isinstance(e, fs.Send) and isinstance(e.message, kind)]


def test_the_cores_import_no_clock_no_chance_no_socket_and_no_tensor() -> None:
    folder = Path(kvtransfer.__file__ or "").parent
    for file in PURE:
        tree = ast.parse((folder / file).read_text())
        for node in ast.walk(tree):
            modules: list[str] = []
            if isinstance(node, ast.Import):
                modules = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [node.module or ""]
            for module in modules:
                root = module.split(".")[0]
                assert root in {
                    "__future__",
                    "collections",
                    "dataclasses",
                    "math",
                    "typing",
                    "kvtransfer",
                    "mesh",
                }
                if root == "kvtransfer":
                    assert module.split(".")[-1] + ".py" in PURE, f"{file} imports {module}"


def test_a_step_leaves_the_state_it_was_given_as_it_was() -> None:
    state = started()
    before = (state, dict(state.transfers), state.transfers[T])
    play(state, blocks(arrival(0)), stand("closed"), fs.Abort(T), fs.PeerLost(), fs.Tick(), now=99)
    assert (state, dict(state.transfers), state.transfers[T]) == before


def test_index_sets() -> None:
    assert list(bits(mask_of([5, 0, 64]))) == [0, 5, 64]


def test_a_transfer_ends_when_all_is_in_and_the_stream_is_closed() -> None:
    state, effects = play(started(2), stand(), blocks(arrival(0), arrival(1)))
    assert ended(effects) is None
    state, effects = play(state, stand("closed", sent=2))
    end = ended(effects)
    assert end is not None
    assert (end.outcome, end.missing, end.num_bytes) == ("ok", (), 2 * LAYOUT.block_bytes)
    assert sent(effects, Confirm) == [Confirm(T, 1)]
    assert state.transfers == {}


def test_each_index_is_accepted_once() -> None:
    _, effects = play(started(), blocks(arrival(0)), blocks(arrival(0), arrival(1)))
    assert [e.index for e in effects if isinstance(e, fs.Deliver)] == [0, 1]
    assert [e.reason for e in effects if isinstance(e, fs.Dropped)] == ["duplicate"]


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (blocks(arrival(0), sender=6), "incarnation"),
        (blocks(arrival(0), receiver=8), "incarnation"),
        (blocks(arrival(0), attempt=2), "attempt"),
        (replace(blocks(arrival(0)), transfer_id=transfer_id(2)), "transfer"),
        (blocks(arrival(0, intact=False)), "digest"),
        (blocks(arrival(77)), "index"),
        (blocks(fs.Arrival(-1, name(0), 4, b"", True)), "index"),
        (blocks(fs.Arrival(0, name(1), 4, content(name(1)), True)), "identity"),
        (blocks(fs.Arrival(0, name(0), 3, content(name(0)), True)), "identity"),
        (fs.Received(6, ME, Standing(0, ())), "incarnation"),
        (fs.Received(PEER, ME, Missing(transfer_id(2), 1, (0,))), "transfer"),
        (fs.Received(PEER, ME, Missing(T, 2, (0,))), "attempt"),
        (fs.Received(PEER, ME, Renew(1, ())), "unexpected"),
        (fs.Received(PEER, ME, Note(T, 1, 1, b"the second before the first")), "note"),
    ],
)
def test_what_does_not_fit_is_dropped_by_reason(event: fs.Event, reason: str) -> None:
    _, effects = play(started(), event)
    assert [e.reason for e in effects if isinstance(e, fs.Dropped)] == [reason]
    assert not any(isinstance(e, (fs.Deliver, fs.DeliverNote)) for e in effects)


def test_a_damaged_block_is_asked_for_once_more_and_then_given_up() -> None:
    state, effects = play(started(1), blocks(arrival(0, intact=False)))
    (again,) = sent(effects, Fetch)
    assert isinstance(again, Fetch)
    assert (again.round, again.wanted, again.offers) == (1, wanted([0]), OFFERS[1:])
    _, effects = play(state, blocks(arrival(0, intact=False)), stand("closed", round=1, sent=2))
    assert sent(effects, Fetch) == []
    end = ended(effects)
    assert end is not None
    assert (end.outcome, end.missing, end.corrupt) == ("ok", (0,), 2)


def test_a_lost_block_is_found_when_the_holder_owes_nothing_more() -> None:
    _, effects = play(started(3), blocks(arrival(0), arrival(2)), stand("closed", sent=3))
    (again,) = sent(effects, Fetch)
    assert isinstance(again, Fetch)
    assert again.wanted == wanted([1])


def test_a_lost_note_is_asked_for_again() -> None:
    state, effects = play(started(0), stand("closed", notes=1))
    (again,) = sent(effects, Fetch)
    assert isinstance(again, Fetch)
    assert again.notes == 0
    _, effects = play(state, fs.Received(PEER, ME, Note(T, 1, 0, b"n")))
    assert fs.DeliverNote(T, b"n") in effects
    assert ended(effects) is not None


def test_a_lost_credit_is_given_again() -> None:
    state, effects = play(started(9), blocks(arrival(0), arrival(1), arrival(2)))
    assert sent(effects, Credit) == [Credit(T, 1, 7)]
    _, effects = play(state, stand(sent=3, granted=4, owed=6))
    assert sent(effects, Credit) == [Credit(T, 1, 7)]


def test_the_window_slides_over_what_was_lost() -> None:
    _, effects = play(started(9), stand(sent=4, granted=4, owed=5))
    assert Credit(T, 1, 8) in sent(effects, Credit)


@pytest.mark.parametrize("phase", ["opening", "receiving"])
def test_abort_is_legal_in_every_state_and_repeatable(phase: str) -> None:
    state = started()
    if phase == "receiving":
        state, _ = play(state, blocks(arrival(0)))
    assert state.transfers[T].phase == phase
    state, effects = play(state, fs.Abort(T))
    end = ended(effects)
    assert end is not None
    assert end.outcome == "aborted"
    assert sent(effects, AbortFetch) == [AbortFetch(T, 1)]
    assert play(state, fs.Abort(T)) == (state, [])


@pytest.mark.parametrize(
    ("events", "at", "outcome"),
    [
        ((), ANSWER_S, "timeout"),
        ((stand(),), 1 + LEASE_GIVE_UP_S - 1, "peer_lost"),
        ((fs.PeerLost(),), 1, "peer_lost"),
        ((fs.Received(8, ME, Refusal(T, 1, "stale_incarnation", "")),), 1, "refused"),
        ((fs.Received(PEER, ME, Refusal(T, 1, "busy", "")),), 1, "refused"),
    ],
)
def test_every_other_end_has_its_time_and_its_name(
    events: tuple[fs.Event, ...], at: float, outcome: str
) -> None:
    state, effects = play(started(), *events)
    if ended(effects) is None:
        _, early = play(state, fs.Tick(), now=at - 0.01)
        assert ended(early) is None
        _, effects = play(state, fs.Tick(), now=at)
    end = ended(effects)
    assert end is not None
    assert (end.outcome, end.missing) == (outcome, (0, 1, 2))


def answered_renewals(state: fs.Fetching, until: float, phase: str) -> tuple[fs.Fetching, list[fs.Effect]]:
    """Time passes; the holder answers each renewal."""
    effects: list[fs.Effect] = []
    now = 1.0
    while now < until and state.transfers:
        state, more = fetching.step(state, fs.Tick(), now)
        effects += more
        for renew in sent(more, Renew):
            assert isinstance(renew, Renew)
            one = Stand(T, 1, 0, phase, 0, 4, 3, 0)
            state, more = fetching.step(state, fs.Received(PEER, ME, Standing(renew.seq, (one,))), now + 0.01)
            effects += more
        now += 0.5
    return state, effects


def test_an_open_stream_may_take_its_time() -> None:
    state, effects = answered_renewals(started(), 50, "live")
    assert T in state.transfers
    assert len(sent(effects, Renew)) == int(50 / RENEW_S) - 1


def test_a_closed_stream_must_deliver() -> None:
    _, effects = answered_renewals(started(), 50, "closed")
    end = ended(effects)
    assert end is not None
    assert end.outcome == "timeout"


def test_no_deadline_is_needed_when_nothing_is_fetched() -> None:
    assert fetching.next_deadline(fetcher()) == math.inf
    assert fetching.next_deadline(started()) == RENEW_S
    assert RENEW_S < LEASE_GIVE_UP_S < LEASE_TTL_S
    assert PROGRESS_S > LEASE_GIVE_UP_S


def ask(number: int = 1, **changes: object) -> hs.Received:
    fetch = Fetch(transfer_id(number), 1, 0, "s", LAYOUT, OFFERS, wanted(range(3)), 2, 0, 60.0)
    return hs.Received(LINK, ME, PEER, replace(fetch, **changes))  # type: ignore[arg-type]


def hold(
    *events: hs.Event, now: float = 0.0, state: hs.Holding | None = None
) -> tuple[hs.Holding, list[hs.Effect]]:
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
        (ask(layout=replace(LAYOUT, dtype="float16")), "layout", "dtype"),
        (ask(layout=replace(LAYOUT, layers=3)), "layout", "layers"),
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
        state, effects = hold(
            *(hs.Provided(tuple((n, content(n)) for n in names)) for names in asked), state=state
        )
        asked = [e.names for e in effects if isinstance(e, hs.Need)]
        seen += [n for names in asked for n in names]
    assert seen == [name(n) for n in range(20)]
    assert state.servings[(LINK, T)].sent == 20
