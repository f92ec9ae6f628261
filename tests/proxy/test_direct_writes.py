"""Tokens that are written as soon as they come, beside the task that runs the answer: same order, same bytes, and one
request's fault is nobody else's."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from mesh.messages import Decode, TokenBatch, TokenDelta
from mesh.settings import ProxySettings
from proxy.api import chat
from proxy.app import create_app
from proxy.connection import HttpConnection, Pipe
from tests.proxy.fake_worker import FakeWorker, Mesh, request, running
from tests.proxy.tiny_tokenizer import byte_level

TOKENIZER = byte_level()


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """pytest's fixtures for a coroutine, in an event loop of its own."""

    @wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))

    return run


@asynccontextmanager
async def served(mesh: Mesh, *, send_buffer: int = 0) -> AsyncIterator[int]:
    """The port of the API over a mesh, in this event loop."""
    app = create_app(mesh.dispatcher, TOKENIZER, ProxySettings(), "tiny")
    with socket.socket() as listener:
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        config = uvicorn.Config(app, http=HttpConnection, ws="none", log_config=None, lifespan="off")
        server = uvicorn.Server(config)
        task = asyncio.create_task(server.serve([listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await asyncio.wait_for(task, 20)


async def ask(port: int, max_tokens: int, **fields: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A streamed chat on a connection of its own."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "stream": True, "max_tokens": max_tokens}
    data = json.dumps({**body, **fields}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 12)
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    return reader, writer


def content(answer: bytes) -> str:
    """The text of a whole chunked answer; fails unless it is whole."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200"), answer[:200]
    data = b""
    while True:
        size, _, body = body.partition(b"\r\n")
        if int(size, 16) == 0:
            break
        data += body[: int(size, 16)]
        assert body[int(size, 16) :][:2] == b"\r\n"
        body = body[int(size, 16) + 2 :]
    frames = data.decode().split("\n\n")
    assert frames[-2:] == ["data: [DONE]", ""]
    deltas = [json.loads(f.removeprefix("data: "))["choices"][0] for f in frames[:-2] if not f.startswith(":")]
    assert [d["finish_reason"] for d in deltas if d["finish_reason"]] == ["length"]
    return "".join(d["delta"].get("content", "") for d in deltas)


def spoken(worker: FakeWorker, jobs: list[Decode], index: int, letter: str, *, last: bool = False) -> None:
    """One token for each job, in one message."""
    (token,) = TOKENIZER.encode(letter, add_special_tokens=False)
    finish = "length" if last else None
    deltas = [TokenDelta(j.request_id, j.attempt, index, (token,), (), finish, None, ()) for j in jobs]
    worker.send(TokenBatch(tuple(deltas)))


@in_a_loop
async def test_a_client_that_reads_late_gets_every_token_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, direct, refused = 4000, 0, 0
    write, ready = Pipe.write, vars(Pipe)["ready"].fget

    def counted(pipe: Pipe, part: bytes) -> None:
        nonlocal direct
        direct += 1
        write(pipe, part)

    def asked(pipe: Pipe) -> bool:
        nonlocal refused
        refused += not ready(pipe)
        return bool(ready(pipe))

    monkeypatch.setattr(Pipe, "write", counted)
    monkeypatch.setattr(Pipe, "ready", property(asked))
    text = "".join(chr(ord("a") + i * 7 % 26) for i in range(count))
    async with running(tmp_path) as mesh:
        worker = await mesh.worker("both-0", "both", max_model_len=5000)
        worker.beat()
        await mesh.until(lambda: mesh.dispatcher.ready)
        async with served(mesh, send_buffer=4096) as port:
            reader, writer = await ask(port, count)
            job = await worker.expect(Decode)
            for i, letter in enumerate(text):
                spoken(worker, [job], i, letter, last=i == count - 1)
                if i % 64 == 0:
                    await asyncio.sleep(0)
                if refused == 0 and i == count // 2:
                    await mesh.until(lambda: refused > 0 or direct > count // 4)
            answer = await asyncio.wait_for(reader.read(-1), 20)
            writer.close()
    assert content(answer) == text
    assert direct > 100
    assert refused > 0


@in_a_loop
async def test_one_requests_fault_does_not_reach_the_others_of_a_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken: list[object] = []
    sinks: list[object] = []
    take = chat.ChatStream.take

    def takes(sink: chat.ChatStream, choice: int, chunk: object, piece: object) -> bytes:
        sinks.append(sink)
        if sink in broken:
            raise ZeroDivisionError
        return take(sink, choice, chunk, piece)  # type: ignore[arg-type]

    monkeypatch.setattr(chat.ChatStream, "take", takes)
    async with running(tmp_path) as mesh:
        worker = await mesh.worker("both-0", "both")
        worker.beat()
        await mesh.until(lambda: mesh.dispatcher.ready)
        async with served(mesh) as port:
            connections = [await ask(port, 20) for _ in range(3)]
            jobs = [await worker.expect(Decode) for _ in connections]
            for i in range(20):
                spoken(worker, jobs, i, "a", last=i == 19)
                await asyncio.sleep(0.001)
                if i == 5:
                    await mesh.until(lambda: len(sinks) >= 3)
                    broken.append(sinks[0])
            answers = [await asyncio.wait_for(reader.read(-1), 20) for reader, _ in connections]
            for _, writer in connections:
                writer.close()
    whole = [a for a in answers if b'"error"' not in a]
    assert [content(a) for a in whole] == ["a" * 20] * 2
    (failed,) = [a for a in answers if b'"error"' in a]
    assert b'"server_error"' in failed
    assert failed.count(b"[DONE]") == 1


@in_a_loop
async def test_a_chunk_is_offered_only_while_the_reader_waits(tmp_path: Path) -> None:
    async with running(tmp_path) as mesh:
        worker = await mesh.worker("both-0", "both")
        generation = mesh.dispatcher.submit(request(max_tokens=9))
        job = await worker.expect(Decode)
        taken: list[int] = []

        def taker(chunk: object) -> bool:
            taken.append(chunk.index)  # type: ignore[attr-defined]
            return len(taken) % 2 == 1

        generation.offer(taker)
        worker.tokens(job, 0, [5])
        await mesh.until(lambda: bool(generation._chunks))
        assert not taken, "nobody reads yet"
        read: list[int] = []

        async def reads() -> None:
            async for chunks in generation:
                read.extend(c.index for c in chunks)

        reader = asyncio.create_task(reads())
        for i in range(1, 9):
            worker.tokens(job, i, [5], "length" if i == 8 else None)
            await mesh.until(lambda i=i: max([*taken, *read], default=-1) >= i)  # type: ignore[misc]
        await reader
    assert sorted({*taken, *read}) == list(range(9))
    assert read == [0, *taken[1::2]]
