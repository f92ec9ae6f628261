"""The control socket: who is who, and how a worker's end is noticed."""

from __future__ import annotations

import asyncio
import logging
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import zmq

from mesh import wire
from mesh.errors import EXIT_PORT, EXIT_USAGE, RequestError, StartupError
from mesh.messages import (
    Abort,
    Decode,
    Goodbye,
    OtherVersions,
    Prefill,
    ProxyBeat,
    Register,
    TokenBatch,
    TokenDelta,
    Welcome,
    WorkerInfo,
)
from mesh.wire import CONTROL, Versions
from proxy.control import LEASE_S
from proxy.routing.place import Place
from proxy.routing.pool import BEAT_TIMEOUT_S, REVIVE_AFTER_S
from tests.proxy.fake_worker import LAYOUT, FakeWorker, Mesh, info, request, running, tokens_of


def test_a_worker_registers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            assert mesh.dispatcher.model is None
            worker = mesh.dial(info("d0", "decode"))
            assert await worker.register() == Welcome("proxy-0", LEASE_S)
            assert mesh.dispatcher.ready
            assert mesh.dispatcher.model is not None
            assert mesh.dispatcher.model.max_model_len == 256

    asyncio.run(scenario())


def test_registered_workers_hear_the_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.control.BEAT_S", 0.01)

    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            worker = await mesh.worker("d0", "decode")
            heard: list[object] = []
            worker.answer = heard.append
            await mesh.until(lambda: len(heard) >= 2)
            assert heard[0] == ProxyBeat("proxy-0")

    asyncio.run(scenario())


def test_garbage_is_counted_and_disturbs_nobody(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            worker = await mesh.worker("d0", "decode")
            rng = random.Random(0)
            for size in range(200):
                worker.send_raw(rng.randbytes(size))
            worker.send_raw(b"one", b"two")
            await mesh.until(lambda: mesh.control.bad_frames == 201)
            mesh.dispatcher.submit(request())
            assert (await worker.expect(Decode)).request_id == "r"

    asyncio.run(scenario())


def test_a_handler_that_fails_does_not_stop_the_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            worker = await mesh.worker("d0", "decode")
            monkeypatch.setattr(mesh.fleet.pool, "beat", lambda *_: 1 / 0)
            worker.beat()
            worker.send(Goodbye("after the failure"))
            await mesh.until(lambda: not mesh.dispatcher.ready)

    asyncio.run(scenario())


def test_messages_with_another_incarnation_are_dropped(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            worker = await mesh.worker("d0", "decode", incarnation=5)
            worker.send(Goodbye("not mine to say"), sender=4)
            await mesh.until(lambda: mesh.control.bad_frames == 1)
            assert mesh.dispatcher.ready

    asyncio.run(scenario())


def test_strangers_are_ignored(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            stranger = mesh.dial(info("d0", "decode"))
            stranger.beat()
            assert await stranger.register()
            assert mesh.control.bad_frames == 0

    asyncio.run(scenario())


def test_a_new_life_retires_the_old_one_at_once(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            old = await mesh.worker("d0", "decode", incarnation=1)
            generation = mesh.dispatcher.submit(request())
            job = await old.expect(Decode)
            old.tokens(job, 0, [7])
            await mesh.until(lambda: mesh.dispatcher.live == 1)
            new = await mesh.worker("d0", "decode", incarnation=2)
            again = await new.expect(Decode)
            old.tokens(job, 1, [6])
            new.tokens(again, len(again.tokens) - 3, [7, 8][len(again.tokens) - 3 :], finish="stop")
            assert await tokens_of(generation) == [7, 8]
            assert [w.place for w in mesh.fleet.pool.workers()] == [Place("d0", 2)]

    asyncio.run(scenario())


def test_an_old_life_cannot_come_back(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            await mesh.worker("d0", "decode", incarnation=2)
            zombie = mesh.dial(info("d0", "decode", incarnation=1))
            zombie.send(Register(zombie.info))
            zombie.send(Register(zombie.info))
            await mesh.until(lambda: "later life" in caplog.text)
            assert [w.place for w in mesh.fleet.pool.workers()] == [Place("d0", 2)]
            assert caplog.text.count("later life") == 1

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model_digest": b"other"}, "another model"),
        ({"layout": None}, "d1 cannot take KV blocks of d0: layers 2 -> 3"),
    ],
)
def test_a_worker_that_does_not_fit_the_others_is_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: dict[str, Any], sentence: str
) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            first = await mesh.worker("d0", "decode")
            if "layout" in change:
                change["layout"] = replace(first.info.layout, layers=3)
            other = mesh.dial(info("d1", "decode", **change))
            other.send(Register(other.info))
            await mesh.until(lambda: sentence in caplog.text)
            first.send(Goodbye("making room"))
            await mesh.until(lambda: not mesh.fleet.pool.workers())
            await other.register()

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())


def test_workers_that_can_convert_each_others_blocks_serve_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            first = await mesh.worker("d0", "decode")
            changes: list[dict[str, Any]] = [{"block_tokens": 16}, {"dtype": "bfloat16"}, {"tp": 2, "rank": 1}]
            for number, change in enumerate(changes):
                await mesh.worker(f"d{number + 1}", "decode", layout=replace(first.info.layout, **change))
            assert len(mesh.fleet.pool.workers()) == 4
            assert mesh.fleet.pool.block_sizes == (4, 16)
            assert mesh.fleet.pool.token_bytes == first.info.layout.token_bytes

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())
    assert "d2 converts KV blocks: dtype float32 -> bfloat16 (of d0)" in caplog.text


