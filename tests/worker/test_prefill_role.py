"""What the prefill role does with its streams."""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.request import EngineRequest
from engine.step import Missing, StepOutput, TokenOut
from kvtransfer.endpoint import BlockArrived, FetchEnded, StreamReleased
from mesh.messages import Abort, KvHolder, TokenBatch
from mesh.params import SamplingParams
from prefill.role import PrefillRole
from tests.worker.role_fakes import DECODE, LAYOUT, OTHER, Bench, decode_message, prefill_message
from worker.firsttoken import FirstToken
from worker.steploop import Expected, Finished, Stepped

KEY = "r#1"


def started(bench: Bench) -> PrefillRole:
    role = PrefillRole(bench.parts)
    role.assign(bench.proxy, prefill_message())
    return role


def stepped(finish: str) -> Stepped:
    request = EngineRequest(KEY, list(range(11)), 10, SamplingParams(max_tokens=8), b"root")
    return Stepped(StepOutput((TokenOut(request, 0, 5, None, finish),), (), (), (), 10), 0.1)


def finished(finish: str) -> Finished:
    return Finished(stepped(finish).output)


def test_a_prefill_is_a_request_that_leaves_after_one_token() -> None:
    bench = Bench()
    started(bench)
    ((request,),) = bench.loop.named("add")
    assert (request.key, request.stop_after, request.hold) == (KEY, 1, True)
    assert bench.kv.named("open_stream") == [(KEY,)]


def test_the_first_token_goes_to_the_proxy_and_onto_the_stream() -> None:
    bench = Bench()
    role = started(bench)
    role.stepped(stepped("handoff"))
    bench.replies.flush()
    (batch,) = bench.link.sent
    assert isinstance(batch, TokenBatch)
    assert (batch.deltas[0].tokens, batch.deltas[0].finish) == ((5,), None)
    assert bench.kv.named("note") == [(KEY, FirstToken(0, 5, None).pack())]


def test_the_stream_is_closed_after_the_steps_blocks() -> None:
    bench = Bench()
    role = started(bench)
    role.stepped(stepped("handoff"))
    assert bench.kv.named("close_stream") == []
    role.exported_all(finished("handoff"))
    assert bench.kv.named("close_stream") == [(KEY,)]


def test_a_stream_whose_first_token_is_the_last_is_released_at_once() -> None:
    bench = Bench()
    role = started(bench)
    role.stepped(stepped("length"))
    role.exported_all(finished("length"))
    assert bench.kv.named("release_stream") == [(KEY,)]
    assert role.num_jobs == 0


def test_a_released_stream_frees_the_blocks() -> None:
    bench = Bench()
    role = started(bench)
    role.stepped(stepped("handoff"))
    role.transferred([StreamReleased(KEY, "confirmed")])
    assert bench.loop.named("release") == [(KEY,)]
    assert role.num_jobs == 0


def test_a_stream_that_is_given_up_while_it_is_computed_ends_the_work() -> None:
    bench = Bench()
    role = started(bench)
    role.transferred([StreamReleased(KEY, "peer_lost")])
    assert bench.loop.named("abort") == [(KEY,)]
    assert role.num_jobs == 0


def test_an_abort_frees_everything() -> None:
    bench = Bench()
    role = started(bench)
    role.abort(Abort("r", 1, "client gone"))
    assert bench.loop.named("abort") == [(KEY,)]
    assert bench.kv.named("release_stream") == [(KEY,)]
    assert role.num_jobs == 0


def test_a_decode_is_refused() -> None:
    bench = Bench()
    PrefillRole(bench.parts).assign(bench.proxy, decode_message())
    assert [m.code for m in bench.link.sent] == ["wrong_role"]


def test_a_prompt_without_room_for_a_token_is_refused_for_good() -> None:
    bench = Bench()
    PrefillRole(bench.parts).assign(bench.proxy, prefill_message(64))
    assert [(m.code, m.retryable) for m in bench.link.sent] == [("too_long", False)]


def test_a_deadline_ends_the_hold() -> None:
    bench = Bench()
    role = started(bench)
    role.stepped(stepped("handoff"))
    role.tick(bench.clock.now + 60)
    assert role.num_jobs == 0


LACKED = tuple(Missing(i, bytes([i]) * 16, 4 if i < 2 else 2) for i in range(3))
"""Of a prompt of ten tokens in blocks of four."""


HOLDERS = (KvHolder(DECODE, 4, 0), KvHolder(OTHER, 8, 3))


