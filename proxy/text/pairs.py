"""Readers of calls whose arguments are names and plain texts between marks; a text's type is its schema's."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from proxy.text.pythoncalls import python_literal
from proxy.text.source import BLANKS, Malformed, Source, Steps
from proxy.text.toolcalls import Found, Function, Functions

NAME = re.compile(r"[A-Za-z0-9_.-]*")
MAX_STEPS = 100
"""Through a schema in search of its types; one that refers to itself never ends."""
UNKNOWN = Function({}, lambda arguments: False)

Types = frozenset[str] | None
"""That a schema allows; None: any."""


@dataclass(frozen=True, slots=True)
class PairsCall:
    """`OPENING name NAME-END (KEY key KEY VALUE value VALUE)* CLOSING`, in capitals the marks around."""

    wrapper: tuple[str, str]
    """Marks that may stand around the others; "": none."""
    opening: str
    name_end: str
    key: tuple[str, str]
    value: tuple[str, str]
    closing: str
    gap: str
    """Between the marks of an enforced call; any blanks will do."""
    lines: bool = False
    """A value stands on lines of its own: the breaks around it are not part of it."""

    @property
    def edge(self) -> str:
        """Around a value."""
        return "\n" if self.lines else ""

    def __call__(self, source: Source, functions: Functions) -> Steps[list[Found]]:
        outer = self.wrapper[0]
        if outer and (yield from source.ahead(outer, self.opening)) == outer:
            source.take(len(outer))
            yield from source.run(BLANKS)
        yield from source.mark(self.opening)
        yield from source.run(BLANKS)
        name = yield from source.run(NAME)
        if self.name_end:
            yield from source.mark(self.name_end)
        yield from source.run(BLANKS)
        function = functions.get(name, UNKNOWN)
        arguments: dict[str, Any] | None = {}
        while (yield from self._mark(source)) == self.key[0]:
            key = (yield from source.until(self.key[1])).strip()
            if self.value[0]:
                yield from source.run(BLANKS)
                yield from source.mark(self.value[0])
            text = yield from self._value(source)
            try:
                if arguments is not None:
                    arguments[key] = typed(text, function, key)
            except Malformed:
                arguments = None  # no call, but what other values hold must not be looked at for one
        return [Found(name, arguments)]

    def _mark(self, source: Source) -> Steps[str]:
        """That of the next key, or the closing one, which models forget at the end; where a call was cut, more of its
        arguments might have come."""
        if source.complete and (yield from source.ended()):
            return self.closing
        return (yield from source.mark(self.key[0], self.closing))

    def _value(self, source: Source) -> Steps[str]:
        """Up to the first closing mark that another mark of the call follows: one within the value is its own."""
        parts: list[str] = []
        while True:
            parts.append((yield from source.until(self.value[1])))
            blanks = yield from source.run(BLANKS)
            if (yield from source.ahead(self.key[0], self.closing)):
                break
            if (yield from source.ended()):
                if source.complete:
                    break
                raise Malformed
            parts += [self.value[1], blanks]
        value = "".join(parts)
        return value.removeprefix("\n").removesuffix("\n") if self.lines else value


def typed(text: str, function: Function, name: str) -> Any:
    """The value that `text` is for the parameter of this name. Raises `Malformed` when it is none.

    A string is the text as it is. Anything else is JSON, or Python, of whatever type: only a strict function's are
    checked. What can be read as no other type is a string if the schema allows one.
    """
    if name not in function.types:
        properties = function.parameters.get("properties")
        schema = properties.get(name) if isinstance(properties, dict) else None
        function.types[name] = types_of(schema, function.parameters)
    types = function.types[name]
    text_allowed = types is None or "string" in types
    if types == frozenset({"string"}):
        return text
    value = _parsed(text, python=types is not None)
    if isinstance(value, float) and value.is_integer() and types is not None and "number" not in types:
        value = int(value)
    if not isinstance(value, str) and (not text_allowed or types is None or type_of(value, types) in types):
        return value
    if not text_allowed:
        raise Malformed
    return text


def types_of(schema: Any, root: Mapping[str, Any]) -> Types:
    """The JSON types that a schema allows, as far as it says so plainly."""
    return _types(schema, root, [MAX_STEPS])


def _types(schema: Any, root: Mapping[str, Any], steps: list[int]) -> Types:
    steps[0] -= 1
    if not isinstance(schema, dict) or steps[0] < 0:
        return None
    if "$ref" in schema:
        return _types(referred(schema["$ref"], root), root, steps)
    given = schema.get("type")
    if isinstance(given, str):
        return frozenset({given})
    if isinstance(given, list):
        return frozenset(name for name in given if isinstance(name, str))
    if "const" in schema:
        return frozenset({type_of(schema["const"])})
    if isinstance(schema.get("enum"), list):
        return frozenset(map(type_of, schema["enum"]))
    for keyword in ("anyOf", "oneOf", "allOf"):
        parts = schema.get(keyword)
        if isinstance(parts, list) and 0 < len(parts) <= steps[0]:
            found = [_types(part, root, steps) for part in parts]
            if keyword == "allOf":
                return next((types for types in found if types is not None), None)
            return None if None in found else frozenset().union(*(types for types in found if types is not None))
    return frozenset({"object"}) if "properties" in schema else None


def referred(reference: Any, root: Mapping[str, Any]) -> Any:
    """The part of the schema that a `#/...` names; None when there is none."""
    found: Any = root
    for name in str(reference).split("/")[1:]:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def type_of(value: Any, allowed: frozenset[str] = frozenset()) -> str:
    """The name of its type in JSON; an integer is a number where there are no integers."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int):
        return "number" if "number" in allowed and "integer" not in allowed else "integer"
    names = {float: "number", str: "string", list: "array", dict: "object"}
    return names.get(type(value), "null")


def _parsed(text: str, *, python: bool) -> Any:
    """A text that is no other value is itself."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        pass
    try:
        return python_literal(text.strip()) if python else text
    except Malformed:
        return text


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no JSON")
