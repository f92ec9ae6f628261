"""A text that is read while it comes: readers are generators that yield when they need more of it.

Whatever a reader takes, it takes by what the text says and never by how much has come, so a result, and the place of a
failure, is a function of the text alone. Everything is looked at once: no step goes back to the beginning.
"""

from __future__ import annotations

import re
from collections.abc import Generator
from typing import TypeVar

from proxy.text.stopstrings import held_length

T = TypeVar("T")
Steps = Generator[None, None, T]
BLANKS = re.compile(r"[ \t\r\n]*")


class Malformed(Exception):
    """The text is not what its reader knows; none of it is lost."""


class Source:
    """The text from some place on."""

    __slots__ = ("_at", "_pieces", "_rest", "complete", "over")

    def __init__(self, text: str = "", *, over: bool = False) -> None:
        self._pieces = [text]
        self._rest = text
        self._at = 0
        """Place in `_rest` of what is not yet taken."""
        self.over = over
        """No more will come."""
        self.complete = False
        """It is over because the model ended it; else it may have been cut anywhere."""

    def add(self, text: str) -> None:
        self._pieces.append(text)
        self._rest = self._rest[self._at :] + text
        self._at = 0

    @property
    def rest(self) -> str:
        """What is not yet taken."""
        return self._rest[self._at :]

    @property
    def taken(self) -> str:
        """What was taken since the beginning, or since `forget`."""
        text = "".join(self._pieces)
        return text[: len(text) - (len(self._rest) - self._at)]

    def forget(self) -> None:
        """What is taken is done with."""
        self._pieces = [self.rest]

    def more(self) -> Steps[bool]:
        """Waits for more text; False when none will come."""
        come = len(self._pieces)
        while len(self._pieces) == come and not self.over:
            yield
        return len(self._pieces) > come

    def next(self) -> Steps[str]:
        """The next character, which is not taken; "" at the end."""
        while self._at == len(self._rest):
            if not (yield from self.more()):
                return ""
        return self._rest[self._at]

    def take(self, count: int = 1) -> str:
        """So many characters that are known to be there."""
        self._at += count
        return self._rest[self._at - count : self._at]

    def back(self, mark: str) -> None:
        """Gives back a mark that was just taken."""
        self._at -= len(mark)

    def run(self, pattern: re.Pattern[str]) -> Steps[str]:
        """All that follows of one kind; `pattern` is a repeated class of characters."""
        parts = []
        while True:
            found = pattern.match(self._rest, self._at)
            assert found is not None
            parts.append(self.take(found.end() - self._at))
            if self._at < len(self._rest) or not (yield from self.more()):
                return "".join(parts)

    def ahead(self, *marks: str) -> Steps[str]:
        """Which of the marks follows, without taking it; "" for none. None of them may begin another."""
        longest = max(map(len, marks))
        while True:
            rest = self._rest[self._at : self._at + longest]
            found = next((mark for mark in marks if rest.startswith(mark)), None)
            if found is not None:
                return found
            if not any(mark.startswith(rest) for mark in marks) or not (yield from self.more()):
                return ""

    def mark(self, *marks: str) -> Steps[str]:
        """Takes one of the marks. Raises `Malformed` when none follows."""
        found = yield from self.ahead(*marks)
        if not found:
            raise Malformed
        return self.take(len(found))

    def part(self, *marks: str) -> Steps[tuple[str, str]]:
        """What is certain of the text before the first of the marks, and that mark; "" when it has not come yet.
        Two empty strings at the end."""
        while True:
            found = [(at, mark) for mark in marks if (at := self._rest.find(mark, self._at)) >= 0]
            if found:
                at, mark = min(found)
                text = self.take(at - self._at)
                return text, self.take(len(mark))
            certain = len(self._rest) - self._at
            if not self.over:
                certain -= held_length(self.rest, marks)
            if certain:
                return self.take(certain), ""
            if not (yield from self.more()) and self._at == len(self._rest):
                return "", ""

    def until(self, *marks: str) -> Steps[str]:
        """The text before the first of the marks, which is taken as well. Raises `Malformed` when none comes."""
        parts = []
        while True:
            text, mark = yield from self.part(*marks)
            parts.append(text)
            if mark:
                return "".join(parts)
            if not text:
                raise Malformed

    def ended(self) -> Steps[bool]:
        """Whether nothing follows."""
        return not (yield from self.next())
