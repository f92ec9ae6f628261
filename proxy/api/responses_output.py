"""The output of a response as it grows: items one after the other, of which the last may be open.

text ──▶ message        thinking ──▶ reasoning        a whole call ──▶ function_call
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from proxy.api.responses_items import Item, ItemIds
from proxy.text.choice import Piece
from proxy.text.toolcalls import ToolCall


class Kind(Enum):
    """How the ids of such items begin."""

    MESSAGE = "msg"
    REASONING = "rs"
    CALL = "fc"


class Change(Enum):
    OPENED = "opened"
    GREW = "grew"
    CLOSED = "closed"


@dataclass(slots=True, eq=False)
class OutputItem:
    """One item; `object` is what clients see of it now."""

    kind: Kind
    id: str
    index: int
    call: ToolCall | None = None
    texts: list[str] = field(default_factory=list)
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    status: str = "in_progress"

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def part(self) -> Item:
        """The one part of its content."""
        if self.kind is Kind.REASONING:
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": self.logprobs}

    def object(self) -> Item:
        content = [self.part()] if self.status != "in_progress" else []
        if self.kind is Kind.REASONING:
            fields: Item = {"type": "reasoning", "summary": [], "content": content, "encrypted_content": None}
        elif self.call is not None:
            names = {"call_id": self.call.id, "name": self.call.name}
            fields = {"type": "function_call", **names, "arguments": self.text}
        else:
            fields = {"type": "message", "role": "assistant", "content": content}
        return {"id": self.id, **fields, "status": self.status}


@dataclass(frozen=True, slots=True)
class Step:
    """What happened to an item; for `GREW` with what was added."""

    change: Change
    item: OutputItem
    text: str = ""
    logprobs: Sequence[dict[str, Any]] = ()


class Output:
    """Live output of one response."""

    def __init__(self, ids: ItemIds) -> None:
        self._ids = ids
        self._items: list[OutputItem] = []
        self._held: list[dict[str, Any]] = []
        """Log-probabilities of tokens whose text is held back until it is certain."""

    def take(self, piece: Piece, logprobs: Sequence[dict[str, Any]]) -> Iterator[Step]:
        """`logprobs`: of the piece's tokens that belong to the answer."""
        if piece.reasoning:
            self._held.clear()  # the mark before it
        self._held += logprobs
        if piece.reasoning:
            yield from self._said(Kind.REASONING, piece.reasoning)
        if piece.text:
            yield from self._said(Kind.MESSAGE, piece.text)
        for call in piece.calls:
            self._held.clear()
            yield from self._opened(Kind.CALL, call)
            yield from self._said(Kind.CALL, call.arguments)
            yield from self._closed("completed")

    def extend(self, text: str) -> bool:
        """Adds text where a message is open, which is most of the time; False when more must happen for it."""
        item = self._items[-1] if self._items else None
        if item is None or item.kind is not Kind.MESSAGE or item.status != "in_progress":
            return False
        item.texts.append(text)
        return True

    def end(self, status: str) -> Iterator[Step]:
        """Closes what is open, which may be incomplete. An output without anything is an empty message."""
        if not self._items:
            yield from self._opened(Kind.MESSAGE)
        last = self._items[-1]
        if last.kind is Kind.MESSAGE:
            last.logprobs += self._held
        yield from self._closed(status)

    def objects(self, *, unfinished: str | None = None) -> list[Item]:
        """Of all items; the open one, if there is, has the status `unfinished`."""
        last = self._items[-1] if self._items else None
        if unfinished is not None and last is not None and last.status == "in_progress":
            last.status = unfinished
        return [item.object() for item in self._items]

    def _said(self, kind: Kind, text: str) -> Iterator[Step]:
        if not self._items or self._items[-1].kind is not kind or self._items[-1].status != "in_progress":
            yield from self._opened(kind)
        item = self._items[-1]
        item.texts.append(text)
        logprobs: Sequence[dict[str, Any]] = ()
        if kind is Kind.MESSAGE and self._held:
            logprobs, self._held = self._held, []
            item.logprobs += logprobs
        yield Step(Change.GREW, item, text, logprobs)

    def _opened(self, kind: Kind, call: ToolCall | None = None) -> Iterator[Step]:
        yield from self._closed("completed")
        item = OutputItem(kind, self._ids.new(kind.value), len(self._items), call)
        self._items.append(item)
        yield Step(Change.OPENED, item)

    def _closed(self, status: str) -> Iterator[Step]:
        if self._items and self._items[-1].status == "in_progress":
            self._items[-1].status = status
            yield Step(Change.CLOSED, self._items[-1])
