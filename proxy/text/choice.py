"""The text of one choice: tokens in; text, the end and the place of each token in the text out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from proxy.text.detokenizer import Detokenizer
from proxy.text.reasoning import ReasoningParser
from proxy.text.stopstrings import StopStrings
from proxy.text.toolcalls import CallParser, Parsed, ToolCall


class Piece(NamedTuple):
    """What some new tokens of a choice come to."""

    text: str
    num_tokens: int
    """How many of the tokens belong to the choice: fewer than were given when a stop string ended it."""
    finish: str | None
    offsets: tuple[int, ...]
    """Characters of the choice's text before each of those tokens."""
    calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    """What the model thought before its answer; comes before `text`."""
    num_reasoning_tokens: int = 0
    """How many of the tokens belong to the thinking, its marks included."""
    stop_string: str | None = None
    """The client's stop string that ended the choice, if one did."""


class ChoiceText:
    """Live text state of one choice."""

    __slots__ = (
        "_decoded",
        "_detokenizer",
        "_hide_stop_token",
        "_min_tokens",
        "_plain",
        "_reasoning",
        "_stops",
        "_tools",
        "finish",
        "num_tokens",
        "only_engine_ends",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopStrings | None = None,
        tools: CallParser | None = None,
        reasoning: ReasoningParser | None = None,
        *,
        hide_stop_token: bool = True,
        min_tokens: int = 0,
        start: int = 0,
    ) -> None:
        """`hide_stop_token`: the token with which the engine says `stop` adds no text. No stop string is looked for
        in the first `min_tokens` tokens. `start` is the length of the text before the first token (an echoed prompt).
        """
        self._detokenizer = detokenizer
        self._stops = stops
        self._tools = tools
        self._reasoning = reasoning
        self._hide_stop_token = hide_stop_token
        self._min_tokens = min_tokens
        self._decoded = start
        self._plain = stops is None and tools is None and reasoning is None
        """Every token's text is the choice's as it is."""
        self.only_engine_ends = stops is None and not (tools is not None and tools.may_be_done)
        """No text ends it."""
        self.num_tokens = 0
        self.finish: str | None = None

    def push(self, tokens: Sequence[int], finish: str | None) -> Piece:
        """`finish`: what the engine says of the last of `tokens`."""
        if self._plain and finish is None and len(tokens) == 1:  # nearly always
            self.num_tokens += 1
            offset, new = self._decoded, self._detokenizer.push(tokens[0])
            self._decoded += len(new)
            return Piece(new, 1, None, (offset,))
        text = reasoning = ""
        parsed = Parsed("")
        num_reasoning = 0
        offsets = []
        for i, token in enumerate(tokens):
            self.num_tokens += 1
            offsets.append(self._decoded)
            ends = finish == "stop" and i == len(tokens) - 1
            new = self._shown("" if ends and self._hide_stop_token else self._detokenizer.push(token))
            if self._reasoning is not None and not self._reasoning.over:
                thinks = self._reasoning.thinking
                thought, new = self._reasoning.push(new)
                reasoning += thought
                num_reasoning += thinks or self._reasoning.thinking
            if self._tools is None:
                text += new
            else:
                thinks = self._tools.thinking
                parsed += self._tools.push(new)
                num_reasoning += thinks or self._tools.thinking
            if self._matched:
                break
        if finish is not None or self._matched:
            thought, last = self._last(finish)
            reasoning += thought
            text += last
        self.finish = "stop" if self._matched else finish
        parsed = Parsed(text) if self._tools is None else parsed + self._parsed(self._tools, text)
        reasoning += parsed.reasoning
        stop = None if self._stops is None else self._stops.matched
        return Piece(
            parsed.text, len(offsets), self.finish, tuple(offsets), parsed.calls, reasoning, num_reasoning, stop
        )

    def _last(self, finish: str | None) -> tuple[str, str]:
        """Thinking and text that were held back, when no token follows."""
        text = ""
        if finish is not None and not self._matched:
            text = self._shown(self._detokenizer.flush())
            if self._stops is not None and not self._matched:
                text += self._stops.flush()
        if self._reasoning is None or self._reasoning.over:
            return "", text
        thought, said = self._reasoning.push(text)
        more_thought, more = self._reasoning.flush()
        return thought + more_thought, said + more

    def _parsed(self, tools: CallParser, text: str) -> Parsed:
        """Text without the calls in it. An answer that ends by itself after a call ends with `tool_calls`."""
        parsed = tools.push(text)
        if self.finish is not None:
            parsed += tools.flush(complete=self.finish == "stop" and not self._matched)
        if tools.done or (tools.called and self.finish == "stop"):
            self.finish = "tool_calls"
        return parsed

    @property
    def _matched(self) -> bool:
        return self._stops is not None and self._stops.matched is not None

    def _shown(self, text: str) -> str:
        """What of newly decoded text is certain to stay."""
        self._decoded += len(text)
        if self._stops is None or self.num_tokens <= self._min_tokens:
            return text
        return self._stops.push(text)
