"""Chat messages as clients write them, as chat templates expect them: plain text content, known roles."""

from __future__ import annotations

import json
from typing import Any

from mesh.errors import RequestError
from proxy.api.errors import unsupported

ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
TEXT_PARTS = frozenset({"text", "input_text", "output_text"})
OTHER_FIELDS = ("name", "tool_call_id", "reasoning_content", "reasoning")
"""Strings that a template may read."""


def template_messages(messages: Any, *, knows_developer_role: bool) -> list[dict[str, Any]]:
    """`messages` for the chat template. Raises `RequestError` 400 naming what is wrong.

    A developer's message is a system message to a template that does not know that role: most would drop it.
    """
    if not isinstance(messages, list) or not messages:
        raise RequestError(400, "messages must be a list of at least one message.", param="messages")
    result = [_message(message, f"messages.{i}") for i, message in enumerate(messages)]
    for message in result:
        if message["role"] == "developer" and not knows_developer_role:
            message["role"] = "system"
    return result


def _message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise RequestError(400, f"{where} must be an object.", param=where)
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise RequestError(400, f"{where}.role must be one of {', '.join(sorted(ROLES))}.", param=f"{where}.role")
    result: dict[str, Any] = {"role": role}
    calls = message.get("tool_calls")
    if calls:
        result["tool_calls"] = _tool_calls(calls, f"{where}.tool_calls")
    result["content"] = _content(message.get("content"), f"{where}.content", optional=role == "assistant")
    for name in OTHER_FIELDS:
        value = message.get(name)
        if value is not None:
            if not isinstance(value, str):
                raise RequestError(400, f"{where}.{name} must be a string.", param=f"{where}.{name}")
            result[name] = value
    thought = result.get("reasoning_content", result.get("reasoning"))
    if thought is not None:  # clients send back either name, and templates read either
        result |= {"reasoning": thought, "reasoning_content": thought}
    return result


def _content(content: Any, where: str, *, optional: bool) -> str:
    """The text: of the string, or of all parts, a line each."""
    if isinstance(content, str):
        return content
    if content is None and optional:
        return ""
    if not isinstance(content, list):
        raise RequestError(400, f"{where} must be a string or a list of text parts.", param=where)
    return "\n".join(_part(part, f"{where}.{i}") for i, part in enumerate(content))


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise RequestError(400, f"{where} must be an object with a type.", param=f"{where}.type")
    if kind not in TEXT_PARTS:
        raise unsupported(f"{where}.type", "this model reads text parts only")
    text = part.get("text")
    if not isinstance(text, str):
        raise RequestError(400, f"{where}.text must be a string.", param=f"{where}.text")
    return text


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    """Calls of an earlier turn; templates expect the arguments as an object, clients send them as JSON text."""
    if not isinstance(calls, list):
        raise RequestError(400, f"{where} must be a list.", param=where)
    result = []
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            at = f"{where}.{i}.function"
            raise RequestError(400, f"{at} must be an object with a name.", param=at)
        arguments = _arguments(function.get("arguments"))
        result.append({**call, "function": {**function, "arguments": arguments}})
    return result


def _arguments(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return {} if arguments is None else arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
