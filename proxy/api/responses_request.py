"""From the body of a response to what the chat's way of answering needs.

The parts that both APIs have are spelled differently; an error about one of them names it as this API does.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mesh.errors import RequestError
from proxy.api.conversation import Asked, prepare
from proxy.api.errors import unsupported
from proxy.api.responses_body import ResponsesBody
from proxy.api.responses_items import Item
from proxy.api.responses_messages import chat_messages, turn_starts
from proxy.api.schemas import ChatBody, SamplingBody, validate
from proxy.api.service import Service

TOO_LONG = "context_length_exceeded"
TOOL_FIELDS = ("type", "name", "description", "parameters", "strict")
PLAIN_TOOL: dict[str, tuple[Any, ...]] = {
    "allowed_callers": (["direct"],),
    "async": (False,),
    "defer_loading": (False,),
}
"""More fields of a function, with the values that ask for nothing."""
OWN_NAMES = (
    (re.compile(r"^response_format(\.json_schema)?"), "text.format"),
    (re.compile(r"^(tools\.\d+)\.function\."), r"\1."),
    (re.compile(r"^tool_choice\.function\."), "tool_choice."),
    (re.compile(r"^max_completion_tokens"), "max_output_tokens"),
    (re.compile(r"^messages"), "input"),
)


def chat_body(body: ResponsesBody, items: Sequence[Item]) -> ChatBody:
    """The same request as a chat. Raises `RequestError` 400."""
    fields: dict[str, Any] = {name: getattr(body, name) for name in SamplingBody.model_fields}
    fields |= {
        "messages": chat_messages(body.instructions, items),
        "max_completion_tokens": body.max_output_tokens,
        "tools": [_chat_tool(tool, f"tools.{i}") for i, tool in enumerate(body.tools or ())] or None,
        "tool_choice": _chat_choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "response_format": _response_format(body.text.format if body.text else None),
        "reasoning_effort": body.reasoning.effort if body.reasoning else None,
        "chat_template_kwargs": body.chat_template_kwargs,
        "thinking_token_budget": body.thinking_token_budget,
        "logprobs": body.logprobs is not None,
        "top_logprobs": body.logprobs,
        # In the background the events are written too, for whoever follows it.
        "stream": bool(body.stream or body.background),
    }
    return validate(ChatBody, fields)


async def asked_of(service: Service, body: ResponsesBody, items: Sequence[Item]) -> Asked:
    """Checked, rendered and tokenized. Raises `RequestError`.

    With `truncation: auto` a conversation that is too long begins later: at the first user's message from which it
    leaves the room that `max_output_tokens` asks for, found by halving.
    """
    with own_names():
        if body.truncation != "auto":
            return await prepare(service, chat_body(body, items))
        asked = await _fitting(service, body, items)
        starts = [start for start in turn_starts(items) if start > 0]
        if asked is not None or not starts:
            return asked or await prepare(service, chat_body(body, items))
        low, high = 0, len(starts) - 1
        while low < high:
            middle = (low + high) // 2
            if await _fitting(service, body, items[starts[middle] :]) is None:
                low = middle + 1
            else:
                high = middle
        return await prepare(service, chat_body(body, items[starts[low] :]))


async def _fitting(service: Service, body: ResponsesBody, items: Sequence[Item]) -> Asked | None:
    """None for a prompt that leaves less room than was asked for."""
    try:
        asked = await prepare(service, chat_body(body, items))
    except RequestError as error:
        if error.code != TOO_LONG:
            raise
        return None
    return asked if asked.budget >= (body.max_output_tokens or 1) else None


@contextmanager
def own_names() -> Iterator[None]:
    """Errors from the chat's way of answering get this API's names."""
    try:
        yield
    except RequestError as error:
        raise renamed(error) from None


def renamed(error: RequestError) -> RequestError:
    param = error.param or ""
    for pattern, replacement in OWN_NAMES:
        param = pattern.sub(replacement, param)
    if param == (error.param or ""):
        return error
    return RequestError(
        error.status,
        error.message.replace(error.param or "", param),
        type=error.type,
        code=error.code,
        param=param,
        retry_after=error.retry_after,
    )


def _chat_tool(tool: dict[str, Any], where: str) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise unsupported(f"{where}.type", "only functions are served")
    for name, value in tool.items():
        if name not in TOOL_FIELDS and value is not None and value not in PLAIN_TOOL.get(name, ()):
            raise unsupported(f"{where}.{name}")
    function = {name: tool[name] for name in TOOL_FIELDS[1:] if tool.get(name) is not None}
    return {"type": "function", "function": function}


def _chat_choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        allowed = {"mode": choice.get("mode"), "tools": [_chat_choice(tool) for tool in choice["tools"]]}
        return {"type": "allowed_tools", "allowed_tools": allowed}
    return choice


def _response_format(format: Any) -> Any:
    """`text.format` has the members of chat's `json_schema` beside its type."""
    if not isinstance(format, dict) or format.get("type") != "json_schema":
        return format
    return {"type": "json_schema", "json_schema": {name: v for name, v in format.items() if name != "type"}}
