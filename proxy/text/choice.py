"""The text of one choice: tokens in; text, the end and the place of each token in the text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from proxy.text.detokenizer import Detokenizer
from proxy.text.stopstrings import StopStrings
from proxy.text.toolcalls import ToolCall, ToolCallParser


@dataclass(frozen=True, slots=True)
class Piece:
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
    stop_string: str | None = None
    """The client's stop string that ended the choice, if one did."""


class ChoiceText:
    """Live text state of one choice."""

    __slots__ = (
        "_decoded",
        "_detokenizer",
        "_hide_stop_token",
        "_min_tokens",
        "_stops",
        "_tools",
        "finish",
        "num_tokens",
    )

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: StopStrings | None = None,
        tools: ToolCallParser | None = None,
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
        self._hide_stop_token = hide_stop_token
        self._min_tokens = min_tokens
        self._decoded = start
        self.num_tokens = 0
        self.finish: str | None = None

    def push(self, tokens: Sequence[int], finish: str | None) -> Piece:
        """`finish`: what the engine says of the last of `tokens`."""
        text = ""
        offsets = []
        for i, token in enumerate(tokens):
            self.num_tokens += 1
            offsets.append(self._decoded)
            ends = finish == "stop" and i == len(tokens) - 1
            text += self._shown("" if ends and self._hide_stop_token else self._detokenizer.push(token))
            if self._matched:
                break
        if finish is not None and not self._matched:
            text += self._shown(self._detokenizer.flush())
            if self._stops is not None and not self._matched:
                text += self._stops.flush()
        self.finish = "stop" if self._matched else finish
        calls: tuple[ToolCall, ...] = ()
        if self._tools is not None:
            text, calls = self._parsed(self._tools, text)
        stop = None if self._stops is None else self._stops.matched
        return Piece(text, len(offsets), self.finish, tuple(offsets), calls, stop_string=stop)

    def _parsed(self, tools: ToolCallParser, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Text without the calls in it. An answer that ends by itself after a call ends with `tool_calls`."""
        said, calls = tools.push(text)
        if self.finish is not None:
            rest, more = tools.flush()
            said, calls = said + rest, calls + more
        if tools.done or (tools.called and self.finish == "stop"):
            self.finish = "tool_calls"
        return said, calls

    @property
    def _matched(self) -> bool:
        return self._stops is not None and self._stops.matched is not None

    def _shown(self, text: str) -> str:
        """What of newly decoded text is certain to stay."""
        self._decoded += len(text)
        if self._stops is None or self.num_tokens <= self._min_tokens:
            return text
        return self._stops.push(text)
