"""Some seeds over real processes, and whether what must not happen would be noticed."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

import pytest

from mesh.modeldir import DEMO_MODEL
from tests.faults import client
from tests.faults.__main__ import main
from tests.faults.client import Client, Violation
from tests.faults.fleet import FLAGS
from tests.faults.links import Strikes
from tests.faults.nursery import Nursery
from tests.faults.plan import MESSAGE_KINDS, PLAIN, SIDES, WORKER_KINDS, Ask, answer, draw
from tests.kvtransfer.relay import FLIP, Frame

ASK = Ask(0.0, PLAIN, (40, 41, 42), max_tokens=3, n=1, leaves_after=None, stop=None)


def reader(ask: Ask = ASK) -> Client:
    return Client(ask, "client 0", 0, "model", 0.0)


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_seeds_hold(capsys: pytest.CaptureFixture[str]) -> None:
    """Among them kills, pauses and restarts of workers, and messages of every link damaged, repeated and delayed."""
    assert main(["--first", "173", "--seeds", "4"]) == 0
    printed = capsys.readouterr().out
    assert "seeds 173 to 176 hold" in printed
    assert "kill 2" in printed


@pytest.mark.e2e
@pytest.mark.timeout(300)
def test_a_wrong_token_is_noticed_and_can_be_played_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(ask: Ask) -> tuple[list[int], str]:
        tokens, finish = answer(ask)
        return [*tokens[:-1], tokens[-1] + 1], finish

    monkeypatch.setattr(client, "answer", wrong)
    assert main(["--first", "3", "--seeds", "1"]) == 1
    printed = capsys.readouterr().out
    assert "seed 3: client" in printed
    assert all(str(fault) in printed for fault in draw(3).faults)
    assert "--- proxy.log" in printed
    assert "again: python -m tests.faults --first 3 --seeds 1" in printed


def test_a_seed_is_the_same_every_time_and_no_two_are() -> None:
    assert draw(5) == draw(5)
    assert draw(5) != draw(6)


def test_two_hundred_seeds_have_every_fault() -> None:
    faults = [fault for seed in range(200) for fault in draw(seed).faults]
    found = Counter((fault.kind, fault.side) for fault in faults)
    assert found.keys() == {(k, s) for k in MESSAGE_KINDS for s in SIDES} | {(k, "") for k in WORKER_KINDS}
    assert any(ask.leaves_after is not None for seed in range(200) for ask in draw(seed).asks)


def test_what_no_client_may_see() -> None:
    right, finish = answer(ASK)
    whole = reader()
    whole._take(0, right[:1], None)
    whole._take(0, right[1:], finish)
    with pytest.raises(Violation, match="more after its finish"):
        whole._take(0, [], finish)
    with pytest.raises(Violation, match="as tokens 0 of choice 0"):
        reader()._take(0, [right[0] + 1], None)
    with pytest.raises(Violation, match="ends by length after 1 tokens"):
        reader()._take(0, right[:1], finish)
    with pytest.raises(Violation, match="fails by timeout"):
        reader()._failed("timeout")
    assert reader()._failed("no_workers") == "no_workers"


def test_a_token_that_comes_twice_is_noticed() -> None:
    right, _ = answer(ASK)
    assert right[0] != right[1]
    stream = reader()
    stream._take(0, right[:1], None)
    with pytest.raises(Violation, match="as tokens 1"):
        stream._take(0, right[:1], None)


def test_a_stop_token_ends_the_right_answer() -> None:
    tokens, finish = answer(ASK)
    assert finish == "length"
    stopped = Ask(0.0, PLAIN, ASK.prompt, ASK.max_tokens, 1, None, stop=tokens[1])
    assert answer(stopped) == (tokens[:2], "stop")


def test_a_strike_hits_the_next_messages_and_no_others() -> None:
    strikes = Strikes()
    message = [Frame(0, bytearray(b"word"))]
    assert strikes.apply(message).out == message[0].encoded()
    strikes.strike(FLIP, 1, 0.0)
    hit = strikes.apply([Frame(0, bytearray(b"word"))])
    assert (hit.kind, len(hit.out)) == (FLIP, 6)
    assert hit.out != message[0].encoded()
    assert strikes.apply(message).out == message[0].encoded()
    strikes.strike(FLIP, 1, 0.0)
    strikes.forget()
    assert strikes.apply(message).kind == ""
    assert strikes.done == {FLIP: 1}


@pytest.mark.e2e
def test_a_nursery_that_is_told_to_end_takes_its_workers_along(tmp_path: Path) -> None:
    nursery = Nursery()
    child = nursery.fork("prefill", [str(DEMO_MODEL), *FLAGS], "", tmp_path / "log")
    assert child.poll() is None
    nursery.send_signal(signal.SIGTERM)
    child.wait(30)
    nursery.close()
