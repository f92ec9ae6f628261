"""A whole deployment inside the test process: the real dispatcher, real workers on threads, real sockets and pages.

Only the process boundary is missing, which makes the equality tests cheap enough to cover every family, topology and
transport. `processes.py` has the boundary.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import zmq

from decode.role import DecodeRole
from engine.engine import Engine, EngineConfig
from engine.runner import ModelRunner
from engine.sim_engine import SimRunner
from kvtransfer.endpoint import KvEndpoint
from kvtransfer.transports.local import Exchange
from mesh import host
from mesh.errors import EXIT_MODEL, StartupError
from mesh.messages import BlockEvents, WorkerInfo
from mesh.params import SamplingParams
from mesh.residency import open_publisher
from mesh.tokenizer import Tokenizer
from prefill.role import PrefillRole
from proxy.control import ControlSocket
from proxy.dispatcher import MeshDispatcher
from proxy.fleet import Fleet as ProxyFleet
from proxy.generation import Chunk, GenerateRequest
from proxy.routing.residency import LocalResidency
from worker.grammars import Grammars
from worker.metrics import WorkerMetrics
from worker.process import Station, WorkerProcess

TIMEOUT_S = 60.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one choice."""

    tokens: list[int]
    logprobs: list[float]
    finish: str


@dataclass(frozen=True, slots=True)
class Shape:
    """How every worker of a fleet is built."""

    block_tokens: int = 8
    num_blocks: int = 512
    max_num_batched_tokens: int = 32
    max_num_seqs: int = 32
    max_model_len: int = 512
    transports: tuple[str, ...] = ("shm", "zmq")
    kv_scheme: str = "ipc"


@dataclass(slots=True)
class FleetWorker:
    name: str
    engine: Engine
    kv: KvEndpoint
    process: WorkerProcess
    thread: threading.Thread


@dataclass(slots=True)
class Door:
    """The proxy without its HTTP side."""

    fleet: ProxyFleet
    control: ControlSocket
    dispatcher: MeshDispatcher

    @classmethod
    async def open(cls, address: str, disaggregate_above: int) -> Door:
        loop = asyncio.get_running_loop()
        known = ProxyFleet(LocalResidency(), time.monotonic, loop.call_soon)
        control = ControlSocket("proxy-0", time.time_ns(), host.identity(), known)
        dispatcher = MeshDispatcher(known, time.monotonic, max_requests=1000, disaggregate_above=disaggregate_above)
        known.connect(control, dispatcher)
        control.bind(address)
        control.start()
        dispatcher.start()
        return cls(known, control, dispatcher)

    async def close(self) -> None:
        self.dispatcher.close()
        self.control.close()

    async def count(self, role: str) -> int:
        return sum(worker.info.role == role for worker in self.fleet.pool.routable())


