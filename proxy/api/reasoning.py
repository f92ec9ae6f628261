"""What a chat body wants of the thinking before the answer: shown or not, how long, and where its answer begins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mesh.params import Thinking
from mesh.tokenizer import Tokenizer
from proxy.api.errors import unsupported
from proxy.api.schemas import ChatBody
from proxy.text.reasoning import Delivery, ReasoningFormat, ReasoningParser

PROMPT_TAIL_TOKENS = 32
"""A mark at a prompt's end, and the line breaks behind it."""


@dataclass(frozen=True, slots=True)
class Reasoning:
    """The thinking of one request."""

    format: ReasoningFormat
    opened: bool
    """The prompt has begun it."""
    delivery: Delivery | None
    """None: as text, like the answer."""
    mark_ids: frozenset[int]
    thinking: Thinking | None
    """For the workers, where they must know: a budget, or a grammar that begins after it."""

    def parser(self) -> ReasoningParser | None:
        """For one choice."""
        if self.delivery is None:
            return None
        return ReasoningParser(self.format, opened=self.opened, delivery=self.delivery)


def reasoning_of(
    body: ChatBody,
    format: ReasoningFormat | None,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    *,
    constrained: bool,
) -> Reasoning | None:
    """None when the whole output is the answer. Raises `RequestError` 400 for a budget that cannot be kept.

    `constrained`: the answer has a grammar. A format whose marks are not one token each cannot be followed by the
    workers, so such an answer is not preceded by thinking.
    """
    budget = body.thinking_token_budget
    if format is None:
        if budget is not None:
            raise unsupported("thinking_token_budget", "this model has no thinking that is known here")
        return None
    open_id, close_id = (_one_token(mark, tokenizer) for mark in (format.open, format.close))
    tail = tokenizer.decode(prompt[-PROMPT_TAIL_TOKENS:], skip_special_tokens=False).rstrip()
    opened = tail.endswith(format.open)
    followed = close_id is not None and (opened or open_id is not None)
    if budget is not None and not followed:
        raise unsupported("thinking_token_budget", "the marks of this model's thinking are not single tokens")
    delivery = None if constrained and not followed else _delivery(body)
    thinking = None
    if close_id is not None and followed and not tail.endswith(format.close) and (constrained or budget is not None):
        thinking = Thinking(close_id, None if opened else open_id, budget)
    if delivery is None and thinking is None:
        return None
    marks = frozenset(i for i in (open_id, close_id) if i is not None)
    return Reasoning(format, opened, delivery, marks, thinking)


def check_own_channel(body: ChatBody) -> None:
    """For a model that thinks in a channel of its own (harmony): the split cannot be undone, nor be put off. Raises
    `RequestError` 400."""
    for name in ("separate_reasoning", "stream_reasoning"):
        if getattr(body, name) is False:
            raise unsupported(name, "this model thinks in a channel of its own")


def _delivery(body: ChatBody) -> Delivery | None:
    if body.separate_reasoning is False:
        return None
    if body.include_reasoning is False:
        return Delivery.HIDDEN
    return Delivery.WHOLE if body.stream_reasoning is False else Delivery.STREAMED


def _one_token(mark: str, tokenizer: Tokenizer) -> int | None:
    found: int | None = tokenizer.backend.token_to_id(mark)
    return found
