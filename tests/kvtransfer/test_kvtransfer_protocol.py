"""The fetching state machine by itself, and what both may import."""

from __future__ import annotations

import ast
import math
from dataclasses import replace
from pathlib import Path

import pytest

import kvtransfer
from kvtransfer import fetching
from kvtransfer import fetching_state as fs
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
    PROGRESS_S,
    RENEW_S,
    bits,
    mask_of,
)
from tests.kvtransfer.pairs import LAYOUT, content, name, transfer_id, wanted

ME, PEER = 9, 7
T = transfer_id(1)
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
    one = Stand(T, 1, values["round"], phase, values["sent"], values["granted"], values["owed"], values["notes"])
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
def test_every_other_end_has_its_time_and_its_name(events: tuple[fs.Event, ...], at: float, outcome: str) -> None:
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
