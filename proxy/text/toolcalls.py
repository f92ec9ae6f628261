"""Tool calls in a model's text: what a call is, and the parser of formats whose calls stand between marks.

A call is passed on when it is whole: of a declared function, with arguments that are a JSON object. Whatever is not,
is text and stays text, exactly as the model wrote it. So the result does not depend on how the text is cut.

    text ──opening mark──▶ call ──whole, declared──▶ passed on ──▶ text
                             └──anything else: it was text────────▲

How a call is written is the business of its format's reader (`proxy/text/toolformats.py` has the table).
"""

from __future__ import annotations

import json
import uuid
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from proxy.text.source import Malformed, Source, Steps
from proxy.text.stopstrings import held_length

Accepts = Callable[[dict[str, Any]], bool]
"""Whether a declared function takes these arguments."""
PIECE_CHARS = 4096
"""Longer text is looked at in parts: what follows a broken call is copied."""


@dataclass(frozen=True, slots=True)
class Function:
    """One that the model may call."""

    parameters: Mapping[str, Any]
    """The JSON schema of its arguments."""
    accepts: Accepts
    types: dict[str, frozenset[str] | None] = field(default_factory=dict)
    """The JSON types of its parameters, of those that were asked for; None: any."""


Functions = Mapping[str, Function]


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


@dataclass(frozen=True, slots=True)
class Parsed:
    """What some more text comes to."""

    text: str
    calls: tuple[ToolCall, ...] = ()
    reasoning: str = ""
    """What the model thought, in formats that tell it from the answer."""

    def __add__(self, more: Parsed) -> Parsed:
        return Parsed(self.text + more.text, self.calls + more.calls, self.reasoning + more.reasoning)


class CallParser(Protocol):
    """Splits the text of one choice into text and calls."""

    @property
    def called(self) -> bool:
        """There was a call."""

    @property
    def done(self) -> bool:
        """Nothing that follows belongs to the answer."""

    @property
    def may_be_done(self) -> bool:
        """`done` can come true: the first call ends the answer."""

    @property
    def thinking(self) -> bool:
        """What the model writes now is thought, in a format that tells it from the answer."""

    def push(self, text: str) -> Parsed:
        """What is certain after so much more text."""

    def flush(self, *, complete: bool = False) -> Parsed:
        """The rest, when no text follows. `complete`: the model has ended it, nothing was cut."""


@dataclass(frozen=True, slots=True)
class Found:
    """A call as it is written."""

    name: str
    arguments: Any
    id: str = ""
    """That the model gave it."""


Reader = Callable[[Source, Functions], Steps[list[Found]]]
"""Reads one call, or a list of them, from its opening mark on. Raises `Malformed`."""
MakeId = Callable[[Found, int], str]
"""The id of a call with this index."""


def unique_id(found: Found, index: int) -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


class CallList:
    """The calls of one choice."""

    __slots__ = ("_functions", "_ids", "_make_id", "_parallel")

    def __init__(self, functions: Functions, make_id: MakeId, *, parallel: bool) -> None:
        self._functions = functions
        self._make_id = make_id
        self._parallel = parallel
        self._ids: set[str] = set()

    @property
    def called(self) -> bool:
        return bool(self._ids)

    @property
    def done(self) -> bool:
        return bool(self._ids) and not self._parallel

    @property
    def may_be_done(self) -> bool:
        return not self._parallel

    def add(self, found: Sequence[Found]) -> tuple[ToolCall, ...]:
        """The calls that these are; none unless all of them are calls."""
        written = [self._arguments(call) for call in found]
        if any(arguments is None for arguments in written):
            return ()
        calls = []
        for call, arguments in zip(found, written, strict=True):
            if arguments is not None and not self.done:
                calls.append(ToolCall(len(self._ids), self._id(call), call.name, arguments))
        return tuple(calls)

    def _id(self, call: Found) -> str:
        index = len(self._ids)
        id = self._make_id(call, index)
        if id in self._ids:  # the model wrote it twice
            id = self._make_id(Found(call.name, call.arguments), index)
        if id in self._ids:
            id = unique_id(call, index)
        self._ids.add(id)
        return id

    def _arguments(self, call: Found) -> str | None:
        """Of a call to a declared function that takes them, as JSON."""
        function = self._functions.get(call.name)
        if function is None or not isinstance(call.arguments, dict) or not function.accepts(call.arguments):
            return None
        try:
            written = json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)
            written.encode()
        except (ValueError, RecursionError):  # a number beyond a float, or half of a surrogate pair
            return None
        return written


@dataclass(frozen=True, slots=True)
class Marks:
    """Where calls stand in a text."""

    read: Reader
    opening: tuple[str, ...]
    """With which a call begins, wherever it stands."""
    bare: str = ""
    """With which a call begins where no text is before it, nor between it and another call."""
    after: tuple[str, ...] = ()
    """Marks that belong to a call before them."""
    between: tuple[str, ...] = ()
    """What separates two calls; elsewhere it is text."""
    make_id: MakeId = unique_id
    rereads: bool = False
    """In what turned out to be no call another one is looked for. Only where a broken call cannot hold another as a
    value: that would be some document's, not the model's."""


