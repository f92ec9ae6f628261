"""The `tools` and `tool_choice` of a chat body: checked, and turned into parsers of the answer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mesh.errors import RequestError
from mesh.tokenizer import Tokenizer
from proxy.api.argumentschema import accepts_by
from proxy.api.errors import unsupported
from proxy.api.schemas import ChatBody
from proxy.api.structured import Constraint, TaggedSchema, check_schema, output_constraint, tagged_grammar
from proxy.text.toolcalls import Accepts, ToolCallParser, ToolFormat, format_of

MAX_TOOLS = 128
"""As at OpenAI; each one is part of the prompt anyway."""
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Tools:
    """What the model may call in one request."""

    format: ToolFormat
    functions: Mapping[str, Accepts]
    parallel: bool
    mark_ids: frozenset[int]
    """Tokens that are marks of the format; some vocabularies have them as special ones, which texts leave out."""
    constraint: Constraint | None
    """With which the answer is nothing but calls; None: the model may call or talk."""

    def parser(self) -> ToolCallParser:
        """For one choice."""
        return ToolCallParser(self.format, self.functions, parallel=self.parallel)


def offered_tools(body: ChatBody, tokenizer: Tokenizer) -> Tools | None:
    """None when the model must not call any. Raises `RequestError` 400 that names what is wrong or not served."""
    choice = body.tool_choice
    if not body.tools:
        if choice not in (None, "none", "auto"):
            raise RequestError(400, "tool_choice is only allowed when tools are given.", param="tool_choice")
        return None
    functions = _functions(body.tools)
    if choice == "none":
        return None
    enforced = _enforced(choice, functions)
    format = format_of(tokenizer)
    if format is None:
        raise unsupported("tools", "this model's chat template has no format of tool calls that is known here")
    ids = (tokenizer.backend.token_to_id(mark) for mark in (format.open, format.close))
    marks = frozenset(i for i in ids if i is not None)
    parallel = body.parallel_tool_calls is not False
    constraint = None
    if enforced:
        several = parallel and choice == "required"
        constraint = _only_calls(body.tools, enforced, format, tokenizer, several=several)
    if output_constraint(body) is not None:
        raise unsupported("response_format", "an answer that may be a tool call cannot have a form as well")
    return Tools(format, functions, parallel, marks, constraint)


def _enforced(choice: Any, functions: Mapping[str, Accepts]) -> list[str]:
    """The functions of which one must be called; none of them when the model may talk instead."""
    if choice in (None, "auto"):
        return []
    if choice == "required":
        return list(functions)
    if not isinstance(choice, dict):
        raise RequestError(
            400, "tool_choice must be none, auto, required or an object that names a function.", param="tool_choice"
        )
    if choice.get("type") != "function":
        raise unsupported("tool_choice.type", "only function is served")
    function = choice.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in functions:
        raise RequestError(400, "tool_choice must name one of the tools.", param="tool_choice.function.name")
    return [name]


def _only_calls(
    tools: list[dict[str, Any]], names: list[str], format: ToolFormat, tokenizer: Tokenizer, *, several: bool
) -> Constraint:
    """A grammar of calls of these functions, with arguments of their schemas."""
    found: list[TaggedSchema] = []
    for i, function in enumerate(tool["function"] for tool in tools):
        if function["name"] in names:
            schema = {"type": "object", **(function.get("parameters") or {})}
            check_schema(f"tools.{i}.function.parameters", schema)
            begin = f'{format.open}{{"name": {json.dumps(function["name"])}, "arguments": '
            found.append(TaggedSchema(begin, schema, "}" + format.close))
    return Constraint("tools", tagged_grammar(found, tokenizer, several=several))


def _functions(tools: list[dict[str, Any]]) -> dict[str, Accepts]:
    """What each declared function takes, by its name."""
    if len(tools) > MAX_TOOLS:
        raise RequestError(400, f"tools may hold at most {MAX_TOOLS} tools.", param="tools")
    found: dict[str, Accepts] = {}
    for i, tool in enumerate(tools):
        where = f"tools.{i}"
        if tool.get("type") != "function":
            raise RequestError(400, f"{where}.type must be function.", param=f"{where}.type")
        name, accepts = _function(tool.get("function"), f"{where}.function")
        if name in found:
            raise RequestError(400, f"{where}: there is another function {name}.", param=f"{where}.function.name")
        found[name] = accepts
    return found


def _function(function: Any, where: str) -> tuple[str, Accepts]:
    if not isinstance(function, dict):
        raise RequestError(400, f"{where} must be an object.", param=where)
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise RequestError(
            400, f"{where}.name must be 1 to 64 letters, digits, underscores, dots or dashes.", param=f"{where}.name"
        )
    described = function.get("description")
    if described is not None and not isinstance(described, str):
        raise RequestError(400, f"{where}.description must be a string.", param=f"{where}.description")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise RequestError(400, f"{where}.parameters must be a JSON schema.", param=f"{where}.parameters")
    strict = function.get("strict")
    if strict is not None and not isinstance(strict, bool):
        raise RequestError(400, f"{where}.strict must be a boolean.", param=f"{where}.strict")
    return name, accepts_by(parameters or {}, f"{where}.parameters") if strict else _anything


def _anything(arguments: dict[str, Any]) -> bool:
    return True
