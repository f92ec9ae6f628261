"""A request on its way: its choices, and the chunks that wait for whoever iterates over it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from mesh.errors import RequestError, internal_error
from mesh.params import SamplingParams
from proxy.choice_events import ClientGone, Emit, Event, Fail, StopReached
from proxy.generation import Chunk, GenerateRequest, Route
from proxy.lifecycle import ChoiceState
from proxy.routing.place import Place
from proxy.routing.router import Resident

log = logging.getLogger(__name__)

Feed = Callable[["Choice", Event], None]
"""Gives a choice an event and carries out what follows from it."""


@dataclass(slots=True, eq=False)
class Choice:
    """One choice and what the dispatcher notes beside its state."""

    generation: RunningGeneration
    number: int
    wire_id: str
    """What workers know it by."""
    state: ChoiceState
    places: tuple[Place, ...] = ()
    """Workers whose loss concerns it."""
    prefill: str | None = None
    decode: Place | None = None
    """Of the last attempt."""
    recompute_limit: int = 0
    holders: tuple[Resident, ...] = ()
    history: tuple[Resident, ...] = ()
    """All three of the last plan, see there."""

    @property
    def params(self) -> SamplingParams:
        """As the next attempt gets them."""
        params = self.generation.request.params
        if self.number != params.choice:
            params = replace(params, choice=self.number)
        if len(self.state.journal) and params.prompt_logprobs is not None:
            params = replace(params, prompt_logprobs=None)  # the client has them
        return params

    @property
    def tokens(self) -> tuple[int, ...]:
        """Prompt and what the client has: where the next attempt goes on."""
        return self.generation.request.tokens + self.state.journal.tokens()


class RunningGeneration:
    """`proxy.generation.Generation`. What waits for a slow reader is bounded by the request's own
    `max_tokens`."""

    def __init__(
        self,
        request: GenerateRequest,
        digest: bytes | None,
        hash_root: bytes,
        deadline: float,
    ) -> None:
        self.request = request
        self.digest = digest
        """Of the model of the workers it was submitted to."""
        self.hash_root = hash_root
        self.names: dict[int, list[int]] = {}
        """The prompt's full blocks as the residency index knows them, by a block's size, once they are computed."""
        self.deadline = deadline
        self.choices: list[Choice] = []
        self._feed: Feed | None = None
        self._open: set[int] = set()
        self._chunks: list[Chunk] = []
        self._failure: RequestError | None = None
        self._waiter: asyncio.Future[None] | None = None
        """What the iteration waits for; done or None while the reader is busy with chunks that came before."""
        self._taker: Callable[[Chunk], bool] | None = None

    def begin(self, choices: Sequence[Choice], feed: Feed) -> None:
        self.choices = list(choices)
        self._open = {c.number for c in choices}
        self._feed = feed

    def __aiter__(self) -> AsyncIterator[list[Chunk]]:
        return self._iterate()

    async def _iterate(self) -> AsyncIterator[list[Chunk]]:
        try:
            while True:
                if self._chunks:
                    chunks, self._chunks = self._chunks, []
                    yield chunks
                elif self._failure is not None:
                    raise self._failure
                elif not self._open:
                    return
                else:
                    self._waiter = asyncio.get_running_loop().create_future()
                    await self._waiter
        finally:
            self.abort("the reader stopped reading")

    def stop(self, choice: int) -> None:
        self._chunks = [c for c in self._chunks if c.choice != choice]
        self._tell(choice, StopReached())

    def abort(self, reason: str) -> None:
        for number in sorted(self._open):
            self._tell(number, ClientGone(reason))

    @property
    def route(self) -> Route:
        first = self.choices[0]
        attempts = max(c.state.attempts for c in self.choices)
        decode = first.decode.worker_id if first.decode is not None else ""
        return Route(first.prefill, decode, attempts, first.state.reports)

    @property
    def failure(self) -> RequestError | None:
        return self._failure

    def offer(self, taker: Callable[[Chunk], bool]) -> None:
        self._taker = taker

    def emitted(self, choice: int, emit: Emit) -> None:
        chunk = Chunk(choice, emit.index, emit.tokens, emit.logprobs, emit.finish, emit.prompt_logprobs)
        idle = self._waiter is not None and not self._waiter.done()
        try:
            if idle and self._taker is not None and self._taker(chunk):
                return
        except Exception:  # one reader's fault must not reach those whose tokens came in the same message
            log.exception("request %s failed", self.request.request_id)
            self.end(internal_error())
            return
        self._chunks.append(chunk)
        self._wake()

    def failed(self, choice: int, fail: Fail) -> None:
        """One choice that cannot be completed ends the request."""
        self._open.discard(choice)
        self.end(RequestError(fail.status, fail.message, type=fail.type, code=fail.code, retry_after=fail.retry_after))

    def end(self, failure: RequestError) -> None:
        """Aborts what runs; the iteration raises `failure` after the chunks that are there."""
        if self._failure is None:
            self._failure = failure
            self.abort(failure.message)
        self._wake()

    def ended(self, choice: int) -> None:
        self._open.discard(choice)
        self._wake()

    def _tell(self, number: int, event: Event) -> None:
        if self._feed is not None and number in self._open:
            self._open.discard(number)
            self._feed(self.choices[number], event)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
