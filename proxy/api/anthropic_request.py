"""A body of the Messages API as the chat body that asks for the same."""

from __future__ import annotations

import re
from typing import Any

from mesh.errors import RequestError
from proxy.api.anthropic_messages import chat_messages
from proxy.api.anthropic_schemas import CountTokensBody, MessagesBody, OutputFormat, Tool, ToolChoice
from proxy.api.sampling import stop_strings
from proxy.api.schemas import ChatBody, validate

CHOICES = {"auto": "auto", "any": "required", "none": "none"}
SAME = ("model", "max_tokens", "temperature", "top_p", "top_k", "stream", "cache_salt", "priority", "seed")
"""Fields that a chat body has under the same name with the same meaning."""
CHAT_NAMES = (
    (re.compile(r"response_format(\.json_schema)?"), "output_config.format"),
    (re.compile(r"(tools\.\d+)\.function\.parameters"), r"\1.input_schema"),
    (re.compile(r"(tools\.\d+)\.function"), r"\1"),
    (re.compile(r"tool_choice\.function"), "tool_choice"),
    (re.compile(r"thinking_token_budget"), "thinking.budget_tokens"),
    (re.compile(r"continue_final_message"), "An answer that continues the last message"),
)
"""What a chat body's own checks call a field, and what the client called it."""


def chat_body(body: CountTokensBody, *, thinks: bool = False) -> ChatBody:
    """Raises `RequestError` 400 that names what is wrong or not served. `thinks`: the model does, so that a budget
    means something; to one that does not it is nothing, as in clients that always send one."""
    messages = chat_messages(body.system, body.messages)
    fields: dict[str, Any] = {
        "messages": messages,
        "tools": None if body.tools is None else [_tool(tool) for tool in body.tools],
        "chat_template_kwargs": _template_variables(body),
        **_tool_choice(body.tool_choice),
        **_output(body),
    }
    last = messages[-1]
    if last["role"] == "assistant" and not last["content"]:
        messages.pop()  # nothing is to be continued
    elif last["role"] == "assistant":
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if isinstance(body, MessagesBody):
        stops = stop_strings(body.stop_sequences, "stop_sequences")
        fields |= {"stop": list(stops), "max_tokens": body.max_tokens}
        _check_budget(body)
        if thinks and body.thinking is not None:
            fields["thinking_token_budget"] = body.thinking.budget_tokens
    fields |= {name: getattr(body, name, None) for name in SAME}
    return validate(ChatBody, fields)


def in_clients_words(error: RequestError) -> RequestError:
    """An error of a chat body's checks, about the fields that the client wrote."""
    message, param = error.message, error.param
    for chat, own in CHAT_NAMES:
        message = chat.sub(own, message)
        param = None if param is None else chat.sub(own, param)
    return RequestError(
        error.status, message, type=error.type, code=error.code, param=param, retry_after=error.retry_after
    )


def _tool(tool: Tool) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    function["parameters"] = tool.input_schema
    if tool.strict:
        function["strict"] = True
    return {"type": "function", "function": function}


def _tool_choice(choice: ToolChoice | None) -> dict[str, Any]:
    if choice is None:
        return {}
    if (choice.type == "tool") != (choice.name is not None):
        raise RequestError(400, "tool_choice.name belongs to the type tool, which needs it.", param="tool_choice.name")
    fields: dict[str, Any] = {"parallel_tool_calls": not choice.disable_parallel_tool_use}
    if choice.type == "tool":
        return {**fields, "tool_choice": {"type": "function", "function": {"name": choice.name}}}
    return {**fields, "tool_choice": CHOICES[choice.type]}


def _template_variables(body: CountTokensBody) -> dict[str, Any] | None:
    """Templates of models that think know `enable_thinking`; to others it is nothing."""
    if body.thinking is None:
        return body.chat_template_kwargs
    return {"enable_thinking": body.thinking.type != "disabled", **(body.chat_template_kwargs or {})}


def _check_budget(body: MessagesBody) -> None:
    thinking = body.thinking
    if thinking is None:
        return
    where = "thinking.budget_tokens"
    if (thinking.type == "enabled") != (thinking.budget_tokens is not None):
        raise RequestError(400, f"{where} belongs to the type enabled, which needs it.", param=where)
    if thinking.budget_tokens is not None and thinking.budget_tokens >= body.max_tokens:
        raise RequestError(400, f"{where} must be less than max_tokens.", param=where)


def _output(body: CountTokensBody) -> dict[str, Any]:
    config = body.output_config
    fields: dict[str, Any] = {}
    if config is not None and config.effort is not None:
        fields["reasoning_effort"] = config.effort
    form = None if config is None else config.format
    if form is not None and body.output_format is not None:
        raise RequestError(400, "output_format excludes output_config.format; give one of them.", param="output_format")
    return fields | _response_format(form or body.output_format)


def _response_format(form: OutputFormat | None) -> dict[str, Any]:
    if form is None:
        return {}
    described = {"name": "output", "schema": form.json_schema}
    return {"response_format": {"type": "json_schema", "json_schema": described}}
