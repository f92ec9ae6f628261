"""The thread that owns the engine: commands, exports, the beat, and its end."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator

import pytest

from engine.engine import Engine, EngineConfig
from engine.grammar import Matcher
from engine.request import EngineRequest
from engine.sim_engine import SimRunner, expected_tokens
from engine.step import Missing
from mesh import blockhash
from mesh.errors import GrammarError
from mesh.params import SamplingParams
from tests.proxy.tiny_tokenizer import byte_level, token_of
from worker import steploop
from worker.grammars import Grammars
from worker.steploop import (
    Beaten,
    Expected,
    Exported,
    Finished,
    LoopEvent,
    Produced,
    Rejected,
    StepLoop,
    Stepped,
    Stopped,
)

ROOT = b"r" * 16
PROMPT = list(range(10, 30))
WAIT_S = 10.0


class Bench:
    """A running loop over a simulated engine and the events it emits."""

    def __init__(self) -> None:
        self.events: queue.SimpleQueue[LoopEvent] = queue.SimpleQueue()
        self.engine = Engine(SimRunner(32, 8), EngineConfig(4, 16, 128))
        self.grammars = Grammars(byte_level)
        self.loop = StepLoop(self.engine, self.events.put, self.grammars)
        self.loop.start()

    def until(self, wanted: Callable[[LoopEvent], bool]) -> LoopEvent:
        """The next such event; the others are dropped."""
        while True:
            event = self.events.get(timeout=WAIT_S)
            if wanted(event):
                return event


@pytest.fixture
def bench() -> Iterator[Bench]:
    made = Bench()
    yield made
    made.loop.stop(WAIT_S)
    made.grammars.close()


def request(key: str, max_tokens: int = 3, *, hold: bool = False, grammar: str | None = None) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, grammar=grammar)
    return EngineRequest(key, list(PROMPT), len(PROMPT), params, ROOT, stop_after=1 if hold else None, hold=hold)


def test_tokens_come_out_in_order(bench: Bench) -> None:
    bench.loop.add(request("a"))
    tokens: list[int] = []
    while len(tokens) < 3:
        event = bench.until(lambda e: isinstance(e, Stepped))
        assert isinstance(event, Stepped)
        tokens += [out.token for out in event.output.tokens]
    assert tokens == expected_tokens(PROMPT, 3, 256)


def test_an_idle_loop_beats(bench: Bench) -> None:
    first = bench.until(lambda e: isinstance(e, Beaten))
    second = bench.until(lambda e: isinstance(e, Beaten))
    assert isinstance(first, Beaten)
    assert isinstance(second, Beaten)
    assert second.load.free_blocks == 32


def test_wanted_blocks_are_exported_right_after_the_step_that_completes_them_is_told(bench: Bench) -> None:
    names = blockhash.chain(ROOT, PROMPT, 8)
    bench.loop.want("a", frozenset(names[:1]))
    bench.loop.add(request("a", hold=True))
    told = bench.until(lambda e: isinstance(e, Stepped))
    event = bench.until(lambda e: isinstance(e, Stepped | Produced))
    assert isinstance(event, Produced)
    assert isinstance(told, Stepped)
    assert told.output.ready
    assert [(block.stream, block.name) for block in event.exported] == [("a", names[0])]
    assert event.exported[0].payload is not None


def test_a_request_that_ends_is_told_to_have_exported_everything(bench: Bench) -> None:
    bench.loop.add(request("a", 2))
    event = bench.until(lambda e: isinstance(e, Finished))
    assert isinstance(event, Finished)
    assert event.output.tokens[0].finish == "length"


def test_many_blocks_are_told_of_piece_by_piece_and_then_that_it_was_all(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steploop, "PRODUCED_BYTES", 1)
    names = blockhash.chain(ROOT, PROMPT, 8)
    bench.loop.want("a", frozenset(names))
    bench.loop.add(request("a", hold=True))
    told: list[LoopEvent] = []
    while not told or not isinstance(told[-1], Finished):
        told.append(bench.until(lambda e: isinstance(e, Produced | Finished)))
    pieces = [event for event in told if isinstance(event, Produced)]
    assert [block.name for piece in pieces for block in piece.exported] == list(names)
    assert len(pieces) == len(names) == 2


def test_a_block_that_is_not_here_is_exported_as_none(bench: Bench) -> None:
    bench.loop.export("a", [b"n" * 16])
    assert bench.until(lambda e: isinstance(e, Exported)) == Exported("a", b"n" * 16, None)


def test_an_expected_request_says_what_it_lacks(bench: Bench) -> None:
    bench.loop.expect(request("a"))
    event = bench.until(lambda e: isinstance(e, Expected))
    assert isinstance(event, Expected)
    assert [m.valid_tokens for m in event.missing] == [8, 8, 4]
    assert all(isinstance(m, Missing) for m in event.missing)
    bench.loop.abort("a")


def test_a_request_that_cannot_fit_is_rejected(bench: Bench) -> None:
    bench.loop.add(EngineRequest("big", [1] * 200, 200, SamplingParams(max_tokens=1), ROOT))
    event = bench.until(lambda e: isinstance(e, Rejected))
    assert isinstance(event, Rejected)
    assert event.code == "too_long"


def test_a_failing_engine_ends_the_loop_with_its_reason(bench: Bench) -> None:
    bench.loop.abort(None)  # type: ignore[arg-type]
    bench.loop.fill("a", 0, None)  # type: ignore[arg-type]
    bench.loop.add(None)  # type: ignore[arg-type]
    event = bench.until(lambda e: isinstance(e, Stopped))
    assert isinstance(event, Stopped)
    assert isinstance(event.error, AttributeError)


def test_a_grammar_is_compiled_and_then_followed_to_its_end(bench: Bench) -> None:
    bench.loop.add(request("a", 5, grammar='start: "he"'))
    tokens: list[int] = []
    finish = None
    while finish is None:
        event = bench.until(lambda e: isinstance(e, Stepped))
        assert isinstance(event, Stepped)
        for out in event.output.tokens:
            tokens.append(out.token)
            finish = out.finish
    assert finish == "stop"
    assert b"".join(byte_level().token_bytes(t) for t in tokens[:-1]) == b"he"
    assert tokens[-1] in byte_level().eos_token_ids


def test_a_grammar_that_is_none_is_rejected_for_good(bench: Bench) -> None:
    bench.loop.expect(request("a", grammar="start: nothing"))
    event = bench.until(lambda e: isinstance(e, Rejected))
    assert isinstance(event, Rejected)
    assert (event.code, event.retryable) == ("grammar", False)
    assert "nothing" in event.message


def test_tokens_that_break_the_grammar_are_an_error_and_no_free_text(bench: Bench) -> None:
    broken = request("a", grammar='start: "he"')
    broken.tokens.append(token_of(byte_level(), "x"))
    bench.loop.add(broken)
    event = bench.until(lambda e: isinstance(e, Rejected) or (isinstance(e, Stepped) and bool(e.output.tokens)))
    assert isinstance(event, Rejected)
    assert (event.code, event.retryable) == ("grammar", False)
    bench.loop.check()
    assert bench.until(lambda e: isinstance(e, Beaten))
    assert not bench.engine.has_work


def test_a_request_aborted_while_its_grammar_is_compiled_never_runs() -> None:
    held: list[Callable[[], object]] = []

    class Slow(Grammars):
        def compile(self, grammar: str, done: Callable[[Matcher | GrammarError], object]) -> None:
            held.append(lambda: super(Slow, self).compile(grammar, done))

    events: queue.SimpleQueue[LoopEvent] = queue.SimpleQueue()
    engine = Engine(SimRunner(32, 8), EngineConfig(4, 16, 128))
    grammars = Slow(byte_level)
    loop = StepLoop(engine, events.put, grammars)
    loop.start()
    loop.add(request("a", grammar='start: "he"'))
    loop.abort("a")
    while not held:
        events.get(timeout=WAIT_S)
    held[0]()
    grammars.close()
    loop.stop(WAIT_S)
    seen = [events.get() for _ in range(events.qsize())]
    assert not any(isinstance(event, Stepped | Rejected) for event in seen)
    engine.check()
