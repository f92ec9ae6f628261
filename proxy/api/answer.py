"""One generating request from its first chunk to its last byte.

    waiting ──first chunk──▶ answering ──every choice finished──▶ complete
       │                         │
       └── RequestError ──▶ HTTP status      └── RequestError ──▶ the sink's failure
    any ──client gone──▶ aborted at the workers

A stream's status is sent with its first byte: the first chunk's, or a comment's once the client has waited for
`keep_alive_s`. From then on a failure is told in the stream, as the endpoint's clients expect it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import MutableMapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from time import monotonic, perf_counter
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mesh.errors import RequestError, internal_error
from proxy.api.merge import Batch, merged
from proxy.api.sse import KEEP_ALIVE, Output, error_frames
from proxy.api.tenants import Tenant
from proxy.generation import Chunk, Generation, Route
from proxy.metrics import ProxyMetrics, RequestRecord
from proxy.text.choice import ChoiceText, Piece

logger = logging.getLogger(__name__)

CLIENT_LEFT = "kvmesh.client_left"
"""Key in the ASGI scope: the answer was not delivered because the client went away."""

PIPE = "kvmesh.pipe"
"""Key in the ASGI scope: the connection's `Pipe`, where it has one."""


@dataclass(slots=True, eq=False)
class Usage:
    """Token counts so far, of all prompts and choices together."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int | None = None
    """Of the completion; None: this model does not think before it answers."""

    def object(self) -> dict[str, Any]:
        """As OpenAI's `usage`."""
        usage: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.reasoning_tokens is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return usage


class Pipe(Protocol):
    """See `proxy.connection`."""

    @property
    def ready(self) -> bool: ...

    def write(self, part: bytes) -> None: ...


class Sink(Protocol):
    """Turns tokens into the bytes of one endpoint's answer; endpoints inherit from it."""

    def take(self, choice: int, chunk: Chunk, piece: Piece) -> bytes:
        """The frames for new tokens of a choice (a sink that collects returns none)."""

    def end(self, routes: Sequence[Route]) -> bytes:
        """What ends the answer: the last frames, or the whole document."""

    def fail(self, error: RequestError) -> bytes:
        """What ends a stream that cannot go on: clients take a plain end for success. An endpoint whose clients
        expect another form overrides it; a failure before the first byte is an HTTP status and does not come here."""
        return error_frames(error)

    def idle(self) -> bytes:
        """What a stream that is silent sends, so that nobody on the way cuts it."""
        return KEEP_ALIVE


@dataclass(frozen=True, slots=True)
class Job:
    """What a request asks for, submitted to the dispatcher."""

    label: str
    """For the log."""
    generations: tuple[Generation, ...]
    """One per prompt."""
    prompt_lengths: tuple[int, ...]
    n: int
    """Choices per prompt; choice `c` of prompt `p` is number `p * n + c` of the answer."""
    choices: tuple[ChoiceText, ...]
    sink: Sink
    usage: Usage
    tenant: Tenant
    stream: bool
    discard_output: bool = False
    """Only the prompt was asked for; the one token that the engine must generate is not part of the answer."""


