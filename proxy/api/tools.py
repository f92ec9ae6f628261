"""The `tools` and `tool_choice` of a chat body: checked, and turned into parsers of the answer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mesh.errors import RequestError
from mesh.tokenizer import Tokenizer
from proxy.api.argumentschema import accepts_by
from proxy.api.errors import unsupported
from proxy.api.schemas import ChatBody
from proxy.api.structured import Constraint, output_constraint
from proxy.api.toolchoice import ToolChoice, tool_choice
from proxy.api.toolgrammar import Enforced, calls_grammar, calls_or_form_grammar, form_grammar
from proxy.text.toolcalls import CallParser, Function
from proxy.text.toolformats import ToolFormat

MAX_TOOLS = 128
"""As at OpenAI; each one is part of the prompt anyway."""
NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


@dataclass(frozen=True, slots=True)
class Tools:
    """What the model may call in one request, and how it writes that."""

    format: ToolFormat
    functions: Mapping[str, Function]
    parallel: bool
    mark_ids: frozenset[int]
    """Tokens that are marks of the format; some vocabularies have them as special ones, which texts leave out."""
    constraint: Constraint | None
    """What the answer must be."""
    thoughts: bool
    """The client wants those that the format tells apart."""

    def parser(self) -> CallParser:
        """For one choice."""
        return self.format.parser(self.functions, parallel=self.parallel, thoughts=self.thoughts)


def offered_tools(body: ChatBody, tokenizer: Tokenizer, format: ToolFormat | None) -> Tools | None:
    """None when the model must not call any, and its answers are plain text. `format`: how it writes calls, where that
    is known. Raises `RequestError` 400 that names what is wrong or not served."""
    declared = _functions(body.tools or [])
    choice = tool_choice(body.tool_choice, tuple(declared))
    if format is None:
        if choice.allowed:
            raise unsupported("tools", "this model's chat template has no format of tool calls that is known here")
        return None
    if not choice.allowed and not format.always:
        return None
    parallel = body.parallel_tool_calls is not False
    ids = (tokenizer.backend.token_to_id(mark) for mark in format.all_marks)
    return Tools(
        format,
        {name: declared[name][0] for name in choice.allowed},
        parallel,
        frozenset(i for i in ids if i is not None),
        _constraint(body, declared, choice, format, tokenizer, parallel=parallel),
        body.include_reasoning is not False,
    )


def _constraint(
    body: ChatBody,
    declared: Mapping[str, tuple[Function, str]],
    choice: ToolChoice,
    format: ToolFormat,
    tokenizer: Tokenizer,
    *,
    parallel: bool,
) -> Constraint | None:
    """Calls where they are enforced; calls or the form where one is asked for; None: the model may call or talk."""
    form = output_constraint(body)
    allowed = [Enforced(name, dict(declared[name][0].parameters), declared[name][1]) for name in choice.allowed]
    several = parallel and not choice.named
    if choice.enforced:
        return Constraint("tools", calls_grammar(allowed, format, tokenizer, several=several))
    if form is None:
        return None
    if allowed:
        return Constraint("tools", calls_or_form_grammar(allowed, format, tokenizer, several=several), form=form)
    return Constraint(form.param, form_grammar(format, tokenizer), form=form)


def _functions(tools: list[dict[str, Any]]) -> dict[str, tuple[Function, str]]:
    """Each declared function and the place of its schema, by its name."""
    if len(tools) > MAX_TOOLS:
        raise RequestError(400, f"tools may hold at most {MAX_TOOLS} tools.", param="tools")
    found: dict[str, tuple[Function, str]] = {}
    for i, tool in enumerate(tools):
        where = f"tools.{i}"
        if tool.get("type") == "custom":
            raise unsupported(f"{where}.type", "only tools of type function are served")
        if tool.get("type") != "function":
            raise RequestError(400, f"{where}.type must be function.", param=f"{where}.type")
        name, function = _function(tool.get("function"), f"{where}.function")
        if name in found:
            raise RequestError(400, f"{where}: there is another function {name}.", param=f"{where}.function.name")
        found[name] = function, f"{where}.function.parameters"
    return found


def _function(function: Any, where: str) -> tuple[str, Function]:
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
    accepts = accepts_by(parameters or {}, f"{where}.parameters") if strict else _anything
    return name, Function({"type": "object", **(parameters or {})}, accepts)


def _anything(arguments: dict[str, Any]) -> bool:
    return True
