"""A proxy's inside without HTTP, and workers played by the test over real sockets, all in one event loop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import zmq

from mesh import wire
from mesh.layout import KvLayout
from mesh.messages import (
    Beat,
    Decode,
    Load,
    Prefill,
    ProxyBeat,
    Refused,
    Register,
    TokenBatch,
    TokenDelta,
    Welcome,
    WorkerInfo,
)
from mesh.params import SamplingParams
from proxy.control import ControlSocket
from proxy.dispatcher import MeshDispatcher
from proxy.fleet import Fleet
from proxy.generation import Chunk, GenerateRequest, Generation
from proxy.routing.residency import LocalResidency

M = TypeVar("M")
LAYOUT = KvLayout(layers=2, kv_heads=2, head_dim=8, block_tokens=4, dtype="float32")
IDLE = Load(0, 0, 0, 0, 100, 0, 0, 0, 0.0)
PATIENCE_S = 10.0
"""Nothing here takes a tenth of a second; a test that waits longer has failed."""


def info(worker_id: str, role: str, incarnation: int = 1, **changes: Any) -> WorkerInfo:
    base = WorkerInfo(
        worker_id=worker_id,
        incarnation=incarnation,
        role=role,
        kv_address=f"ipc:///nowhere/{worker_id}",
        host="elsewhere",
        pid=os.getpid(),
        model="tiny",
        model_digest=b"digest",
        layout=LAYOUT,
        total_blocks=100,
        max_model_len=256,
        max_num_seqs=32,
        max_num_batched_tokens=64,
        step_bound_s=1.0,
    )
    return replace(base, **changes)


def request(
    request_id: str = "r",
    tokens: Sequence[int] = (1, 2, 3),
    n: int = 1,
    deadline_s: float = 60.0,
    **params: Any,
) -> GenerateRequest:
    return GenerateRequest(request_id, tuple(tokens), SamplingParams(**{"max_tokens": 100} | params), n, deadline_s)


class ManualClock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class FakeWorker:
    """One worker's connection. Messages of the proxy are kept by type, or given to `answer` as they come."""

    def __init__(self, address: str, worker: WorkerInfo) -> None:
        self.info = worker
        self.answer: Callable[[Any], None] | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(address)
        self.versions: set[int] = set()
        """Of everything that came."""
        self._inbox: list[Any] = []
        self._arrived = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._drain)

    def close(self) -> None:
        if not self._socket.closed:
            self._loop.remove_reader(self._descriptor)
            self._socket.close(0)
            self._context.term()

    def send(self, message: Any, sender: int | None = None) -> None:
        self.send_raw(wire.encode(message, self.info.incarnation if sender is None else sender))

    def send_raw(self, *frames: bytes) -> None:
        self._socket.send_multipart(frames)
        self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        while not self._socket.closed:
            try:
                envelope = wire.decode(self._socket.recv(zmq.NOBLOCK))
            except zmq.Again:
                return
            message = envelope.message
            self.versions.add(envelope.version)
            if self.answer is not None:
                self.answer(message)
            elif not isinstance(message, ProxyBeat):
                self._inbox.append(message)
                self._arrived.set()

    async def register(self, forgotten: int = 0) -> Welcome:
        self.send(Register(self.info, forgotten))
        return await self.expect(Welcome)

    async def expect(self, kind: type[M]) -> M:
        """The next message of this kind; others that came before it stay."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                for message in self._inbox:
                    if isinstance(message, kind):
                        self._inbox.remove(message)
                        return message
                self._arrived.clear()
                await self._arrived.wait()

    @property
    def inbox(self) -> list[Any]:
        return list(self._inbox)

    def beat(self, load: Load = IDLE, draining: bool = False) -> None:
        self.send(Beat(1, draining, load))

    def tokens(
        self, job: Prefill | Decode, index: int, tokens: Sequence[int], finish: str | None = None, **more: Any
    ) -> None:
        delta = TokenDelta(job.request_id, job.attempt, index, tuple(tokens), (), finish, None, ())
        self.send(TokenBatch((replace(delta, **more),)))

    def refuse(self, job: Prefill | Decode, code: str, retryable: bool = True) -> None:
        self.send(Refused(job.request_id, job.attempt, code, "because", retryable))


class Mesh:
    """The dispatcher, its fleet and its socket."""

    host = "this-host"

    def __init__(self, address: str, max_requests: int = 1000, disaggregate_above: int = -1) -> None:
        self.clock = ManualClock()
        self.index = LocalResidency()
        self.fleet = Fleet(self.index, self.clock, asyncio.get_running_loop().call_soon)
        self.dispatcher = MeshDispatcher(
            self.fleet, self.clock, max_requests=max_requests, disaggregate_above=disaggregate_above
        )
        self.control = ControlSocket("proxy-0", 77, self.host, self.fleet)
        self.control.bind(address)
        self.fleet.connect(self.control, self.dispatcher)
        self.workers: list[FakeWorker] = []

    def dial(self, worker: WorkerInfo) -> FakeWorker:
        fake = FakeWorker(self.control.address, worker)
        self.workers.append(fake)
        return fake

    async def worker(self, worker_id: str, role: str, incarnation: int = 1, **changes: Any) -> FakeWorker:
        """A registered worker that has beaten once."""
        fake = self.dial(info(worker_id, role, incarnation, **changes))
        await fake.register()
        await asyncio.sleep(0)
        return fake

    async def until(self, condition: Callable[[], bool]) -> None:
        """Lets the event loop work until something became true."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                await asyncio.sleep(0.001)

    def close(self) -> None:
        self.dispatcher.close()
        for fake in self.workers:
            fake.close()
        self.control.close()


@asynccontextmanager
async def running(tmp_path: Path, **options: Any) -> AsyncIterator[Mesh]:
    mesh = Mesh(f"ipc://{tmp_path}/control", **options)
    mesh.control.start()
    mesh.dispatcher.start()
    try:
        yield mesh
    finally:
        mesh.close()


async def collect(generation: Generation) -> dict[int, list[Chunk]]:
    """All chunks by choice; asserts that each choice's are contiguous and end with its one finish."""
    chunks: dict[int, list[Chunk]] = {}
    async with asyncio.timeout(PATIENCE_S):
        async for batch in generation:
            for chunk in batch:
                chunks.setdefault(chunk.choice, []).append(chunk)
    for of_choice in chunks.values():
        expected = 0
        for chunk in of_choice:
            assert chunk.index == expected
            expected += len(chunk.tokens)
        assert [c.finish is not None for c in of_choice] == [False] * (len(of_choice) - 1) + [True]
    return chunks


async def tokens_of(generation: Generation, choice: int = 0) -> list[int]:
    return [t for c in (await collect(generation))[choice] for t in c.tokens]
