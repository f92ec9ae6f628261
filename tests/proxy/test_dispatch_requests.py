"""Requests through the dispatcher, over real sockets, with workers that the test plays."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from mesh import blockhash
from mesh.errors import RequestError
from mesh.messages import Abort, BlockEvents, Decode, Goodbye, KvHolder, Peer, Prefill, PrefillReport
from proxy.routing.admission import RETRY_FLOOR
from tests.proxy.fake_worker import LAYOUT, FakeWorker, collect, request, running, tokens_of

REPORT = PrefillReport(0, 2, 1, 0.0, 0.0, 0.0, 0, 0, 2)


def test_a_prompt_is_computed_and_decoded_by_one_worker(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            decode = await mesh.worker("d0", "decode")
            generation = mesh.dispatcher.submit(request(seed=5))
            job = await decode.expect(Decode)
            assert (job.request_id, job.attempt, job.tokens, job.num_prompt_tokens) == ("r", 1, (1, 2, 3), 3)
            assert (job.source, job.holders, job.params.seed) == (None, (), 5)
            assert 59 < job.deadline_s <= 60
            decode.tokens(job, 0, [7], report=REPORT)
            decode.tokens(job, 1, [8, 9], finish="stop")
            assert await tokens_of(generation) == [7, 8, 9]
            assert generation.route.decode == "d0"
            assert generation.route.prefill is None
            assert generation.route.cached_tokens == 2
            assert mesh.dispatcher.live == 0

    asyncio.run(scenario())


def test_a_long_prompt_goes_through_both_pools(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            prefill = await mesh.worker("p0", "prefill")
            decode = await mesh.worker("d0", "decode")
            generation = mesh.dispatcher.submit(request(tokens=range(50)))
            first, second = await prefill.expect(Prefill), await decode.expect(Decode)
            assert (first.holders, second.holders) == ((), ())
            assert second.source is not None
            assert second.source.worker_id == "p0"
            assert second.source.kv_address == prefill.info.kv_address
            same = ("request_id", "attempt", "tokens", "num_prompt_tokens", "params", "hash_root")
            assert all(getattr(first, name) == getattr(second, name) for name in same)
            assert first.hash_root == blockhash.root(b"digest")
            prefill.tokens(first, 0, [7])
            decode.tokens(second, 0, [7])
            decode.tokens(second, 1, [8], finish="length")
            assert await tokens_of(generation) == [7, 8]
            assert generation.route.prefill == "p0"

    asyncio.run(scenario())


def peer(worker: FakeWorker) -> Peer:
    info = worker.info
    return Peer(info.worker_id, info.incarnation, info.kv_address, info.host, info.layout, info.kv)


def test_a_prefill_worker_hears_what_the_decode_worker_has_of_the_turns_before(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            prefill = await mesh.worker("p0", "prefill")
            decode = await mesh.worker("d0", "decode")
            tokens, root = tuple(range(2000)), blockhash.root(b"digest")
            held = blockhash.chain(root, tokens, LAYOUT.block_tokens)[:300]
            decode.send(BlockEvents(1, True, tuple(held), ()))
            await mesh.until(lambda: len(mesh.index) == 300)
            mesh.dispatcher.submit(request(tokens=tokens))
            first = await prefill.expect(Prefill)
            assert first.holders == (KvHolder(peer(decode), 300 * LAYOUT.block_tokens, 0),)
            second = await decode.expect(Decode)
            assert second.source is not None
            assert (second.source.worker_id, second.holders) == ("p0", ())

    asyncio.run(scenario())


def test_both_workers_hear_who_else_has_the_prompts_beginning(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            prefill = await mesh.worker("p0", "prefill")
            full = await mesh.worker("d1", "decode", max_num_seqs=0)
            decode = await mesh.worker("d0", "decode", total_blocks=1000)
            tokens, root = tuple(range(2000)), blockhash.root(b"digest")
            held = blockhash.chain(root, tokens, LAYOUT.block_tokens)[:300]
            full.send(BlockEvents(1, True, tuple(held), ()))
            await mesh.until(lambda: len(mesh.index) == 300)
            mesh.dispatcher.submit(request(tokens=tokens))
            told = (KvHolder(peer(full), 300 * LAYOUT.block_tokens, 0),)
            assert (await prefill.expect(Prefill)).holders == told
            assert (await decode.expect(Decode)).holders == told

    asyncio.run(scenario())


def test_workers_of_unequal_block_sizes_are_each_asked_in_their_own(tmp_path: Path) -> None:
    """What the prefill worker has in blocks of 16 and the decode worker in blocks of 4 is compared in tokens."""

    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            large = replace(LAYOUT, block_tokens=16, dtype="bfloat16")
            prefill = await mesh.worker("p0", "prefill", layout=large)
            decode = await mesh.worker("d0", "decode")
            tokens, root = tuple(range(2000)), blockhash.root(b"digest")
            prefill.send(BlockEvents(1, True, tuple(blockhash.chain(root, tokens, 16)[:50]), ()))
            decode.send(BlockEvents(1, True, tuple(blockhash.chain(root, tokens, 4)[:300]), ()))
            await mesh.until(lambda: len(mesh.index) == 350)
            mesh.dispatcher.submit(request(tokens=tokens))
            first, second = await prefill.expect(Prefill), await decode.expect(Decode)
            ((holder, has),) = [(h.peer, h.tokens) for h in first.holders]
            assert (holder.layout, has) == (LAYOUT, 1200)
            assert second.source is not None
            assert second.source.layout == large
            decode.send(BlockEvents(2, True, (), ()))
            prefill.send(BlockEvents(2, True, tuple(blockhash.chain(root, tokens, 16)[:100]), ()))
            await mesh.until(lambda: len(mesh.index) == 100)
            mesh.dispatcher.submit(request("b", tokens=tokens))
            assert (await prefill.expect(Prefill)).holders == (), "it has 1600 tokens, the other none"

    asyncio.run(scenario())


def test_a_salt_separates_the_blocks(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            decode = await mesh.worker("d0", "decode")
            mesh.dispatcher.submit(replace(request(), cache_salt="mine"))
            assert (await decode.expect(Decode)).hash_root == blockhash.root(b"digest", salt="mine")

    asyncio.run(scenario())


def test_a_lost_decode_worker_is_replaced_mid_stream(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            workers = {w: await mesh.worker(w, "decode") for w in ("d0", "d1")}
            generation = mesh.dispatcher.submit(request())
            job = await workers["d0"].expect(Decode)
            workers["d0"].tokens(job, 0, [7])
            workers["d0"].tokens(job, 1, [8])
            workers["d0"].send(Goodbye("killed"))
            again = await workers["d1"].expect(Decode)
            assert (again.attempt, again.tokens, again.num_prompt_tokens) == (2, (1, 2, 3, 7, 8), 3)
            workers["d1"].tokens(again, 2, [9], finish="stop")
            assert await tokens_of(generation) == [7, 8, 9]
            assert generation.route.attempts == 2
            assert mesh.dispatcher.retries == {"lost": 1}

    asyncio.run(scenario())


def test_a_lost_prefill_worker_is_replaced_before_the_decode_worker_runs(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, disaggregate_above=1) as mesh:
            prefills = {w: await mesh.worker(w, "prefill") for w in ("p0", "p1")}
            decode = await mesh.worker("d0", "decode")
            mesh.dispatcher.submit(request())
            job = await decode.expect(Decode)
            assert job.source is not None
            prefills[job.source.worker_id].send(Goodbye("killed"))
            assert await decode.expect(Abort) == Abort("r", 1, "lost")
            again = await decode.expect(Decode)
            assert again.attempt == 2
            assert again.source is not None
            assert again.source.worker_id != job.source.worker_id
            assert (await prefills[again.source.worker_id].expect(Prefill)).attempt in (1, 2)

    asyncio.run(scenario())


def test_a_refusing_worker_is_asked_again_only_after_the_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            workers = {w: await mesh.worker(w, "decode") for w in ("d0", "d1")}
            generation = mesh.dispatcher.submit(request())
            workers["d0"].refuse(await workers["d0"].expect(Decode), "no_memory")
            workers["d1"].refuse(await workers["d1"].expect(Decode), "no_memory")
            await mesh.until(lambda: mesh.dispatcher.waiting == 1)
            mesh.clock.now += 5
            workers["d0"].beat()
            workers["d1"].beat()
            job = await workers["d0"].expect(Decode)
            assert job.attempt == 3
            workers["d0"].tokens(job, 0, [7], finish="stop")
            assert await tokens_of(generation) == [7]

    asyncio.run(scenario())


def test_the_retry_budget_delays_and_does_not_fail(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            second: list[str] = []
            for name in ("d0", "d1"):
                refuse_first_attempts(await mesh.worker(name, "decode", step_bound_s=60.0), second)
            for i in range(8):
                mesh.dispatcher.submit(request(f"r{i}"))
            allowed = RETRY_FLOOR + 1  # and a tenth of eight
            await mesh.until(lambda: len(second) == allowed and mesh.dispatcher.waiting == 8 - allowed)
            mesh.clock.now += 11
            await mesh.until(lambda: len(second) > allowed)
            assert mesh.dispatcher.live == 8

    asyncio.run(scenario())


def test_what_a_worker_hands_back_when_it_leaves_is_not_held_by_the_retry_budget(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            leaving = await mesh.worker("d0", "decode", step_bound_s=60.0)
            for i in range(8):
                mesh.dispatcher.submit(request(f"r{i}"))
            jobs = [await leaving.expect(Decode) for _ in range(8)]
            other = await mesh.worker("d1", "decode", step_bound_s=60.0)
            for job in jobs:
                leaving.refuse(job, "draining")
            assert {(await other.expect(Decode)).request_id for _ in jobs} == {f"r{i}" for i in range(8)}

    asyncio.run(scenario())


def refuse_first_attempts(worker: FakeWorker, others: list[str]) -> None:
    def answer(message: object) -> None:
        if isinstance(message, Decode) and message.attempt == 1:
            worker.refuse(message, "no_memory")
        elif isinstance(message, Decode):
            others.append(message.request_id)

    worker.answer = answer


def test_a_stopped_choice_is_aborted_at_both_workers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, disaggregate_above=0) as mesh:
            prefill, decode = await mesh.worker("p0", "prefill"), await mesh.worker("d0", "decode")
            generation = mesh.dispatcher.submit(request())
            await decode.expect(Decode)
            generation.stop(0)
            assert await prefill.expect(Abort) == Abort("r", 1, "stop")
            assert await decode.expect(Abort) == Abort("r", 1, "stop")
            assert [b async for b in generation] == []

    asyncio.run(scenario())


def test_a_reader_that_leaves_ends_the_request(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            decode = await mesh.worker("d0", "decode")
            generation = mesh.dispatcher.submit(request())
            job = await decode.expect(Decode)
            decode.tokens(job, 0, [7])
            chunks = generation.__aiter__()
            assert (await anext(chunks))[0].tokens == (7,)
            await chunks.aclose()  # type: ignore[attr-defined]
            assert (await decode.expect(Abort)).attempt == 1
            generation.abort("again")
            assert mesh.dispatcher.live == 0

    asyncio.run(scenario())


def test_choices_share_a_decode_worker_and_differ_in_their_number(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, disaggregate_above=0) as mesh:
            await mesh.worker("p0", "prefill")
            workers = {w: await mesh.worker(w, "decode") for w in ("d0", "d1")}
            generation = mesh.dispatcher.submit(request(n=3))
            jobs = [await workers["d0"].expect(Decode) for _ in range(3)]
            assert [j.request_id for j in jobs] == ["r.0", "r.1", "r.2"]
            assert [j.params.choice for j in jobs] == [0, 1, 2]
            assert [j.source is not None for j in jobs] == [True, False, False]
            for number, job in reversed(list(enumerate(jobs))):
                workers["d0"].tokens(job, 0, [number], finish="stop")
            chunks = await collect(generation)
            assert {c: [k.tokens for k in v] for c, v in chunks.items()} == {0: [(0,)], 1: [(1,)], 2: [(2,)]}

    asyncio.run(scenario())


def test_one_choice_that_fails_ends_the_others(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            decode = await mesh.worker("d0", "decode")
            generation = mesh.dispatcher.submit(request(n=2))
            first, second = await decode.expect(Decode), await decode.expect(Decode)
            decode.refuse(second, "internal", retryable=False)
            assert (await decode.expect(Abort)).request_id in (first.request_id, second.request_id)
            with pytest.raises(RequestError) as failure:
                await collect(generation)
            assert failure.value.status == 500
            assert mesh.dispatcher.live == 0

    asyncio.run(scenario())


def test_prompt_logprobs_are_asked_of_the_decode_worker_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, disaggregate_above=0) as mesh:
            await mesh.worker("p0", "prefill")
            workers = {w: await mesh.worker(w, "decode") for w in ("d0", "d1")}
            generation = mesh.dispatcher.submit(request(prompt_logprobs=1))
            job = await workers["d0"].expect(Decode)
            assert job.source is None
            workers["d0"].tokens(job, 0, [7], prompt_logprobs=(None,))
            assert (await anext(generation.__aiter__()))[0].prompt_logprobs == (None,)

    asyncio.run(scenario())


def test_a_resumed_request_does_not_ask_for_prompt_logprobs_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            workers = {w: await mesh.worker(w, "decode") for w in ("d0", "d1")}
            mesh.dispatcher.submit(request(prompt_logprobs=1))
            job = await workers["d0"].expect(Decode)
            assert job.params.prompt_logprobs == 1
            workers["d0"].tokens(job, 0, [7])
            workers["d0"].send(Goodbye("killed"))
            assert (await workers["d1"].expect(Decode)).params.prompt_logprobs is None

    asyncio.run(scenario())


def test_a_request_goes_where_its_prefix_is(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            workers = {w: await mesh.worker(w, "decode") for w in ("d0", "d1")}
            tokens = tuple(range(40))
            held = blockhash.chain(blockhash.root(b"digest"), tokens, LAYOUT.block_tokens)
            workers["d1"].send(BlockEvents(1, True, tuple(held[:5]), ()))
            await mesh.until(lambda: len(mesh.index) == 5)
            mesh.dispatcher.submit(request("a", tokens))
            assert (await workers["d1"].expect(Decode)).request_id == "a"
            workers["d1"].send(BlockEvents(2, False, (), tuple(held[:5])))
            await mesh.until(lambda: len(mesh.index) == 0)
            mesh.dispatcher.submit(request("b", tokens))
            assert (await workers["d0"].expect(Decode)).request_id == "b"

    asyncio.run(scenario())


def test_without_workers_a_request_is_refused_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            with pytest.raises(RequestError) as failure:
                mesh.dispatcher.submit(request())
            assert (failure.value.status, failure.value.code) == (503, "no_workers")
            assert failure.value.retry_after is not None
            await mesh.worker("p0", "prefill")
            with pytest.raises(RequestError, match="No worker"):
                mesh.dispatcher.submit(request(n=2))
            assert mesh.dispatcher.live == 0
            assert not mesh.dispatcher.ready

    asyncio.run(scenario())


def test_a_request_waits_for_a_worker_that_was_just_lost(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            first = await mesh.worker("d0", "decode")
            first.send(Goodbye("restart"))
            await mesh.until(lambda: not mesh.dispatcher.ready)
            generation = mesh.dispatcher.submit(request())
            assert mesh.dispatcher.waiting == 1
            second = await mesh.worker("d0", "decode", incarnation=2)
            job = await second.expect(Decode)
            second.tokens(job, 0, [7], finish="stop")
            assert await tokens_of(generation) == [7]

    asyncio.run(scenario())


def test_a_reader_that_leaves_while_no_worker_is_there_leaves_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, max_requests=1) as mesh:
            (await mesh.worker("d0", "decode")).send(Goodbye("restart"))
            await mesh.until(lambda: not mesh.dispatcher.ready)
            generation = mesh.dispatcher.submit(request(n=2))
            assert mesh.dispatcher.waiting == 2
            generation.abort("the client is gone")
            assert (mesh.dispatcher.live, mesh.dispatcher.waiting) == (0, 0)
            mesh.dispatcher.submit(request("next"))  # its place is free

    asyncio.run(scenario())


def test_a_stream_ends_with_an_error_when_no_worker_comes_back(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            decode = await mesh.worker("d0", "decode")
            generation = mesh.dispatcher.submit(request())
            decode.tokens(await decode.expect(Decode), 0, [7])
            decode.send(Goodbye("killed"))
            await mesh.until(lambda: mesh.dispatcher.waiting == 1)
            mesh.clock.now += 31
            chunks = generation.__aiter__()
            assert (await anext(chunks))[0].tokens == (7,)
            with pytest.raises(RequestError) as failure:
                await anext(chunks)
            assert failure.value.code == "worker_lost"

    asyncio.run(scenario())


def test_a_request_ends_at_its_deadline(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            decode = await mesh.worker("d0", "decode", step_bound_s=60.0)
            generation = mesh.dispatcher.submit(request(deadline_s=20.0))
            await decode.expect(Decode)
            mesh.clock.now += 20
            with pytest.raises(RequestError) as failure:
                await collect(generation)
            assert (failure.value.status, failure.value.code) == (504, "timeout")
            assert (await decode.expect(Abort)).reason == "deadline"

    asyncio.run(scenario())


def test_the_number_of_requests_is_bounded(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path, max_requests=2) as mesh:
            await mesh.worker("d0", "decode")
            first = mesh.dispatcher.submit(request("a", n=2))
            mesh.dispatcher.submit(request("b"))
            with pytest.raises(RequestError) as failure:
                mesh.dispatcher.submit(request("c"))
            assert (failure.value.code, failure.value.retry_after) == ("overloaded", 1)
            first.abort("gone")
            mesh.dispatcher.submit(request("c"))

    asyncio.run(scenario())


def test_a_draining_proxy_takes_nothing_new_and_ends_the_rest_with_an_error(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            await mesh.worker("d0", "decode")
            generation = mesh.dispatcher.submit(request())
            mesh.dispatcher.drain()
            with pytest.raises(RequestError, match="shutting down"):
                mesh.dispatcher.submit(request("b"))
            assert not mesh.dispatcher.ready
            mesh.dispatcher.close()
            with pytest.raises(RequestError, match="shutting down"):
                await collect(generation)

    asyncio.run(scenario())


def test_a_worker_that_still_works_on_what_is_over_is_told(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            decode = await mesh.worker("d0", "decode")
            generation = mesh.dispatcher.submit(request())
            job = await decode.expect(Decode)
            generation.abort("gone")
            assert (await decode.expect(Abort)).reason == "gone"
            decode.tokens(job, 0, [7])
            assert await decode.expect(Abort) == Abort("r", 1, "stale")

    asyncio.run(scenario())


def test_a_draining_worker_gets_no_new_requests(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            workers = {w: await mesh.worker(w, "decode") for w in ("d0", "d1")}
            workers["d0"].beat(draining=True)
            await mesh.until(lambda: len(mesh.fleet.pool.routable()) == 1)
            mesh.dispatcher.submit(request())
            assert (await workers["d1"].expect(Decode)).request_id == "r"

    asyncio.run(scenario())


def test_a_worker_that_says_it_is_draining_is_not_asked_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            workers = {w: await mesh.worker(w, "decode") for w in ("d0", "d1")}
            mesh.dispatcher.submit(request("a"))
            workers["d0"].refuse(await workers["d0"].expect(Decode), "draining")
            assert (await workers["d1"].expect(Decode)).attempt == 2
            mesh.dispatcher.submit(request("b"))
            assert (await workers["d1"].expect(Decode)).request_id == "b"
            assert await workers["d0"].expect(Abort) == Abort("a", 1, "lost")
            assert not workers["d0"].inbox

    asyncio.run(scenario())


def test_requests_spread_before_the_first_beat_counts_them(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            workers = [await mesh.worker(w, "decode") for w in ("d0", "d1", "d2")]
            for i in range(6):
                mesh.dispatcher.submit(request(f"r{i}", tokens=range(10)))
            for worker in workers:
                await worker.expect(Decode)
                await worker.expect(Decode)
                assert worker.inbox == []

    asyncio.run(scenario())


def test_of_those_without_a_worker_the_urgent_one_is_asked_for_first(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            first = await mesh.worker("both-0", "both")
            urgency = {"calm": 3, "urgent": -1, "usual": 0, "usual too": 0}
            for name, priority in urgency.items():
                mesh.dispatcher.submit(request(name, priority=priority))
            for _ in urgency:
                await first.expect(Decode)
            first.send(Goodbye("restart"))
            await mesh.until(lambda: mesh.dispatcher.waiting == len(urgency))
            second = await mesh.worker("both-0", "both", incarnation=2)
            second.beat()
            order = [(await second.expect(Decode)).request_id for _ in urgency]
            assert order == ["urgent", "usual", "usual too", "calm"]

    asyncio.run(scenario())
