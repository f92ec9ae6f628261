"""A conversation as Anthropic's clients write it, as messages of a chat body."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from typing import Any

from mesh.errors import RequestError
from proxy.api.errors import unsupported

ERROR_PREFIX = "Error: "
"""How a model learns that a tool failed: chat templates have no place for `is_error`."""

Block = dict[str, Any]


def chat_messages(system: Any, messages: Any) -> list[dict[str, Any]]:
    """The messages of a chat body. Raises `RequestError` 400 that names what is wrong or not served.

    Successive messages of one role are one turn, as at Anthropic; many chat templates insist on it.
    """
    result: list[dict[str, Any]] = []
    if system is not None:
        result.append({"role": "system", "content": _text(system, "system")})
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "messages must be a list of at least one message.", param="messages")
    checked = [_message(message, f"messages.{i}") for i, message in enumerate(messages)]
    for role, turn in groupby(checked, key=lambda message: message[0]):
        result += TURNS[role]([block for _, blocks in turn for block in blocks])
    if result[-1].get("tool_calls"):
        raise RequestError(400, "messages: tool_use must be followed by a tool_result.", param="messages")
    return result


def _message(message: Any, where: str) -> tuple[str, list[Block]]:
    """Role and checked blocks."""
    if not isinstance(message, dict):
        raise RequestError(400, f"{where} must be an object.", param=where)
    if len(message) > 2:
        raise RequestError(400, f"{where} must have role and content and nothing else.", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in TURNS:
        raise RequestError(400, f"{where}.role must be user, assistant or system.", param=f"{where}.role")
    content = message.get("content")
    if isinstance(content, str):
        return role, [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise RequestError(400, f"{where}.content must be a string or a list of blocks.", param=f"{where}.content")
    return role, [_block(block, role, f"{where}.content.{i}") for i, block in enumerate(content)]


def _block(block: Any, role: str, where: str) -> Block:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(block, dict) or not isinstance(kind, str):
        raise RequestError(400, f"{where} must be an object with a type.", param=f"{where}.type")
    fields = FIELDS.get((role, kind))
    if fields is None:
        served = ", ".join(k for r, k in FIELDS if r == role)
        raise unsupported(f"{where}.type", f"of {role} messages these blocks are served: {served}")
    for name, wanted in fields.items():
        if not isinstance(block.get(name), wanted):
            raise RequestError(400, f"{where}.{name} must be {NAMES[wanted]}.", param=f"{where}.{name}")
    if kind != "tool_result":
        return block
    failed = block.get("is_error")
    if not isinstance(failed, bool | None):
        raise RequestError(400, f"{where}.is_error must be true or false.", param=f"{where}.is_error")
    content = block.get("content")
    text = "" if content is None else _text(content, f"{where}.content")
    return {**block, "content": ERROR_PREFIX + text if failed else text}


def _text(content: Any, where: str) -> str:
    """The text: of the string, or of all text blocks, a line each."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(400, f"{where} must be a string or a list of text blocks.", param=where)
    # Blocks of a system message are text and nothing else.
    return _joined([_block(block, "system", f"{where}.{i}") for i, block in enumerate(content)])


def _joined(blocks: list[Block]) -> str:
    return "\n".join(block["text"] for block in blocks if block["type"] == "text")


def _system_turn(blocks: list[Block]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": _joined(blocks)}]


def _user_turn(blocks: list[Block]) -> list[dict[str, Any]]:
    """A message for each result of a tool, and one for the text between them."""
    result: list[dict[str, Any]] = []
    for is_result, group in groupby(blocks, key=lambda block: block["type"] == "tool_result"):
        if is_result:
            result += [{"role": "tool", "tool_call_id": b["tool_use_id"], "content": b["content"]} for b in group]
        else:
            result.append({"role": "user", "content": _joined(list(group))})
    return result or [{"role": "user", "content": ""}]


def _assistant_turn(blocks: list[Block]) -> list[dict[str, Any]]:
    """One message; thinking that nobody but its author can read is left out."""
    message: dict[str, Any] = {"role": "assistant", "content": _joined(blocks)}
    thoughts = [block["thinking"] for block in blocks if block["type"] == "thinking"]
    if any(thoughts):
        message["reasoning_content"] = "\n".join(thoughts)
    calls = [
        {"id": b["id"], "type": "function", "function": {"name": b["name"], "arguments": b["input"]}}
        for b in blocks
        if b["type"] == "tool_use"
    ]
    if calls:
        message["tool_calls"] = calls
    return [message]


TURNS: dict[str, Callable[[list[Block]], list[dict[str, Any]]]] = {
    "user": _user_turn,
    "assistant": _assistant_turn,
    "system": _system_turn,
}
FIELDS: dict[tuple[str, str], dict[str, type]] = {
    ("system", "text"): {"text": str},
    ("user", "text"): {"text": str},
    ("user", "tool_result"): {"tool_use_id": str},
    ("assistant", "text"): {"text": str},
    ("assistant", "tool_use"): {"id": str, "name": str, "input": dict},
    ("assistant", "thinking"): {"thinking": str},
    ("assistant", "redacted_thinking"): {},
}
"""The blocks of each role with the fields that are read; cache_control, citations, signature and the like change
nothing."""
NAMES: dict[type, str] = {str: "a string", dict: "an object"}
