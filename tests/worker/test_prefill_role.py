"""What the prefill role does with its streams."""

from __future__ import annotations

from engine.request import EngineRequest
from engine.step import StepOutput, TokenOut
from kvtransfer.endpoint import StreamReleased
from mesh.messages import Abort, TokenBatch
from mesh.params import SamplingParams
from prefill.role import PrefillRole
from tests.worker.role_fakes import Bench, decode_message, prefill_message
from worker.firsttoken import FirstToken
from worker.steploop import Stepped

KEY = "r#1"


def started(bench: Bench) -> PrefillRole:
    role = PrefillRole(bench.parts)
    role.assign(bench.proxy, prefill_message())
    return role


def stepped(finish: str) -> Stepped:
    request = EngineRequest(KEY, list(range(11)), 10, SamplingParams(max_tokens=8), b"root")
    return Stepped(StepOutput((TokenOut(request, 0, 5, None, finish),), (), (), (), 10), 0.1, ())


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
    role.exported_all(stepped("handoff"))
    assert bench.kv.named("close_stream") == [(KEY,)]


def test_a_stream_whose_first_token_is_the_last_is_released_at_once() -> None:
    bench = Bench()
    role = started(bench)
    role.stepped(stepped("length"))
    role.exported_all(stepped("length"))
    assert bench.kv.named("release_stream") == [(KEY,)]
    assert not role.busy


def test_a_released_stream_frees_the_blocks() -> None:
    bench = Bench()
    role = started(bench)
    role.stepped(stepped("handoff"))
    role.transferred([StreamReleased(KEY, "confirmed")])
    assert bench.loop.named("release") == [(KEY,)]
    assert not role.busy


def test_a_stream_that_is_given_up_while_it_is_computed_ends_the_work() -> None:
    bench = Bench()
    role = started(bench)
    role.transferred([StreamReleased(KEY, "peer_lost")])
    assert bench.loop.named("abort") == [(KEY,)]
    assert not role.busy


def test_an_abort_frees_everything() -> None:
    bench = Bench()
    role = started(bench)
    role.abort(Abort("r", 1, "client gone"))
    assert bench.loop.named("abort") == [(KEY,)]
    assert bench.kv.named("release_stream") == [(KEY,)]
    assert not role.busy


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
    assert not role.busy
