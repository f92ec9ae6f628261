"""Responses in the background: they run detached from the client that asked, and end in the store.

    start ──▶ queued ──first token──▶ in_progress ──▶ completed | incomplete | failed
                └────────── stop, or a cancel noted in a shared store ──▶ cancelled

A run counts as a request in flight until its end is kept: a shutdown waits for it, and what it does not wait for
fails and is kept as failed.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from time import perf_counter
from typing import Any

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mesh.errors import RequestError
from proxy.api.answer import CLIENT_LEFT, Answer, disconnected
from proxy.api.door import Door
from proxy.api.responses_store import ALIVE, UNFINISHED, Record, ResponseStore
from proxy.api.responses_stream import ResponseStream
from proxy.api.sse import KEEP_ALIVE, Output

logger = logging.getLogger(__name__)

CANCEL_POLL_S = 0.5
"""How soon a cancel that another proxy noted is seen."""
FINISHED_RUNS = 16
"""Whose events are still there for a client that was cut off."""
MAX_EVENT_BYTES = 256 << 20
"""Of all runs; above it no more streams are begun in the background."""
RETRY_FULL_S = 5
KEEP_PAUSES_S = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Before each attempt to keep an end: nobody else has it."""
END = b"\n\n"


class Run:
    """One response under way and, if it is streamed, its events: event number `i` is `events[i]`."""

    def __init__(self, id: str, *, streamed: bool) -> None:
        self.id = id
        self.streamed = streamed
        self.begun = False
        self.events: list[bytes] = []
        self.num_bytes = 0
        self.last = b""
        """Frames that end the stream; they become events when the end is kept."""
        self.stopped = asyncio.Event()
        self.over = asyncio.Event()
        self._changed = asyncio.Event()

    def add(self, frames: bytes) -> None:
        if self.streamed:
            self.events += [event + END for event in frames.split(END)[:-1]]
            self.num_bytes += len(frames)
            self._wake()

    def end(self) -> None:
        self.over.set()
        self._wake()

    async def follow(self, first: int) -> AsyncIterator[bytes]:
        """Events from number `first` on, as they come."""
        while True:
            changed = self._changed
            if first < len(self.events):
                frames, first = b"".join(self.events[first:]), len(self.events)
                yield frames
            elif self.over.is_set():
                return
            else:
                await changed.wait()

    async def receive(self) -> Message:
        """For the answer, a client that only leaves when the run is stopped."""
        await self.stopped.wait()
        return {"type": "http.disconnect"}

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()


class Background:
    """The runs of this proxy."""

    def __init__(self, store: ResponseStore, door: Door) -> None:
        self._store = store
        self._door = door
        self._runs: dict[str, Run] = {}
        self._finished: deque[str] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None

    def check_room(self) -> None:
        """For the events of one more stream, if need be in the place of finished ones. Raises `RequestError` 503."""
        while self._num_bytes() > MAX_EVENT_BYTES and self._finished:
            self.forget(self._finished.popleft())
        if self._num_bytes() > MAX_EVENT_BYTES:
            raise RequestError(
                503,
                "Too many responses are streamed in the background. Please try again shortly.",
                type="server_error",
                code="overloaded",
                retry_after=RETRY_FULL_S,
            )

    def start(self, record: Record, answer: Answer, sink: ResponseStream, *, streamed: bool) -> Run:
        """Runs `answer`. The caller has entered the door and kept the record; leaving is done here."""
        run = self._runs[record.id] = Run(record.id, streamed=streamed)
        self._spawn(self._work(run, record, answer, sink))
        if self._store.shared and (self._watch is None or self._watch.done()):
            self._watch = self._spawn(self._look_for_cancels())
        return run

    def find(self, id: str) -> Run | None:
        return self._runs.get(id)

    def stop(self, id: str) -> Run | None:
        """Cancels the run of that id; None when this proxy has none."""
        run = self._runs.get(id)
        if run is not None:
            run.stopped.set()
        return run

    def forget(self, id: str) -> None:
        """Nobody may read its events any more."""
        self._runs.pop(id, None)

    def _num_bytes(self) -> int:
        return sum(run.num_bytes for run in self._runs.values())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _work(self, run: Run, record: Record, answer: Answer, sink: ResponseStream) -> None:
        try:
            run.last = await self._answered(run, record, answer, sink)
            await self._keep_end(replace(record, response=sink.document))
            run.add(run.last)
        finally:
            run.end()
            self._door.leave()
            self._retire(run)

    async def _answered(self, run: Run, record: Record, answer: Answer, sink: ResponseStream) -> bytes:
        """Generates; returns what ends the stream."""

        async def send(message: Message) -> None:
            frames = message.get("body", b"")
            if not frames or frames == KEEP_ALIVE:
                return
            if not message.get("more_body"):
                run.last = frames
                return
            if not run.begun:
                run.begun = True
                await self._keep(replace(record, response=sink.document))
            run.add(frames)

        try:
            await answer({"type": "http"}, run.receive, send)
        except RequestError as error:
            return sink.fail(error)
        except Exception:
            logger.exception("response %s failed", run.id)
            return sink.fail(UNFINISHED)
        return sink.cancel() if sink.document["status"] in ALIVE else run.last

    async def _look_for_cancels(self) -> None:
        """Of other proxies; as long as anything runs."""
        while running := [run.id for run in self._runs.values() if not run.over.is_set()]:
            await asyncio.sleep(CANCEL_POLL_S)
            try:
                asked = await self._store.cancels_asked(running)
            except RequestError:
                continue  # a store that is away cancels nothing
            for id in asked:
                self.stop(id)

    async def _keep_end(self, record: Record) -> None:
        for pause in KEEP_PAUSES_S:
            await asyncio.sleep(pause)
            if await self._keep(record):
                return

    async def _keep(self, record: Record) -> bool:
        return await keep(self._store, record, new=False)

    def _retire(self, run: Run) -> None:
        self._finished.append(run.id)
        if len(self._finished) > FINISHED_RUNS:
            self.forget(self._finished.popleft())


async def keep(store: ResponseStore, record: Record, *, new: bool) -> bool:
    """Puts an answer into the store; without it there still is an answer, so a failure is only logged.

    False: it may succeed later.
    """
    try:
        await store.put(record, new=new)
    except RequestError as error:
        logger.warning("response %s is not kept: %s", record.id, error.message)
        return error.status < 500
    return True


class Followed(Response):
    """The events of a run from some number on; the run goes on without the client."""

    def __init__(self, run: Run, first: int, keep_alive_s: float) -> None:
        super().__init__()
        self._run = run
        self._first = first
        self._keep_alive_s = keep_alive_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        output = Output(send)
        copy = asyncio.create_task(self._copy(output))
        gone = asyncio.create_task(disconnected(receive))
        try:
            while not copy.done() and not gone.done():
                timeout = max(0.0, output.last_write + self._keep_alive_s - perf_counter())
                await asyncio.wait({copy, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
                if not copy.done() and perf_counter() - output.last_write >= self._keep_alive_s:
                    await output.keep_alive(KEEP_ALIVE)
            if not copy.done():
                scope[CLIENT_LEFT] = True
        finally:
            copy.cancel()
            gone.cancel()
            await asyncio.gather(copy, gone, return_exceptions=True)

    async def _copy(self, output: Output) -> None:
        async for events in self._run.follow(self._first):
            await output.write(events)
        if self._run.last:  # else the run was torn off, and so is its stream
            await output.end(b"")
