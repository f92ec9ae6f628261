"""One request inside the engine: its tokens, how many are computed, which blocks hold them.

    FETCHING ─ready──▶ WAITING ─scheduled──▶ RUNNING ─stop/length──▶ FINISHED
       │                  ▲                     │ └─stop_after, hold──▶ HELD ─release──▶ FINISHED
       └──────────────────┴──── preempted ──────┘
    abort is legal in every state and ends in FINISHED

The token positions of a request, as half-open ranges:

    0 ........ num_computed_tokens ........ num_tokens
    [ KV in pages of block_table )[ owed to the model )
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from engine.grammar import Flags, Matcher
from engine.thinking import Thought
from mesh.messages import TokenLogprob
from mesh.params import SamplingParams


class RequestState(Enum):
    FETCHING = "fetching"
    """Holds the blocks it has and waits for others to be filled from outside; not scheduled."""
    WAITING = "waiting"
    RUNNING = "running"
    HELD = "held"
    """Finished here, but its blocks stay referenced until `release` so that a peer can fetch them."""
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class EngineRequest:
    """Live state, owned by the engine's thread."""

    key: str
    tokens: list[int]
    """Prompt and output so far."""
    num_prompt_tokens: int
    params: SamplingParams
    hash_root: bytes
    stop_after: int | None = None
    """Leave this engine after so many new tokens (a prefill worker: 1)."""
    hold: bool = False
    """Keep the blocks referenced after leaving by `stop_after`."""
    matcher: Matcher | None = None
    """Of `params.grammar`; whoever hands the request in has compiled it."""
    thought: Thought | None = field(init=False)
    """Of `params.thinking`."""
    state: RequestState = RequestState.WAITING
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    """Pages of positions `[0, len(block_table) * block_tokens)`; empty while FETCHING."""
    fetched_pages: dict[int, int] = field(default_factory=dict)
    """While FETCHING: the page of each block (by its position) that is here already; later empty."""
    partial_pages: dict[int, int] = field(default_factory=dict)
    """While FETCHING from a worker of another layout: the page of each block of which only parts have come."""
    block_hashes: list[bytes] = field(default_factory=list)
    """Names of the full blocks of `tokens`, extended as they are needed."""
    num_sealed_blocks: int = 0
    """Leading blocks whose KV is complete and whose pages carry their names."""
    num_ready_blocks: int = 0
    """Leading full blocks reported as `BlockReady`."""
    num_cached_tokens: int = 0
    """Prompt tokens found in this engine's prefix cache when first scheduled (or `ready`)."""
    num_fetched_tokens: int = 0
    """Prompt tokens filled from outside."""
    num_new_tokens: int = 0
    """Tokens sampled by this engine."""
    num_preemptions: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    """Collected over the prompt's chunks: entry i is about `tokens[i + 1]`."""
    order: tuple[int, int] = (0, 0)
    """(priority, arrival in this engine, from 1): scheduling and preemption go by it."""
    num_initial_tokens: int = 0
    """Tokens the request came with; its blocks and tail are what a peer fetches."""
    arrived: float = 0.0
    """Engine clock, seconds."""
    first_scheduled: float | None = None

    def __post_init__(self) -> None:
        self.thought = None if self.params.thinking is None else Thought(self.params.thinking)

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def num_owed_tokens(self) -> int:
        return len(self.tokens) - self.num_computed_tokens

    @property
    def wants_prompt_logprobs(self) -> bool:
        """The prompt has to pass through the model here: nobody has sampled from it yet."""
        return self.params.prompt_logprobs is not None and len(self.tokens) == self.num_prompt_tokens

    def allowed(self) -> Flags | None:
        """Per token id, as far as the flags go, whether thinking and grammar let it follow; None: any may.

        Raises `GrammarError` when the grammar cannot be followed.
        """
        if self.thought is None and self.matcher is None:
            return None
        thought, output = self.thought, self.tokens[self.num_prompt_tokens :]
        if thought is not None:
            thought.follow(output)
            if thought.forced is not None:
                flags = np.zeros(thought.forced + 1, np.bool_)
                flags[-1] = True
                return flags
            if thought.answer_at is None and not thought.may_open:
                return None
        if self.matcher is None:
            return None
        flags = self.matcher.allowed(output, self.params, 0 if thought is None else thought.answer_at or 0)
        opening = None if self.params.thinking is None else self.params.thinking.open
        if thought is not None and thought.may_open and opening is not None:
            flags = flags.copy()
            flags[opening] = True
        return flags
