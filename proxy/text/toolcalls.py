"""Tool calls in a model's text: formats as data, and a parser for text that comes in pieces.

A call is passed on when it is whole: of a declared function, with arguments that are a JSON object. Whatever is not,
is text and stays text, exactly as the model wrote it. So the result does not depend on how the text is cut.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from mesh.tokenizer import Tokenizer
from proxy.text.stopstrings import held_length

Accepts = Callable[[dict[str, Any]], bool]
"""Whether a declared function takes these arguments."""


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """A JSON object `{"name": ..., "arguments": {...}}` between two marks."""

    name: str
    open: str
    close: str
    others: tuple[str, ...] = ()
    """A chat template with one of these writes another format between the same marks."""


FORMATS = (ToolFormat("hermes", "<tool_call>", "</tool_call>", others=("<function=", "<arg_key>")),)


def format_of(tokenizer: Tokenizer) -> ToolFormat | None:
    """The format that the model's chat template shows it; None for one that is not known here."""
    text = "" if tokenizer.chat is None else tokenizer.chat.text
    found = (f for f in FORMATS if f.open in text and not any(other in text for other in f.others))
    return next(found, None)


@dataclass(frozen=True, slots=True)
class ToolCall:
    index: int
    id: str
    name: str
    arguments: str
    """A JSON object."""

    def object(self) -> dict[str, Any]:
        """As in a message."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class ToolCallParser:
    """Splits the text of one choice into text and calls."""

    __slots__ = ("_buffer", "_called", "_format", "_functions", "_in_call", "_parallel", "_space", "_spoken")

    def __init__(self, format: ToolFormat, functions: Mapping[str, Accepts], *, parallel: bool = True) -> None:
        """`functions`: the declared ones by name. Not `parallel`: the first call ends the answer."""
        self._format = format
        self._functions = functions
        self._parallel = parallel
        self._buffer = ""
        """Not yet passed on: what may begin a mark, or a call from its mark on."""
        self._in_call = False
        self._space = ""
        """White space that is only passed on when text follows it: around calls it separates."""
        self._spoken = False
        """Text was passed on since the last call."""
        self._called = 0

    @property
    def called(self) -> bool:
        return self._called > 0

    @property
    def done(self) -> bool:
        """Nothing that follows belongs to the answer."""
        return self._called > 0 and not self._parallel

    def push(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Text and calls that are certain after so much more text."""
        self._buffer += text
        texts: list[str] = []
        calls: list[ToolCall] = []
        while not self.done and self._advance(texts, calls):
            pass
        return "".join(texts), tuple(calls)

    def flush(self) -> tuple[str, tuple[ToolCall, ...]]:
        """The rest, when no text follows."""
        texts: list[str] = []
        calls: list[ToolCall] = []
        while self._buffer and not self.done:
            if self._in_call:
                self._end_call(texts, calls)
            else:
                self._say(self._buffer, texts)
                self._buffer = ""
        if not self.called:
            texts.append(self._space)
            self._space = ""
        return "".join(texts), tuple(calls)

    def _advance(self, texts: list[str], calls: list[ToolCall]) -> bool:
        """One step on; False when more text is needed for the next."""
        if self._in_call:
            return self._take_call(texts, calls)
        at = self._buffer.find(self._format.open)
        if at < 0:
            keep = held_length(self._buffer, (self._format.open,))
            certain = len(self._buffer) - keep
            self._say(self._buffer[:certain], texts)
            self._buffer = self._buffer[certain:]
            return False
        self._say(self._buffer[:at], texts)
        self._buffer = self._buffer[at:]
        self._in_call = True
        return True

    def _take_call(self, texts: list[str], calls: list[ToolCall]) -> bool:
        """The call at the buffer's start, up to the first closing mark that is not inside of a JSON string."""
        mark, end = self._format, len(self._format.open)
        while (at := self._buffer.find(mark.close, end)) >= 0:
            end = at + len(mark.close)
            body = self._buffer[len(mark.open) : at]
            if _ends_in_string(body):
                continue
            self._in_call = False
            if not self._call(body, calls):
                self._say(self._buffer[:end], texts)
            self._buffer = self._buffer[end:]
            return True
        return False

    def _end_call(self, texts: list[str], calls: list[ToolCall]) -> None:
        """The text is over within a call: models forget the last closing mark; else its beginning is text."""
        mark = self._format
        self._in_call = False
        if self._call(self._buffer[len(mark.open) :], calls):
            self._buffer = ""
            return
        at = self._buffer.find(mark.close)
        end = len(self._buffer) if at < 0 else at + len(mark.close)
        self._say(self._buffer[:end], texts)
        self._buffer = self._buffer[end:]
        more, found = self.push("")
        texts.append(more)
        calls.extend(found)

    def _call(self, body: str, calls: list[ToolCall]) -> bool:
        """Adds the call that `body` is; False when it is none."""
        try:
            call = json.loads(body, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return False
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            return False
        arguments = call.get("arguments", call.get("parameters", {}))
        accepts = self._functions.get(call["name"])
        if accepts is None or not isinstance(arguments, dict) or not accepts(arguments):
            return False
        try:
            written = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        except ValueError:  # a number beyond what a float holds
            return False
        calls.append(ToolCall(self._called, f"call_{uuid.uuid4().hex[:24]}", call["name"], written))
        self._called += 1
        self._space, self._spoken = "", False
        return True

    def _say(self, text: str, texts: list[str]) -> None:
        if not self._spoken:
            text = self._space + text
            self._space = ""
            if not text.strip():
                self._space = text
                return
            self._spoken = True
        texts.append(text)


def _ends_in_string(body: str) -> bool:
    """Whether a JSON text is broken off inside of a string."""
    inside = escaped = False
    for character in body:
        if escaped:
            escaped = False
        elif inside and character == "\\":
            escaped = True
        elif character == '"':
            inside = not inside
    return inside


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