class Answer(Response):
    """An ASGI response that runs a job."""

    def __init__(self, job: Job, metrics: ProxyMetrics, record: RequestRecord, keep_alive_s: float) -> None:
        super().__init__()
        self._job = job
        self._metrics = metrics
        self._record = record
        self._keep_alive_s = keep_alive_s
        self._last_token = [0.0] * len(job.choices)
        self._open = len(job.choices)
        self._failed = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        output = Output(send)
        pipe = scope.get(PIPE)
        if (
            pipe is not None
            and self._job.stream
            and len(self._job.choices) == 1
            and self._job.choices[0].only_engine_ends
        ):
            self._job.generations[0].offer(partial(self._pass_on, output, pipe))
        work = asyncio.create_task(self._answer(output))
        gone = asyncio.create_task(disconnected(receive))
        try:
            if await self._client_left(work, gone, output):
                scope[CLIENT_LEFT] = True
            else:
                work.result()
        finally:
            self._job.tenant.quota.end(self._job.usage.completion_tokens, monotonic())
            if self._open:
                for generation in self._job.generations:
                    generation.abort("failed" if self._failed else "client_disconnected")
            work.cancel()
            gone.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
            self._observe()

    async def _client_left(self, work: asyncio.Task[None], gone: asyncio.Task[None], output: Output) -> bool:
        """Waits for the end of the work or of the client; keeps a silent stream alive meanwhile."""
        while True:
            timeout = None
            if self._job.stream:
                timeout = max(0.0, output.last_write + self._keep_alive_s - perf_counter())
            done, _ = await asyncio.wait({work, gone}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if done:
                return work not in done
            if perf_counter() - output.last_write >= self._keep_alive_s:
                await output.keep_alive(self._job.sink.idle())

    async def _answer(self, output: Output) -> None:
        try:
            await self._generate(output)
        except Exception as error:
            self._failed = True
            if isinstance(error, RequestError):
                known = error
            else:
                logger.exception("request %s failed", self._job.label)
                known = internal_error()
            if not output.started:
                raise known from None
            await output.end(self._job.sink.fail(known))

    async def _generate(self, output: Output) -> None:
        job = self._job
        async with aclosing(merged(job.generations)) as batches:
            async for batch in batches:
                frames = self._take(batch)
                if frames:
                    await output.write(frames)
                if not self._open:
                    break
        if self._open:
            logger.error("request %s: generation ended without a finish", job.label)
            raise internal_error()
        routes = [generation.route for generation in job.generations]
        self._record.reports = [report for route in routes for report in route.reports]
        job.usage.cached_tokens = sum(
            min(route.cached_tokens, length) for route, length in zip(routes, job.prompt_lengths, strict=True)
        )
        if job.stream:
            await output.end(job.sink.end(routes))
        else:
            await output.document(job.sink.end(routes), route_headers(routes))

    def _pass_on(self, output: Output, pipe: Pipe, chunk: Chunk) -> bool:
        """Writes a token of the only choice as soon as it comes, without the detour over the task; False when there is
        anything beside that to do."""
        expected = chunk.finish is None and chunk.index == self._job.choices[0].num_tokens
        if not (expected and output.started and pipe.ready):
            return False
        now = perf_counter()
        frames = self._frames(0, chunk, now)
        if frames:
            pipe.write(frames)
            output.last_write = now
        return True

    def _take(self, batch: Batch) -> bytes:
        """The frames of chunks that arrived together."""
        now = perf_counter()
        prompt, chunks = batch
        return b"".join([self._frames(prompt, chunk, now) for chunk in chunks])

    def _frames(self, prompt: int, chunk: Chunk, now: float) -> bytes:
        job, usage = self._job, self._job.usage
        number = prompt * job.n + chunk.choice
        choice = job.choices[number]
        if choice.finish is not None:
            return b""  # sent before the workers heard of the stop
        piece = self._piece(choice, chunk)
        self._time(number, now)
        usage.completion_tokens += piece.num_tokens
        if usage.reasoning_tokens is not None:
            usage.reasoning_tokens += piece.num_reasoning_tokens
        frames = job.sink.take(number, chunk, piece)
        if piece.finish is not None:
            self._open -= 1
            if chunk.finish is None:
                job.generations[prompt].stop(chunk.choice)
        return frames

    def _piece(self, choice: ChoiceText, chunk: Chunk) -> Piece:
        if self._job.discard_output:
            choice.finish = "length"
            return Piece("", 0, "length", ())
        if chunk.index != choice.num_tokens:
            logger.error(
                "request %s: token %d came in the place of %d",
                self._job.label,
                chunk.index,
                choice.num_tokens,
            )
            raise internal_error()
        return choice.push(chunk.tokens, chunk.finish)

    def _time(self, number: int, now: float) -> None:
        record = self._record
        if record.first_token is None:
            record.first_token = now
        if self._last_token[number]:
            record.gaps.append(now - self._last_token[number])
        self._last_token[number] = now
        record.last_token = now

    def _observe(self) -> None:
        unfinished = "error" if self._failed else "abort"
        self._record.outcomes = [choice.finish or unfinished for choice in self._job.choices]
        self._record.prompt_tokens = self._job.usage.prompt_tokens
        self._record.completion_tokens = self._job.usage.completion_tokens
        self._metrics.observe(self._record, self._job.tenant.name)


async def disconnected(receive: Receive) -> None:
    """Returns when the client is gone."""
    while True:
        message: MutableMapping[str, Any] = await receive()
        if message["type"] == "http.disconnect":
            return


def route_headers(routes: Sequence[Route]) -> list[tuple[bytes, bytes]]:
    """Which workers served the request; several prompts' workers with commas."""
    fields = route_fields(routes)
    return [
        (f"x-kvmesh-{name}".encode(), str(fields[name]).encode("ascii", "replace"))
        for name in ("prefill", "decode", "attempts")
        if fields[name] is not None
    ]


def route_fields(routes: Sequence[Route]) -> dict[str, Any]:
    """`prefill` (None: computed where it was decoded), `decode`, `attempts`."""
    prefill = dict.fromkeys(r.prefill for r in routes if r.prefill is not None)
    return {
        "prefill": ",".join(prefill) or None,
        "decode": ",".join(dict.fromkeys(r.decode for r in routes)),
        "attempts": max(r.attempts for r in routes),
    }
