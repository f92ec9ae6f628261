"""The seam between the API (text, HTTP) and the dispatcher (tokens, workers)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from mesh import __version__
from mesh.messages import PrefillReport, TokenLogprob
from mesh.params import SamplingParams


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt and its `n` choices."""

    request_id: str
    """Made by the proxy; unique."""
    tokens: tuple[int, ...]
    params: SamplingParams
    """Of choice 0; choice `c` differs in `choice` alone."""
    n: int
    deadline_s: float
    cache_salt: str = ""


class Chunk(NamedTuple):
    """New tokens of one choice, contiguous and each exactly once, whatever happened behind."""

    choice: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody calls
    """Of the first token, among the choice's generated tokens."""
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: str | None
    """`stop` or `length` with the choice's last token."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Route:
    """Which workers served a request, and what they had of it."""

    prefill: str | None
    """Worker id, or None when the prompt was computed where it was decoded."""
    decode: str
    attempts: int
    reports: tuple[PrefillReport, ...]

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that no worker had to compute for this request."""
        return max((r.reused_tokens for r in self.reports), default=0)


class Generation(Protocol):
    """A running request. Iterating yields the chunks that arrived together; it ends after every choice's finish.

    Raises `RequestError` from the iteration when the request cannot be completed: before the first chunk that is an
    HTTP error, after it an error event. It never ends cleanly without every choice's finish.
    """

    def __aiter__(self) -> AsyncIterator[list[Chunk]]: ...

    def offer(self, taker: Callable[[Chunk], bool]) -> None:
        """From now on a chunk that comes while the iteration waits for one is offered to `taker` first, at once; False:
        it goes to the iteration. For requests of one choice."""

    def stop(self, choice: int) -> None:
        """The choice has all it needs (a stop string): abort it at the workers. No more chunks for it come."""

    def abort(self, reason: str) -> None:
        """Ends everything at once; legal at any time, idempotent."""

    @property
    def route(self) -> Route: ...


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the workers say of the served model."""

    max_model_len: int
    digest: bytes
    """Of the model's weights and configuration."""

    @property
    def fingerprint(self) -> str:
        """OpenAI's `system_fingerprint`: changes with the version and the model."""
        return f"kvmesh-{__version__}-{self.digest.hex()[:8]}"


class Dispatcher(Protocol):
    """Turns requests into generations."""

    def submit(self, request: GenerateRequest) -> Generation:
        """Raises `RequestError`: 503 `no_workers` or `overloaded`, with Retry-After."""

    @property
    def model(self) -> ModelFacts | None:
        """None until a worker registered."""

    @property
    def ready(self) -> bool:
        """A request submitted now would find a worker."""
