"""A small run of the fuzzer, and that it would find what it looks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from kvtransfer.channel import Opener
from mesh import wire
from tests import fuzz_frames
from tests.fuzz_frames import Fuzzer

INPUTS = 20_000


@pytest.fixture
def fuzzer() -> Iterator[Fuzzer]:
    fuzzer = Fuzzer(1)
    yield fuzzer
    fuzzer.close()


def test_nothing_but_the_typed_refusal_escapes(fuzzer: Fuzzer) -> None:
    fuzzer.run(INPUTS, memory_every=20)
    assert sum(fuzzer.outcomes.values()) == INPUTS
    for outcome in ("control: refused", "control: decoded", "transfer: refused", "transfer: decoded", "large: refused"):
        assert fuzzer.outcomes[outcome] > 100, outcome
    for outcome in ("sealed: forged", "sealed: session", "sealed: truncated", "payload: refused/refused/refused"):
        assert fuzzer.outcomes[outcome] > 100, outcome


def test_every_message_is_in_the_corpus() -> None:
    assert {cls.__name__ for cls in fuzz_frames.MESSAGES} >= {"Register", "Prefill", "TokenBatch", "Fetch", "Blocks"}


def test_another_exception_is_found(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    def careless(frame: bytes) -> Any:
        raise KeyError(frame[0])

    monkeypatch.setattr(wire, "decode", careless)
    with pytest.raises(AssertionError, match="KeyError"):
        fuzzer.run(100, memory_every=1000)


def test_memory_out_of_proportion_is_found(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "SCANNED_BYTES", wire.MAX_FRAME_BYTES)
    with pytest.raises(AssertionError, match="of memory"):
        fuzzer.run(2000, memory_every=1)


def test_a_changed_message_that_opens_is_found(fuzzer: Fuzzer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Opener, "open", lambda self, frame, payload: (b"", payload))
    with pytest.raises(AssertionError, match="was accepted"):
        fuzzer.run(100, memory_every=1000)