class MarkedParser:
    """See `CallParser`."""

    __slots__ = (
        "_buffer",
        "_calls",
        "_complete",
        "_ends",
        "_first_letters",
        "_functions",
        "_marks",
        "_over",
        "_pending",
        "_source",
        "_space",
        "_spoken",
        "_steps",
        "_texts",
    )

    thinking = False
    """No format but harmony tells it from the answer."""

    def __init__(self, marks: Marks, functions: Functions, *, parallel: bool = True) -> None:
        """Not `parallel`: the first call ends the answer."""
        self._marks = marks
        self._first_letters = {mark[0] for mark in (*marks.opening, *marks.after, *marks.between)}
        self._functions = functions
        self._calls = CallList(functions, marks.make_id, parallel=parallel)
        self._pending: deque[str] = deque()
        """Text that is not looked at yet."""
        self._buffer = ""
        """Text outside of calls that may begin a mark."""
        self._source: Source | None = None
        """What may be a call, from its mark on."""
        self._steps: Steps[list[Found]] | None = None
        self._space: list[str] = []
        """White space and separators that are only passed on when text follows: around calls they are no text."""
        self._spoken = False
        """Text was passed on since the last call."""
        self._complete = False
        self._ends = False
        """No more than what is pending will come."""
        self._over = False
        """Nothing is pending either."""
        self._texts: list[str] = []

    @property
    def called(self) -> bool:
        return self._calls.called

    @property
    def done(self) -> bool:
        return self._calls.done

    @property
    def may_be_done(self) -> bool:
        return self._calls.may_be_done

    def push(self, text: str) -> Parsed:
        if self._spoken and not self._buffer and self._source is None and self._first_letters.isdisjoint(text):
            return Parsed(text)  # nearly always: no mark can begin in it
        self._pending += _parts(text)
        return self._parsed()

    def flush(self, *, complete: bool = False) -> Parsed:
        self._ends = True
        self._complete = complete
        parsed = self._parsed()
        if self.called:
            return parsed
        return Parsed(parsed.text + "".join(self._space), parsed.calls)

    def _parsed(self) -> Parsed:
        calls: list[ToolCall] = []
        while not self.done and (self._advance(calls) or self._more()):
            pass
        text = "".join(self._texts)
        self._texts.clear()
        return Parsed(text, tuple(calls))

    def _more(self) -> bool:
        """Whether there is something new to look at, be it the end."""
        if self._pending:
            text = self._pending.popleft()
            if self._source is None:
                self._buffer += text
            else:
                self._source.add(text)
            return True
        if self._over or not self._ends:
            return False
        self._over = True
        if self._source is not None:
            self._end(self._source)
        return True

    def _end(self, source: Source) -> None:
        source.over = self._over
        source.complete = self._over and self._complete

    def _advance(self, calls: list[ToolCall]) -> bool:
        """One step on; False when more text is needed for the next."""
        if self._source is None:
            return self._look()
        try:
            assert self._steps is not None
            next(self._steps)
            return False
        except StopIteration as read:
            made = self._calls.add(read.value)
            if made:
                calls += made
                self._space.clear()
                self._spoken = False
            else:
                self._say(self._source.taken)
            self._look_again(self._source.rest)
        except Malformed:
            self._no_call(self._source)
        return True

    def _look(self) -> bool:
        """Passes on what is text for certain, up to a mark."""
        marks = self._marks
        if marks.bare and not self._spoken and self._buffer.lstrip().startswith(marks.bare):
            self._begin(len(self._buffer) - len(self._buffer.lstrip()))
            return True
        known = (*marks.opening, *marks.after, *marks.between)
        found = [(at, mark) for mark in known if (at := self._buffer.find(mark)) >= 0]
        if not found:
            keep = held_length(self._buffer, known) if known and not self._over else 0
            certain = len(self._buffer) - keep
            self._say(self._buffer[:certain])
            self._buffer = self._buffer[certain:]
            return False
        at, mark = min(found)
        if mark in marks.opening:
            self._begin(at)
            return True
        self._say(self._buffer[:at])
        self._buffer = self._buffer[at + len(mark) :]
        if self._spoken or not self.called:
            self._say(mark)
        elif mark in marks.between:
            self._space.append(mark)
        else:
            self._space.clear()
        return True

    def _begin(self, at: int) -> None:
        self._say(self._buffer[:at])
        self._source = Source(self._buffer[at:])
        self._end(self._source)
        self._steps = self._marks.read(self._source, self._functions)
        self._buffer = ""

    def _no_call(self, source: Source) -> None:
        """What was read is text, up to what may begin the next call."""
        taken, opening = source.taken, self._marks.opening
        found = [at for mark in opening if (at := taken.find(mark, 1)) >= 0] if self._marks.rereads else []
        keep = held_length(taken[1:], opening) if opening else 0
        end = min(found, default=len(taken) - keep)
        self._say(taken[:end])
        self._look_again(taken[end:] + source.rest)

    def _look_again(self, text: str) -> None:
        self._source = self._steps = None
        if text:
            self._pending.extendleft(reversed(_parts(text)))
            self._over = False

    def _say(self, text: str) -> None:
        if not self._spoken:
            if not text.strip():
                self._space.append(text)
                return
            self._texts += self._space
            self._space.clear()
            self._spoken = True
        self._texts.append(text)


def _parts(text: str) -> list[str]:
    return [text[i : i + PIECE_CHARS] for i in range(0, len(text), PIECE_CHARS)]