def test_a_layout_that_is_none_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            other = mesh.dial(info("d0", "decode"))
            other.send(Register(replace(other.info, layout=replace(other.info.layout, block_tokens=0))))
            await mesh.until(lambda: "block_tokens 0" in caplog.text)
            assert not mesh.fleet.pool.workers()

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())


BEFORE = CONTROL.highest - 1


async def of_the_version_before(mesh: Mesh, worker: WorkerInfo) -> FakeWorker:
    """A worker that knows nothing of the present version, registered."""
    old = mesh.dial(worker)
    old.send_raw(wire.encode(Register(worker), worker.incarnation, version=BEFORE))
    await old.expect(Welcome)
    return old


def test_a_worker_of_the_version_before_is_told_everything_in_its_version(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            old = await of_the_version_before(mesh, info("d0", "decode"))
            new = await mesh.worker("p0", "prefill")
            generation = mesh.dispatcher.submit(request(tokens=range(50)))
            job = await old.expect(Decode)
            assert job.source is not None
            assert (job.source.worker_id, job.source.layout) == ("p0", None), "it has never heard of a peer's layout"
            assert await new.expect(Prefill)
            assert (old.versions, new.versions) == ({BEFORE}, {CONTROL.highest})
            old.send_raw(
                wire.encode(TokenBatch((TokenDelta("r", 1, 0, (7,), (), "length", None, ()),)), 1, version=BEFORE)
            )
            assert await tokens_of(generation) == [7]

    asyncio.run(scenario())


@pytest.mark.parametrize("old_first", [True, False])
def test_a_worker_that_cannot_convert_serves_with_equal_ones_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, old_first: bool
) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            new = info("d1", "decode", layout=replace(LAYOUT, block_tokens=16))
            if old_first:
                await of_the_version_before(mesh, info("d0", "decode"))
                mesh.dial(new).send(Register(new))
            else:
                await mesh.worker("d1", "decode", layout=new.layout)
                old = info("d0", "decode")
                mesh.dial(old).send_raw(wire.encode(Register(old), old.incarnation, version=BEFORE))
            await mesh.until(lambda: "KV protocol 5 of" in caplog.text)
            assert "block_tokens is" in caplog.text
            assert len(mesh.fleet.pool.workers()) == 1

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())


def test_a_late_registration_in_a_lower_version_changes_nothing(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            worker = await mesh.worker("d0", "decode")
            worker.send_raw(wire.encode(Register(worker.info), worker.info.incarnation, version=BEFORE))
            await worker.expect(Welcome)
            assert worker.versions == {CONTROL.highest}

    asyncio.run(scenario())


def test_a_worker_without_a_common_version_is_told_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            future = mesh.dial(info("d0", "decode"))
            for _ in range(2):
                future.send_raw(msgpack.packb([9, 1, 1, 0, ["a body that nobody here knows"]]))
                assert (await future.expect(OtherVersions)).control == CONTROL
            assert caplog.text.count("control protocol 9; this process speaks 5 to 6") == 1
            assert not mesh.fleet.pool.workers()

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())