@dataclass(slots=True)
class Fleet:
    """Submit from the test's thread; the dispatcher runs on an event loop of its own."""

    directory: Path
    load: Callable[[], ModelRunner | SimRunner]
    shape: Shape
    loop: asyncio.AbstractEventLoop
    door: Door
    tokenizer: Callable[[], Tokenizer]
    exchange: Exchange = field(default_factory=Exchange)
    context: zmq.Context[zmq.Socket[bytes]] = field(default_factory=zmq.Context)
    workers: dict[str, FleetWorker] = field(default_factory=dict)
    _count: int = 0

    def start(self, role: str, name: str, load: Callable[[], ModelRunner | SimRunner] | None = None) -> None:
        """`load`: of this worker, where it differs from the others."""
        runner, shape = (load or self.load)(), self.shape
        engine = Engine(runner, EngineConfig(shape.max_num_seqs, shape.max_num_batched_tokens, shape.max_model_len))
        incarnation = time.time_ns()
        bind = f"ipc://{self.directory}/{name}.kv" if shape.kv_scheme == "ipc" else "tcp://127.0.0.1:0"
        kv = KvEndpoint(
            context=self.context,
            bind=bind,
            worker_id=name,
            incarnation=incarnation,
            host=host.identity(),
            layout=runner.layout,
            transports=shape.transports,
            clock=time.monotonic,
            exchange=self.exchange,
        )
        info = WorkerInfo(
            worker_id=name,
            incarnation=incarnation,
            role=role,
            kv_address=kv.address,
            host="threads have no pid of their own",
            pid=0,
            model="tiny",
            model_digest=runner.digest,
            layout=runner.layout,
            total_blocks=runner.num_blocks,
            max_model_len=shape.max_model_len,
            max_num_seqs=shape.max_num_seqs,
            max_num_batched_tokens=shape.max_num_batched_tokens,
            step_bound_s=30.0,
        )
        box: list[WorkerProcess] = []

        def publish(events: BlockEvents) -> None:
            for process in box:
                process.publish(events)

        station = Station(
            info,
            engine,
            kv,
            open_publisher("memory", info, publish),
            WorkerMetrics(info),
            Grammars(self.tokenizer),
            (f"ipc://{self.directory}/control",),
            5.0,
        )
        box.append(WorkerProcess(station, self.context, PrefillRole if role == "prefill" else DecodeRole))
        thread = threading.Thread(target=box[0].run, name=name)
        thread.start()
        self.workers[name] = FleetWorker(name, engine, kv, box[0], thread)

    def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams, n: int = 1) -> list[list[Answer]]:
        """All prompts at once; per prompt, its choices."""
        return self.call(self._generate_all([list(p) for p in prompts], params, n))

    async def _generate_all(self, prompts: list[list[int]], params: SamplingParams, n: int) -> list[list[Answer]]:
        return list(await asyncio.gather(*(self._one(prompt, params, n) for prompt in prompts)))

    async def _one(self, prompt: list[int], params: SamplingParams, n: int) -> list[Answer]:
        self._count += 1
        request = GenerateRequest(f"request-{self._count}", tuple(prompt), params, n, TIMEOUT_S)
        answers = [Answer([], [], "") for _ in range(n)]
        async for chunks in self.door.dispatcher.submit(request):
            for chunk in chunks:
                answers[chunk.choice] = _extend(answers[chunk.choice], chunk)
        return answers

    def assert_quiet(self) -> None:
        """Nothing is held by any worker that still runs, and its blocks add up."""
        for worker in self.running:
            end = time.monotonic() + 10
            while not _is_quiet(worker):
                assert time.monotonic() < end, f"{worker.name}: {worker.engine.load()} {worker.kv.stats()}"
                time.sleep(0.01)
            worker.engine.check()

    def wait_for(self, role: str, count: int) -> None:
        end = time.monotonic() + TIMEOUT_S
        while self.call(self.door.count(role)) != count:
            assert time.monotonic() < end, f"not {count} {role} workers"
            time.sleep(0.01)

    @property
    def running(self) -> list[FleetWorker]:
        return [worker for worker in self.workers.values() if worker.thread.is_alive()]

    def stop(self) -> None:
        for worker in self.running:
            worker.process.drain()
        for worker in self.workers.values():
            worker.thread.join(20)
            assert not worker.thread.is_alive(), f"{worker.name} does not end"
        self.context.term()

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return on_loop(self.loop, coroutine)


def _extend(answer: Answer, chunk: Chunk) -> Answer:
    assert chunk.index == len(answer.tokens), "a token twice, or a gap"
    assert not answer.finish, "a token after the finish"
    return Answer(
        answer.tokens + list(chunk.tokens),
        answer.logprobs + [entry.logprob for entry in chunk.logprobs],
        chunk.finish or "",
    )


def _is_quiet(worker: FleetWorker) -> bool:
    load, stats = worker.engine.load(), worker.kv.stats()
    return not (
        load.running or load.waiting or load.fetching or load.held or load.held_blocks
        or stats.fetching or stats.serving or stats.held_streams
    )  # fmt: skip


def no_tokenizer() -> Tokenizer:
    """For requests without grammars: the workers see token ids only."""
    raise StartupError("no tokenizer", EXIT_MODEL)


@contextmanager
def fleet(
    directory: Path,
    load: Callable[[], ModelRunner | SimRunner],
    shape: Shape,
    *,
    prefill: int,
    decode: int,
    disaggregate_above: int = 0,
    tokenizer: Callable[[], Tokenizer] = no_tokenizer,
) -> Iterator[Fleet]:
    """A started fleet whose workers are all registered; every prompt is disaggregated unless said otherwise."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="proxy-loop")
    thread.start()
    door = on_loop(loop, Door.open(f"ipc://{directory}/control", disaggregate_above))
    running = Fleet(directory, load, shape, loop, door, tokenizer)
    try:
        for role, count in (("prefill", prefill), ("decode", decode)):
            for i in range(count):
                running.start(role, f"{role}-{i}")
        for role, count in (("prefill", prefill), ("decode", decode)):
            running.wait_for(role, count)
        yield running
    finally:
        running.stop()
        on_loop(loop, door.close())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def on_loop(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, T]) -> T:
    return asyncio.run_coroutine_threadsafe(coroutine, loop).result(TIMEOUT_S)
