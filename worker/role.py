"""What a role (prefill, decode) has in its hands, and what the worker's I/O loop calls it for."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from engine.request import EngineRequest
from engine.step import TokenOut
from kvtransfer.endpoint import Event as KvEvent
from kvtransfer.endpoint import KvEndpoint
from mesh.layout import KvLayout
from mesh.messages import Abort, Decode, KvHolder, Peer, Prefill, PrefillReport, Refused, TokenBatch, TokenDelta
from worker.links import ProxyLink
from worker.metrics import WorkerMetrics
from worker.steploop import Expected, Finished, Rejected, StepLoop, Stepped


def engine_key(request_id: str, attempt: int) -> str:
    """The name of one attempt: the engine's request key and the transfer's stream, equal on both workers."""
    return f"{request_id}#{attempt}"


def engine_request(message: Prefill | Decode, now: float, *, stop_after: int | None = None) -> EngineRequest:
    return EngineRequest(
        key=engine_key(message.request_id, message.attempt),
        tokens=list(message.tokens),
        num_prompt_tokens=message.num_prompt_tokens,
        params=message.params,
        hash_root=message.hash_root,
        stop_after=stop_after,
        hold=stop_after is not None,
        arrived=now,
    )


def same_layout(maker: Peer | None, holders: Sequence[KvHolder]) -> tuple[KvLayout | None, tuple[KvHolder, ...]]:
    """The layout of what is fetched, and who has it so: one fetch names its blocks in one block size. It is that of the
    `maker`, else of the first holder, who has most; None: as one's own."""
    peers = [maker, *(h.peer for h in holders)]
    layout = next((peer.layout for peer in peers if peer is not None), None)
    return layout, tuple(h for h in holders if h.peer.layout == layout)


def converted_from(own: KvLayout, theirs: KvLayout | None) -> KvLayout | None:
    """The layout that blocks of `theirs` are converted from as they come in; None: they need no conversion, or would be
    of no use, in which case the fetch is refused."""
    return theirs if theirs is not None and own.taking(theirs).conversions else None


def new_transfer_id() -> bytes:
    """128 random bits; never derived from anything a client sends."""
    return secrets.token_bytes(16)


@dataclass(slots=True, eq=False)
class Job:
    """One attempt of one request on this worker, as the I/O thread knows it."""

    request_id: str
    attempt: int
    link: ProxyLink
    deadline: float

    @property
    def key(self) -> str:
        return engine_key(self.request_id, self.attempt)


@dataclass(slots=True, eq=False)
class Replies:
    """Tokens of one turn of the I/O loop, sent as one `TokenBatch` per proxy."""

    _deltas: dict[ProxyLink, list[TokenDelta]] = field(default_factory=dict)

    def token(self, job: Job, out: TokenOut, finish: str | None, report: PrefillReport | None) -> None:
        delta = TokenDelta(
            request_id=job.request_id,
            attempt=job.attempt,
            index=out.index,
            tokens=(out.token,),
            logprobs=(out.logprob,) if out.logprob is not None else (),
            finish=finish,
            report=report,
            prompt_logprobs=out.prompt_logprobs,
        )
        self._deltas.setdefault(job.link, []).append(delta)

    def flush(self) -> None:
        for link, deltas in self._deltas.items():
            link.send(TokenBatch(tuple(deltas)))
        self._deltas.clear()


@dataclass(frozen=True, slots=True)
class Parts:
    """The machinery of one worker, shared by its loop and its role."""

    loop: StepLoop
    kv: KvEndpoint
    replies: Replies
    metrics: WorkerMetrics
    max_model_len: int
    clock: Callable[[], float]

    def refuse(self, job: Job, code: str, message: str, *, retryable: bool) -> None:
        """Ends this worker's part of the request; the proxy decides what follows."""
        self.metrics.refused(code)
        job.link.send(Refused(job.request_id, job.attempt, code, message, retryable))

    def refuse_role(self, job: Job, message: Prefill | Decode) -> None:
        self.refuse(job, "wrong_role", f"this worker takes no {type(message).__name__}", retryable=True)

    def is_new(self, job: Job, known: Job | None, num_tokens: int) -> bool:
        """Whether a role takes an assignment on; one that can never be served is refused here.

        `known`: the attempt of the same request that the role works on. Repeated and older assignments change nothing.
        """
        if known is not None and known.attempt >= job.attempt:
            return False
        if num_tokens >= self.max_model_len:
            self.refuse(job, "too_long", "the prompt leaves no room for a token", retryable=False)
            return False
        return True


class Role(Protocol):
    """All methods run on the I/O thread and return at once."""

    def assign(self, link: ProxyLink, message: Prefill | Decode) -> None:
        """A proxy wants something computed. Idempotent on (request, attempt)."""

    def abort(self, message: Abort) -> None:
        """Legal in every state."""

    def stepped(self, event: Stepped) -> None:
        """The step's tokens. The step's wanted blocks are sent after this, so that a note precedes them."""

    def exported_all(self, event: Finished) -> None:
        """The wanted blocks of a step in which requests finished were sent."""

    def expected(self, event: Expected) -> None: ...

    def rejected(self, event: Rejected) -> None: ...

    def transferred(self, events: Iterable[KvEvent]) -> None: ...

    def tick(self, now: float) -> None:
        """Deadlines."""

    def lost(self, link: ProxyLink) -> None:
        """The proxy is gone: free everything it asked for."""

    def hand_back(self) -> None:
        """Draining has run out of time: give every request back to its proxy."""

    @property
    def num_jobs(self) -> int:
        """Attempts of proxies' requests that are not over here."""
