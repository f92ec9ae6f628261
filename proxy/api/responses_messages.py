"""The items of a conversation as the messages of a chat.

A turn of the assistant is several items (reasoning, then a message, then function calls); for a chat template it is
one message.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.api.responses_items import Item

Message = dict[str, Any]


@dataclass(slots=True, eq=False)
class Turn:
    """What the assistant said between two others."""

    reasoning: str | None = None
    content: str | None = None
    calls: list[Message] = field(default_factory=list)

    def takes(self, kind: str) -> bool:
        """Whether an item of that kind may come next: a template writes them in this order."""
        if kind == "function_call":
            return True
        if self.calls or self.content is not None:
            return False
        return kind == "message" or self.reasoning is None

    def add(self, item: Item) -> None:
        if item["type"] == "reasoning":
            self.reasoning = _text(item.get("content") or item["summary"])
        elif item["type"] == "message":
            self.content = _text(item["content"])
        else:
            function = {"name": item["name"], "arguments": item["arguments"]}
            self.calls.append({"id": item["call_id"], "type": "function", "function": function})

    def message(self) -> Message:
        message: Message = {"role": "assistant", "content": self.content or ""}
        if self.reasoning is not None:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = self.calls
        return message


def chat_messages(instructions: str | None, items: Iterable[Item]) -> list[Message]:
    """`instructions` come first, as the system's message."""
    messages: list[Message | Turn] = []
    if instructions is not None:
        messages.append({"role": "system", "content": instructions})
    for item in items:
        kind = item["type"]
        if kind == "function_call_output":
            messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])})
        elif kind == "message" and item["role"] != "assistant":
            messages.append({"role": item["role"], "content": _text(item["content"])})
        else:
            last = messages[-1] if messages else None
            if not isinstance(last, Turn) or not last.takes(kind):
                last = Turn()
                messages.append(last)
            last.add(item)
    return [message.message() if isinstance(message, Turn) else message for message in messages]


def turn_starts(items: Sequence[Item]) -> list[int]:
    """Where a conversation may begin when what is before is dropped: at a user's message, so that no output is left
    without its call; the last of them stays."""
    return [i for i, item in enumerate(items) if item["type"] == "message" and item["role"] == "user"]


def _text(content: str | Sequence[Item]) -> str:
    """Parts become lines, as in a chat."""
    if isinstance(content, str):
        return content
    return "\n".join(part["refusal"] if part["type"] == "refusal" else part["text"] for part in content)
