"""The `tool_choice` of a chat body: which functions may be called, and whether one must be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mesh.errors import RequestError
from proxy.api.errors import unsupported


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What a request says of its functions."""

    allowed: tuple[str, ...]
    """That the model may call."""
    enforced: bool = False
    """It must call, and may not talk."""
    named: bool = False
    """One call, of the one function that is allowed."""


def tool_choice(choice: Any, functions: Sequence[str]) -> ToolChoice:
    """`functions`: the declared ones. Raises `RequestError` 400."""
    if not functions:
        if choice not in (None, "none", "auto"):
            raise RequestError(400, "tool_choice is only allowed when tools are given.", param="tool_choice")
        return ToolChoice(())
    if choice == "none":
        return ToolChoice(())
    if choice in (None, "auto", "required"):
        return ToolChoice(tuple(functions), enforced=choice == "required")
    if not isinstance(choice, dict):
        raise RequestError(
            400, "tool_choice must be none, auto, required or an object that names a function.", param="tool_choice"
        )
    if choice.get("type") == "allowed_tools":
        return _allowed_tools(choice.get("allowed_tools"), functions, "tool_choice.allowed_tools")
    if choice.get("type") != "function":
        raise unsupported("tool_choice.type", "only function and allowed_tools are served")
    name = _name(choice.get("function"), functions, "tool_choice.function")
    return ToolChoice((name,), enforced=True, named=True)


def _allowed_tools(allowed: Any, functions: Sequence[str], where: str) -> ToolChoice:
    if not isinstance(allowed, dict):
        raise RequestError(400, f"{where} must be an object.", param=where)
    mode, tools = allowed.get("mode"), allowed.get("tools")
    if mode not in ("auto", "required"):
        raise RequestError(400, f"{where}.mode must be auto or required.", param=f"{where}.mode")
    if not isinstance(tools, list) or not tools:
        raise RequestError(400, f"{where}.tools must be a list of at least one tool.", param=f"{where}.tools")
    names = []
    for i, tool in enumerate(tools):
        place = f"{where}.tools.{i}"
        if not isinstance(tool, dict):
            raise RequestError(400, f"{place} must be an object.", param=place)
        if tool.get("type") != "function":
            raise unsupported(f"{place}.type", "only function is served")
        names.append(_name(tool.get("function"), functions, f"{place}.function"))
    return ToolChoice(tuple(dict.fromkeys(names)), enforced=mode == "required")


def _name(function: Any, functions: Sequence[str], where: str) -> str:
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or name not in functions:
        raise RequestError(400, f"{where}.name must be that of one of the tools.", param=f"{where}.name")
    return name