def fetching(bench: Bench) -> tuple[PrefillRole, bytes]:
    """A role that fetches a prompt's history from two workers, and the transfer's id."""
    role = PrefillRole(bench.parts)
    role.assign(bench.proxy, prefill_message(holders=HOLDERS))
    role.expected(Expected(KEY, LACKED))
    ((transfer, *_),) = bench.kv.named("gather")
    return role, transfer


def ended(transfer: bytes, outcome: str = "ok") -> FetchEnded:
    return FetchEnded(transfer, (), outcome, 0, 0.25, 0, "")


def test_a_history_is_fetched_from_its_holders_before_the_rest_is_computed() -> None:
    bench = Bench()
    role, transfer = fetching(bench)
    assert [(r.hold, theirs) for r, theirs in bench.loop.named("expect")] == [(True, None)]
    assert bench.kv.named("open_stream") == [(KEY,)], "the decode worker's fetch may come meanwhile"
    ((_, attempt, maker, stream, holders, wanted, left),) = bench.kv.named("gather")
    assert (attempt, maker, stream, holders, left) == (1, None, "", HOLDERS, 60.0)
    assert [(w.index, w.name, w.valid_tokens) for w in wanted] == [(0, bytes(16), 4), (1, bytes([1]) * 16, 4)]
    role.transferred([BlockArrived(transfer, 1, b"one"), BlockArrived(transfer, 0, b"zero")])
    assert bench.loop.named("fill") == [(KEY, 1, b"one", None), (KEY, 0, b"zero", None)]
    assert not bench.loop.named("ready")
    role.transferred([ended(transfer)])
    assert bench.loop.named("ready") == [(KEY, ())]
    assert not bench.loop.named("add")


def test_a_history_in_larger_blocks_is_asked_for_in_those() -> None:
    bench = Bench()
    role = PrefillRole(bench.parts)
    layout = replace(LAYOUT, block_tokens=8)
    large = KvHolder(replace(DECODE, layout=layout), 8, 0)
    small = KvHolder(OTHER, 8, 0)
    role.assign(bench.proxy, prefill_message(holders=(large, small)))
    assert [theirs for _, theirs in bench.loop.named("expect")] == [layout]
    role.expected(Expected(KEY, (Missing(0, bytes(16), 8), Missing(1, bytes(16), 2))))
    ((transfer, _, _, _, holders, wanted, _),) = bench.kv.named("gather")
    assert holders == (large,), "one fetch is in one block size"
    assert [(w.index, w.valid_tokens) for w in wanted] == [(0, 8)], "of 8 tokens that are said to be there"
    role.transferred([BlockArrived(transfer, 0, b"both")])
    assert bench.loop.named("fill") == [(KEY, 0, b"both", layout)]


def test_what_is_fetched_is_told_to_the_proxy() -> None:
    bench = Bench()
    role, transfer = fetching(bench)
    role.transferred([BlockArrived(transfer, 0, bytes(16)), ended(transfer)])
    event = stepped("handoff")
    event.output.tokens[0].request.num_fetched_tokens = 4
    role.stepped(event)
    bench.replies.flush()
    report = bench.link.sent[0].deltas[0].report
    assert (report.cached_tokens, report.fetched_tokens, report.computed_tokens, report.reused_tokens) == (0, 4, 6, 4)
    assert (report.transfer_s, report.transfer_bytes) == (0.25, 16)


@pytest.mark.parametrize("outcome", ["timeout", "peer_lost", "refused"])
def test_a_history_that_does_not_come_is_computed(outcome: str) -> None:
    bench = Bench()
    role, transfer = fetching(bench)
    role.transferred([ended(transfer, outcome)])
    assert bench.loop.named("ready") == [(KEY, ())]
    assert not bench.link.sent


def test_a_history_that_is_here_is_not_fetched() -> None:
    bench = Bench()
    role = PrefillRole(bench.parts)
    role.assign(bench.proxy, prefill_message(holders=HOLDERS))
    role.expected(Expected(KEY, LACKED[2:]))
    assert not bench.kv.named("gather")
    assert bench.loop.named("ready") == [(KEY, ())]


def test_an_end_of_the_request_ends_the_fetch() -> None:
    bench = Bench()
    role, transfer = fetching(bench)
    role.abort(Abort("r", 1, "client gone"))
    assert bench.kv.named("abort_fetch") == [(transfer,)]
    role.transferred([BlockArrived(transfer, 0, bytes(16)), ended(transfer, "aborted")])
    assert not bench.loop.named("fill")
    assert not bench.loop.named("ready")
    assert role.num_jobs == 0
