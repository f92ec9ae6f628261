"""A dispatcher whose workers say what a script tells them to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field

from mesh.errors import RequestError
from mesh.messages import PrefillReport, TokenLogprob
from proxy.generation import Chunk, GenerateRequest, ModelFacts, Route

REPORT = PrefillReport(
    cached_tokens=3,
    fetched_tokens=0,
    computed_tokens=5,
    queue_s=0.01,
    compute_s=0.02,
    transfer_s=0.0,
    transfer_bytes=0,
    overlap_bytes=0,
    reused_tokens=3,
)


@dataclass(frozen=True)
class Script:
    """What the engine generates for every choice of a request, whatever `max_tokens` then cuts off."""

    tokens: Sequence[int]
    finish: str = "stop"
    per_chunk: int = 1
    pauses: dict[int, asyncio.Event] = field(default_factory=dict)
    """Before the chunk of that token index, wait for the event."""
    fail_at: int | None = None
    error: Exception | None = None
    """Raised before the chunk of token `fail_at`; None: the generation just ends there."""
    gap_at: int | None = None
    """From that token on, every index is one too high."""
    delay_s: float = 0.0
    forget_prompt: bool = False
    """No prompt logprobs come, although asked for."""
    together: bool = False
    """All choices' chunks of one step arrive as one list."""
    at_once: bool = False
    """Everything arrives as one list."""


class FakeGeneration:
    """Satisfies `Generation`; remembers what was asked of it."""

    def __init__(self, request: GenerateRequest, script: Script) -> None:
        self.request = request
        self.script = script
        self.stopped: list[int] = []
        self.aborted: list[str] = []
        self.abort_event = asyncio.Event()
        self.chunks_taken = 0

    async def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        script, params = self.script, self.request.params
        tokens = list(script.tokens)[: params.max_tokens]
        finish = script.finish if len(tokens) == len(script.tokens) else "length"
        waiting: list[Chunk] = []
        for start in range(0, len(tokens), script.per_chunk):
            if start in script.pauses:
                await script.pauses[start].wait()
            if script.delay_s:
                await asyncio.sleep(script.delay_s)
            if script.fail_at is not None and start >= script.fail_at:
                if script.error is not None:
                    raise script.error
                return
            step = [c for c in range(self.request.n) if c not in self.stopped]
            new = tuple(tokens[start : start + script.per_chunk])
            last = start + len(new) == len(tokens)
            chunks = [self._chunk(c, start, new, finish if last else None) for c in step]
            self.chunks_taken += 1
            if script.at_once:
                waiting += chunks
            elif script.together:
                yield chunks
            else:
                for chunk in chunks:
                    yield [chunk]
        if waiting:
            yield waiting

    def _chunk(self, choice: int, index: int, tokens: tuple[int, ...], finish: str | None) -> Chunk:
        params = self.request.params
        logprobs: tuple[TokenLogprob, ...] = ()
        if params.logprobs is not None:
            logprobs = tuple(logprob_of(t, params.logprobs) for t in tokens)
        prompt: tuple[TokenLogprob | None, ...] = ()
        if params.prompt_logprobs is not None and index == 0 and not self.script.forget_prompt:
            prompt = (None, *(logprob_of(t, params.prompt_logprobs) for t in self.request.tokens[1:]))
        if self.script.gap_at is not None and index >= self.script.gap_at:
            index += 1
        return Chunk(choice, index, tokens, logprobs, finish, prompt)

    def offer(self, taker: Callable[[Chunk], bool]) -> None:
        """Every chunk goes to the iteration, as the protocol allows."""

    def stop(self, choice: int) -> None:
        self.stopped.append(choice)

    def abort(self, reason: str) -> None:
        self.aborted.append(reason)
        self.abort_event.set()

    @property
    def route(self) -> Route:
        return Route("prefill-0", "decode-0", 1, (REPORT,))


def logprob_of(token: int, top: int) -> TokenLogprob:
    """The token is the most likely one at -0.25; the next ids follow at -1.25, -2.25, ..."""
    ids = tuple(token + i for i in range(top))
    return TokenLogprob(token, -0.25, ids, tuple(-0.25 - i for i in range(top)))


class FakeDispatcher:
    """Satisfies `Dispatcher`; `script` is asked for every request, or always the same one."""

    def __init__(self, script: Script | Callable[[GenerateRequest], Script], *, max_model_len: int = 256) -> None:
        self.script = script
        self.generations: list[FakeGeneration] = []
        self.refusals: list[RequestError | None] = []
        """Raised by the next submits, first come first; None lets one through."""
        self.facts: ModelFacts | None = ModelFacts(max_model_len, digest=bytes(16))

    def submit(self, request: GenerateRequest) -> FakeGeneration:
        refusal = self.refusals.pop(0) if self.refusals else None
        if refusal is not None:
            raise refusal
        script = self.script if isinstance(self.script, Script) else self.script(request)
        generation = FakeGeneration(request, script)
        self.generations.append(generation)
        return generation

    @property
    def model(self) -> ModelFacts | None:
        return self.facts

    @property
    def ready(self) -> bool:
        return self.facts is not None