def test_workers_without_a_common_kv_protocol_do_not_serve_together(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            await mesh.worker("d0", "decode")
            other = info("d1", "decode", kv=Versions(7, 8))
            mesh.dial(other).send(Register(other))
            await mesh.until(lambda: "d1 speaks KV protocol 7 to 8 and d0 5 to 6" in caplog.text)

    with caplog.at_level(logging.WARNING):
        asyncio.run(scenario())


def test_a_killed_process_is_noticed_without_waiting_for_beats(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
                doomed = await mesh.worker("d0", "decode", host=Mesh.host, pid=process.pid)
                other = await mesh.worker("d1", "decode")
                mesh.dispatcher.submit(request())
                await doomed.expect(Decode)
                process.kill()
                assert (await other.expect(Decode)).attempt == 2

    asyncio.run(scenario())


def test_a_silent_step_loop_counts_as_dead_until_it_beats_again(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            paused = await mesh.worker("d0", "decode", step_bound_s=0.0)
            other = await mesh.worker("d1", "decode", step_bound_s=50.0)
            mesh.dispatcher.submit(request())
            await paused.expect(Decode)
            for _ in range(4):
                mesh.clock.now += (BEAT_TIMEOUT_S + 0.1) / 4
                mesh.fleet.tick()
            assert (await other.expect(Decode)).attempt == 2
            assert (await paused.expect(Abort)).attempt == 1
            mesh.clock.now += REVIVE_AFTER_S
            paused.beat()
            await mesh.until(lambda: len(mesh.fleet.pool.routable()) == 2)

    asyncio.run(scenario())


def test_a_proxy_that_stood_still_does_not_blame_its_workers(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            worker = await mesh.worker("d0", "decode", step_bound_s=0.0)
            generation = mesh.dispatcher.submit(request())
            job = await worker.expect(Decode)
            mesh.clock.now += BEAT_TIMEOUT_S + 5
            mesh.fleet.tick()
            worker.tokens(job, 0, [7], finish="stop")
            assert await tokens_of(generation) == [7]
            assert generation.route.attempts == 1

    asyncio.run(scenario())


def test_workers_that_fall_silent_together_cost_one_attempt(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            for name in ("d0", "d1", "d2", "d3", "d4"):
                await mesh.worker(name, "decode", step_bound_s=0.0)
            generation = mesh.dispatcher.submit(request())
            for _ in range(4):
                mesh.clock.now += (BEAT_TIMEOUT_S + 0.1) / 4
                mesh.fleet.tick()
            assert (mesh.dispatcher.waiting, generation.route.attempts) == (1, 1)

    asyncio.run(scenario())


def test_a_worker_that_registers_again_has_forgotten_its_requests(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            worker = await mesh.worker("d0", "decode")
            mesh.dispatcher.submit(request())
            await worker.expect(Decode)
            mesh.clock.now += 2
            await worker.register()
            assert (await worker.expect(Decode)).attempt == 2

    asyncio.run(scenario())


def test_a_repeated_introduction_means_nothing(tmp_path: Path) -> None:
    """A worker repeats `Register` until it is answered; its connection never broke."""

    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            worker = await mesh.worker("d0", "decode")
            generation = mesh.dispatcher.submit(request())
            job = await worker.expect(Decode)
            await worker.register()
            worker.tokens(job, 0, [7], finish="stop")
            assert await tokens_of(generation) == [7]
            assert generation.route.attempts == 1

    asyncio.run(scenario())


def test_a_worker_that_says_it_has_forgotten_is_believed_however_soon(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            worker = await mesh.worker("d0", "decode")
            mesh.dispatcher.submit(request())
            assert (await worker.expect(Decode)).attempt == 1
            await worker.register(forgotten=1)
            assert (await worker.expect(Decode)).attempt == 2

    asyncio.run(scenario())


def test_a_worker_that_reconnects_has_forgotten_its_requests_however_soon(tmp_path: Path) -> None:
    """The clock stands still: what the old connection swallowed is lost even right after the first `Register`."""

    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            before = await mesh.worker("d0", "decode")
            mesh.dispatcher.submit(request())
            assert (await before.expect(Decode)).attempt == 1
            after = await mesh.worker("d0", "decode")
            assert (await after.expect(Decode)).attempt == 2

    asyncio.run(scenario())


def test_a_connection_that_is_gone_moves_all_that_ran_there(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            gone = await mesh.worker("d0", "decode", step_bound_s=50.0)
            other = await mesh.worker("d1", "decode", step_bound_s=50.0)
            mesh.dispatcher.submit(request("running"))
            await gone.expect(Decode)
            gone.close()
            for i in range(1000):
                knocks = [mesh.dispatcher.submit(request(f"r{i}-{k}")) for k in range(2)]  # one for each worker
                for knock in knocks:
                    knock.abort("only knocking")
                if len(mesh.fleet.pool.routable()) == 1:
                    break
                await asyncio.sleep(0.001)
            seen = await other.expect(Decode)
            while seen.request_id != "running":
                seen = await other.expect(Decode)
            assert seen.attempt == 2

    asyncio.run(scenario())


@pytest.mark.parametrize("address", ["tcp://0.0.0.0:0", "tcp://*:7400", "tcp://10.0.0.1:7400", "udp://x", "ipc://", ""])
def test_only_local_addresses_are_bound(address: str) -> None:
    with pytest.raises(StartupError) as refusal:
        _bound(address)
    assert refusal.value.exit_code == EXIT_USAGE


def test_an_address_in_use_is_one_clear_line() -> None:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as taken:
        port = taken.bind_to_random_port("tcp://127.0.0.1")
        with pytest.raises(StartupError, match="in use") as refusal:
            _bound(f"tcp://127.0.0.1:{port}")
    assert refusal.value.exit_code == EXIT_PORT


def test_a_free_port_is_chosen() -> None:
    assert _bound("tcp://127.0.0.1:0").startswith("tcp://127.0.0.1:")


def _bound(address: str) -> str:
    loop = asyncio.new_event_loop()
    try:
        mesh = loop.run_until_complete(_mesh(address))
        mesh.close()
        return mesh.control.address
    finally:
        loop.close()


async def _mesh(address: str) -> Mesh:
    return Mesh(address)


class AutoWorker:
    """A worker that answers by itself: the token of index i is i, one per turn of the loop, until it is killed."""

    def __init__(self, worker: FakeWorker, rng: random.Random) -> None:
        self._worker = worker
        self._rng = rng
        self._jobs: dict[str, tuple[Prefill | Decode, int]] = {}
        worker.answer = self._answer

    def _answer(self, message: object) -> None:
        if isinstance(message, Abort):
            job = self._jobs.get(message.request_id)
            if job is not None and job[0].attempt <= message.attempt:
                del self._jobs[message.request_id]
        elif isinstance(message, Prefill):
            index = len(message.tokens) - message.num_prompt_tokens
            self._worker.tokens(message, index, [index])
        elif isinstance(message, Decode):
            assert message.tokens[message.num_prompt_tokens :] == tuple(
                range(len(message.tokens) - message.num_prompt_tokens)
            )
            given = len(message.tokens) - message.num_prompt_tokens
            self._jobs[message.request_id] = (message, given + (message.source is not None) * self._rng.randint(0, 1))

    def step(self) -> None:
        for request_id, (job, index) in list(self._jobs.items()):
            finish = "stop" if index + 1 == job.params.max_tokens else None
            self._worker.tokens(job, index, [index], finish=finish)
            self._jobs[request_id] = (job, index + 1)
            if finish:
                del self._jobs[request_id]
        self._worker.beat()


@pytest.mark.parametrize("seed", range(5))
def test_streams_survive_workers_that_come_and_go(tmp_path: Path, seed: int) -> None:
    """Every worker id is killed now and then and comes back; each stream is whole, or ends with `worker_lost`."""

    async def scenario() -> None:
        rng = random.Random(seed)
        async with running(tmp_path, disaggregate_above=3) as mesh:
            ids = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode", "d2": "decode"}
            lives = dict.fromkeys(ids, 1)
            fakes = {w: await mesh.worker(w, role) for w, role in ids.items()}
            autos = {w: AutoWorker(fake, rng) for w, fake in fakes.items()}
            outcomes = [
                asyncio.create_task(outcome(mesh, i, rng.randint(1, 6), rng.randint(1, 150))) for i in range(40)
            ]
            for turn in range(100_000):
                if all(t.done() for t in outcomes):
                    break
                for auto in autos.values():
                    auto.step()
                await asyncio.sleep(0)
                if turn % 40 == 20:
                    victim = rng.choice(list(ids))
                    fakes[victim].close()
                    lives[victim] += 1
                    fakes[victim] = await mesh.worker(victim, ids[victim], incarnation=lives[victim])
                    autos[victim] = AutoWorker(fakes[victim], rng)
            results = [await t for t in outcomes]
            assert results.count("whole") >= 20
            assert set(results) <= {"whole", "worker_lost"}
            assert mesh.dispatcher.retries["lost"] >= 3
            assert mesh.dispatcher.live == mesh.dispatcher.waiting == 0

    asyncio.run(scenario())


async def outcome(mesh: Mesh, number: int, prompt: int, max_tokens: int) -> str:
    generation = mesh.dispatcher.submit(request(f"r{number}", tokens=range(100, 100 + prompt), max_tokens=max_tokens))
    try:
        assert await tokens_of(generation) == list(range(max_tokens))
    except RequestError as failure:
        return failure.code or ""
    return "whole"


def test_one_process_watches_no_strangers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    original: Callable[[int], int] = os.pidfd_open

    def record(pid: int) -> int:
        opened.append(pid)
        return original(pid)

    monkeypatch.setattr(os, "pidfd_open", record)

    async def scenario() -> None:
        async with running(tmp_path) as mesh:
            await mesh.worker("d0", "decode", host="another machine", pid=1)
            await mesh.worker("d1", "decode", host=Mesh.host, pid=os.getpid())
            assert opened == [os.getpid()]

    asyncio.run(scenario())
