"""What passes between scheduler, runner and caller in one engine step.

A step is: schedule rows within the token budget, run the model over them, update the requests, emit. Nothing here is
changed once made; what is made once per row and step is not declared frozen, because that quadruples its cost.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from engine.request import EngineRequest
from mesh.layout import KvLayout
from mesh.messages import TokenLogprob
from mesh.pieces import Piece


@dataclass(slots=True)
class Row:
    """One request's share of a step: positions `[num_computed_tokens, num_computed_tokens + num_tokens)`.

    The request's `block_table` already has a page for every one of them.
    """

    request: EngineRequest
    num_tokens: int

    @property
    def samples(self) -> bool:
        """The step catches up with the request's tokens, so it yields the next one."""
        return self.num_tokens == self.request.num_owed_tokens


@dataclass(slots=True)
class Sampled:
    """What the model says of one row."""

    token: int | None
    """None for a row that does not catch up, or fails."""
    logprob: TokenLogprob | None = None
    prompt_logprobs: tuple[TokenLogprob, ...] = ()
    """For the row's prompt positions when asked for: entry i is about the token after the row's i-th position."""
    failure: str | None = None
    """Why no token can follow: the request's grammar has none, or became too complex."""


class Runner(Protocol):
    """A model over a paged KV pool. Used by one thread."""

    layout: KvLayout
    num_blocks: int
    decodes_ahead: bool
    """It computes a step more than it was asked for, where the pages for it are there."""

    def run(self, rows: Sequence[Row]) -> list[Sampled]:
        """Computes the rows' KV into their pages and samples where a row catches up. One result per row."""

    def read_block(self, block: int, valid_tokens: int) -> bytes:
        """A copy of the page's bytes, zero where a token position is not below `valid_tokens`."""

    def write_block(self, block: int, payload: bytes | memoryview) -> None:
        """Overwrites the page; `len(payload) == layout.block_bytes`."""

    def write_parts(self, payload: bytes | memoryview, theirs: KvLayout, parts: Sequence[tuple[int, Piece]]) -> None:
        """Writes parts of one block of a worker whose layout is `theirs`, each into its page, converted."""


@dataclass(frozen=True, slots=True)
class Missing:
    """A block to be fetched, of the size that the worker it is fetched from has."""

    index: int
    """Position in the request's block table, as that worker has it."""
    hash: bytes
    valid_tokens: int
    """A whole block's tokens, or fewer for the partly filled last block."""


@dataclass(slots=True)
class TokenOut:
    """One new token."""

    request: EngineRequest
    index: int
    """Among the request's generated tokens, from 0."""
    token: int
    logprob: TokenLogprob | None
    finish: str | None
    """`stop`, `length`, or `handoff` (left by `stop_after`)."""
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockReady:
    """A page of a request's prompt is complete: every full block, then the partly filled last one."""

    request: EngineRequest
    index: int
    hash: bytes
    valid_tokens: int


@dataclass(frozen=True, slots=True)
class Failed:
    """A request that ended without a finish; no other engine could do better."""

    request: EngineRequest
    reason: str


@dataclass(frozen=True, slots=True)
class StepOutput:
    """Everything a step changed that somebody outside may care about."""

    tokens: tuple[TokenOut, ...]
    ready: tuple[BlockReady, ...]
    stored: tuple[bytes, ...]
    """Names of full blocks that became reusable since the last step."""
    removed: tuple[bytes, ...]
    num_scheduled_tokens: int
    failed: tuple[Failed, ...] = ()
