"""What the decode role does with blocks, notes, losses and deadlines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from decode.role import DecodeRole
from engine.request import EngineRequest
from engine.step import Missing, StepOutput, TokenOut
from kvtransfer.endpoint import BlockArrived, FetchEnded, Noted
from mesh.messages import Abort, KvHolder, Peer, Refused
from mesh.params import SamplingParams
from tests.worker.role_fakes import DECODE, LAYOUT, OTHER, SOURCE, Bench, decode_message
from worker.firsttoken import FirstToken
from worker.steploop import Expected, Rejected, Stepped

KEY = "r#1"
BLOCKS = tuple(Missing(i, bytes([i]) * 16, 4 if i < 2 else 2) for i in range(3))

HOLDERS = (KvHolder(DECODE, 4, 0), KvHolder(OTHER, 8, 3))


def fetching(bench: Bench, limit: int = 4) -> tuple[DecodeRole, bytes]:
    """A role whose request of 10 tokens lacks all three blocks, and its transfer id."""
    role = DecodeRole(bench.parts)
    role.assign(bench.proxy, decode_message(limit=limit))
    role.expected(Expected(KEY, BLOCKS))
    return role, bench.kv.named("gather")[0][0]


def ended(transfer_id: bytes, outcome: str = "ok") -> FetchEnded:
    return FetchEnded(transfer_id, (), outcome, 0, 0.1, 0, "")


def test_without_a_source_the_engine_computes_the_prompt() -> None:
    bench = Bench()
    DecodeRole(bench.parts).assign(bench.proxy, decode_message(source=None))
    assert [request.key for (request,) in bench.loop.named("add")] == [KEY]


def test_a_fetch_goes_to_the_source_and_to_the_holders() -> None:
    bench = Bench()
    role = DecodeRole(bench.parts)
    role.assign(bench.proxy, decode_message(holders=HOLDERS))
    role.expected(Expected(KEY, BLOCKS))
    ((_, attempt, maker, stream, holders, wanted, left),) = bench.kv.named("gather")
    assert (attempt, maker, stream, holders, left) == (1, SOURCE, KEY, HOLDERS, 60.0)
    assert [(w.index, w.name, w.valid_tokens) for w in wanted] == [(m.index, m.hash, m.valid_tokens) for m in BLOCKS]


def test_without_a_source_holders_are_fetched_from_and_need_not_have_all() -> None:
    bench = Bench()
    role = DecodeRole(bench.parts)
    role.assign(bench.proxy, decode_message(source=None, holders=HOLDERS, limit=10))
    role.expected(Expected(KEY, BLOCKS))
    ((transfer, _, maker, stream, holders, *_),) = bench.kv.named("gather")
    assert (maker, stream, holders) == (None, "", HOLDERS)
    role.transferred([BlockArrived(transfer, 0, bytes(16)), ended(transfer)])
    assert bench.loop.named("ready") == [(KEY, ())]
    assert bench.counted("kvmesh_recomputed_tokens_total") == 0


def test_without_a_source_a_fully_cached_prompt_fetches_nothing() -> None:
    bench = Bench()
    role = DecodeRole(bench.parts)
    role.assign(bench.proxy, decode_message(source=None, holders=HOLDERS))
    role.expected(Expected(KEY, ()))
    assert bench.kv.named("gather") == []
    assert bench.loop.named("ready") == [(KEY, ())]


def test_arrived_blocks_and_the_noted_token_start_the_request() -> None:
    bench = Bench()
    role, transfer = fetching(bench)
    blocks = [BlockArrived(transfer, i, bytes(16)) for i in range(3)]
    role.transferred([Noted(transfer, FirstToken(0, 42, None).pack()), *blocks, ended(transfer)])
    assert [call[1] for call in bench.loop.named("fill")] == [0, 1, 2]
    assert bench.loop.named("ready") == [(KEY, (42,))]


def test_a_note_about_another_token_is_not_used() -> None:
    bench = Bench()
    role, transfer = fetching(bench)
    blocks = [BlockArrived(transfer, i, bytes(16)) for i in range(3)]
    role.transferred([Noted(transfer, FirstToken(3, 42, None).pack()), *blocks, ended(transfer)])
    assert bench.loop.named("ready") == [(KEY, ())]


def test_a_noted_token_that_fills_the_context_here_is_generated_again() -> None:
    bench = Bench()
    role = DecodeRole(bench.parts)
    role.assign(bench.proxy, decode_message(tokens=bench.parts.max_model_len - 1))
    role.expected(Expected(KEY, BLOCKS))
    transfer = bench.kv.named("gather")[0][0]
    blocks = [BlockArrived(transfer, i, bytes(16)) for i in range(3)]
    role.transferred([Noted(transfer, FirstToken(0, 42, None).pack()), *blocks, ended(transfer)])
    assert bench.loop.named("ready") == [(KEY, ())]


def test_a_note_that_is_garbage_is_dropped() -> None:
    bench = Bench()
    role, transfer = fetching(bench, limit=10)
    role.transferred([Noted(transfer, b"\xff garbage"), ended(transfer)])
    assert bench.loop.named("ready") == [(KEY, ())]


def test_a_short_remainder_is_computed_here() -> None:
    bench = Bench()
    role, transfer = fetching(bench, limit=2)
    role.transferred([BlockArrived(transfer, i, bytes(16)) for i in range(2)])
    role.transferred([ended(transfer, "timeout")])
    assert bench.loop.named("ready") == [(KEY, ())]
    assert bench.counted("kvmesh_recomputed_tokens_total") == 2


def test_a_long_remainder_is_handed_back() -> None:
    bench = Bench()
    role, transfer = fetching(bench, limit=5)
    role.transferred([BlockArrived(transfer, 0, bytes(16)), ended(transfer, "peer_lost")])
    (refusal,) = bench.link.sent
    assert (refusal.code, refusal.retryable) == ("blocks_missing", True)
    assert bench.loop.named("abort") == [(KEY,)]
    assert role.num_jobs == 0


@pytest.mark.parametrize(
    ("their_size", "came", "owed"),
    [(2, {0, 1, 2}, 6), (2, {0, 1, 2, 3}, 2), (2, {0, 2, 3, 4}, 10), (8, {0}, 2), (8, {1}, 10), (8, {0, 1}, 0)],
)
def test_what_is_owed_is_counted_in_blocks_that_are_whole_here(their_size: int, came: set[int], owed: int) -> None:
    """Of 10 tokens in blocks of 4, from a worker with smaller or larger ones."""
    bench = Bench()
    role = DecodeRole(bench.parts)
    layout = replace(LAYOUT, block_tokens=their_size)
    role.assign(bench.proxy, decode_message(source=replace(SOURCE, layout=layout), limit=max(0, owed - 1)))
    assert [theirs for _, theirs in bench.loop.named("expect")] == [layout]
    count = -(-10 // their_size)
    role.expected(Expected(KEY, tuple(Missing(i, bytes([i]) * 16, their_size) for i in range(count))))
    transfer = bench.kv.named("gather")[0][0]
    role.transferred([*(BlockArrived(transfer, i, b"block") for i in sorted(came)), ended(transfer)])
    assert bench.loop.named("fill") == [(KEY, i, b"block", layout) for i in sorted(came)]
    if owed:
        assert bench.link.sent[0].message.startswith(f"{owed} tokens")
    else:
        assert bench.loop.named("ready") == [(KEY, ())]


def test_blocks_that_cannot_be_converted_are_not_expected_in_their_form() -> None:
    """The fetch is refused and the prompt computed."""
    bench = Bench()
    strange = replace(SOURCE, layout=replace(LAYOUT, block_tokens=0))
    DecodeRole(bench.parts).assign(bench.proxy, decode_message(source=strange))
    assert [theirs for _, theirs in bench.loop.named("expect")] == [None]


def test_a_finish_at_the_prefill_worker_ends_the_request_here() -> None:
    bench = Bench()
    role, transfer = fetching(bench)
    role.transferred([Noted(transfer, FirstToken(0, 42, "stop").pack())])
    assert role.num_jobs == 0
    assert bench.link.sent == []
    assert bench.loop.named("abort") == [(KEY,)]


def test_a_repeated_or_older_assignment_changes_nothing() -> None:
    bench = Bench()
    role, _ = fetching(bench)
    role.assign(bench.proxy, decode_message())
    role.assign(bench.proxy, decode_message(attempt=0))
    assert len(bench.loop.named("expect")) == 1


def test_a_newer_attempt_replaces_the_older_one() -> None:
    bench = Bench()
    role, transfer = fetching(bench)
    role.assign(bench.proxy, decode_message(attempt=2))
    assert bench.kv.named("abort_fetch") == [(transfer,)]
    assert [request.key for (request, _) in bench.loop.named("expect")] == [KEY, "r#2"]


def test_an_abort_of_an_older_attempt_does_not_touch_the_newer() -> None:
    bench = Bench()
    role = DecodeRole(bench.parts)
    role.assign(bench.proxy, decode_message(attempt=2))
    role.abort(Abort("r", 1, "late"))
    assert role.num_jobs


def test_an_abort_ends_the_fetch_and_the_request() -> None:
    bench = Bench()
    role, transfer = fetching(bench)
    role.abort(Abort("r", 1, "client gone"))
    assert bench.kv.named("abort_fetch") == [(transfer,)]
    assert bench.loop.named("abort") == [(KEY,)]
    assert role.num_jobs == 0


def test_what_arrives_after_the_end_is_ignored() -> None:
    bench = Bench()
    role, transfer = fetching(bench)
    role.abort(Abort("r", 1, "client gone"))
    role.transferred([BlockArrived(transfer, 0, bytes(16)), ended(transfer)])
    assert bench.loop.named("fill") == []


def test_a_deadline_ends_the_request_with_a_refusal() -> None:
    bench = Bench()
    role, _ = fetching(bench)
    role.tick(bench.clock.now + 59)
    assert role.num_jobs
    role.tick(bench.clock.now + 60)
    assert [m.code for m in bench.link.sent] == ["deadline"]
    assert role.num_jobs == 0


def test_a_lost_proxy_frees_its_requests_only() -> None:
    bench, other = Bench(), Bench()
    role, _ = fetching(bench)
    role.lost(other.proxy)
    assert role.num_jobs
    role.lost(bench.proxy)
    assert role.num_jobs == 0


def test_draining_hands_every_request_back() -> None:
    bench = Bench()
    role, _ = fetching(bench)
    role.hand_back()
    assert [m for m in bench.link.sent if isinstance(m, Refused) and m.code == "draining" and m.retryable]
    assert role.num_jobs == 0


def test_what_the_engine_cannot_fit_is_refused() -> None:
    bench = Bench()
    role, _ = fetching(bench)
    role.rejected(Rejected(KEY, "no_memory", "too big"))
    assert [m.code for m in bench.link.sent] == ["no_memory"]
    assert bench.counted("kvmesh_refused_requests_total", code="no_memory") == 1


@pytest.mark.parametrize(("source", "reused"), [(SOURCE, 2), (None, 8)])
def test_what_was_computed_for_the_request_elsewhere_is_not_reused(source: Peer | None, reused: int) -> None:
    bench = Bench()
    role = DecodeRole(bench.parts)
    role.assign(bench.proxy, decode_message(source=source, holders=HOLDERS))
    request = EngineRequest(KEY, list(range(11)), 10, SamplingParams(max_tokens=8), b"root")
    request.num_cached_tokens, request.num_fetched_tokens = 2, 6
    role.stepped(Stepped(StepOutput((TokenOut(request, 0, 5, None, None),), (), (), (), 10), 0.1))
    bench.replies.flush()
    report = bench.link.sent[0].deltas[0].report
    assert (report.cached_tokens, report.fetched_tokens, report.reused_tokens) == (2, 6, reused)


def test_a_fully_cached_prompt_starts_at_once_and_still_frees_its_holder() -> None:
    bench = Bench()
    role = DecodeRole(bench.parts)
    role.assign(bench.proxy, decode_message())
    role.expected(Expected(KEY, ()))
    (transfer, *_), *_ = bench.kv.named("gather")
    role.transferred([ended(transfer)])
    assert bench.loop.named("ready") == [(KEY, ())]
