"""Whether a call's arguments are what a strict function's JSON schema says.

The keywords that OpenAI serves in strict mode, less `pattern`: a client's regular expression can take for ever. Any
other keyword is refused by its name, for an unchecked one would break the promise that `strict` is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from proxy.api.errors import unsupported
from proxy.text.toolcalls import Accepts

MAX_STEPS = 10_000
"""Schemas that refer to themselves in several ways take exponentially many; no honest one comes near."""
ANNOTATIONS = frozenset(
    {"$defs", "$schema", "default", "definitions", "deprecated", "description", "examples", "format", "title"}
)
TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda v: isinstance(v, dict),
    "array": lambda v: isinstance(v, list),
    "string": lambda v: isinstance(v, str),
    "boolean": lambda v: isinstance(v, bool),
    "null": lambda v: v is None,
    "number": lambda v: isinstance(v, int | float) and not isinstance(v, bool),
    "integer": lambda v: isinstance(v, int | float) and not isinstance(v, bool) and v == int(v),
}


def accepts_by(schema: dict[str, Any], where: str) -> Accepts:
    """Raises `RequestError` 400 `unsupported_parameter` for a keyword that is not checked here."""
    _refuse_unknown(schema, where)

    def accepts(arguments: dict[str, Any]) -> bool:
        try:
            return _Check(schema).fits(arguments, schema)
        except (_TooLong, RecursionError, OverflowError):
            return False

    return accepts


class _TooLong(Exception):
    """The check is given up."""


def _refuse_unknown(schema: Any, where: str) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise unsupported(where, "a schema must be an object")
    for keyword, value in schema.items():
        if keyword in ("properties", "$defs", "definitions"):
            inner = value.values() if isinstance(value, dict) else [None]
        elif keyword in ("anyOf", "allOf"):
            inner = value if isinstance(value, list) else [None]
        elif keyword in ("items", "additionalProperties"):
            inner = [value]
        elif keyword in CHECKS or keyword in ANNOTATIONS or (keyword == "$ref" and _is_local(value)):
            inner = []
        else:
            raise unsupported(where, f"a strict function's schema must not use {keyword[:80]}")
        for part in inner:
            _refuse_unknown(part, where)


def _is_local(reference: Any) -> bool:
    return isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))


class _Check:
    """One value against one schema, in a bounded number of steps."""

    def __init__(self, root: dict[str, Any]) -> None:
        self._root = root
        self._steps = 0

    def fits(self, value: Any, schema: Any) -> bool:
        self._steps += 1
        if self._steps > MAX_STEPS:
            raise _TooLong
        if isinstance(schema, bool):
            return schema
        return all(
            CHECKS[keyword](self, value, given, schema) for keyword, given in schema.items() if keyword in CHECKS
        )

    def referred(self, reference: str) -> Any:
        """The part of the schema that a `#/...` names; False, which nothing fits, when there is none."""
        found: Any = self._root
        for name in reference.split("/")[1:]:
            found = found.get(name, False) if isinstance(found, dict) else False
        return found if isinstance(found, dict | bool) else False


def _types(check: _Check, value: Any, given: Any, schema: Any) -> bool:
    names = given if isinstance(given, list) else [given]
    return any(name in TYPES and TYPES[name](value) for name in names if isinstance(name, str))


def _properties(check: _Check, value: Any, given: dict[str, Any], schema: Any) -> bool:
    if not isinstance(value, dict):
        return True
    return all(check.fits(value[name], part) for name, part in given.items() if name in value)


def _additional(check: _Check, value: Any, given: Any, schema: Any) -> bool:
    known = schema.get("properties", {})
    return not isinstance(value, dict) or all(check.fits(v, given) for name, v in value.items() if name not in known)


def _required(check: _Check, value: Any, given: Any, schema: Any) -> bool:
    return not isinstance(value, dict) or (isinstance(given, list) and all(name in value for name in given))


def _items(check: _Check, value: Any, given: Any, schema: Any) -> bool:
    return not isinstance(value, list) or all(check.fits(item, given) for item in value)


def _same(a: Any, b: Any) -> bool:
    """Equal in JSON, where true is not 1."""
    return isinstance(a, bool) == isinstance(b, bool) and bool(a == b)


def _bound(kind: type | tuple[type, ...], holds: Callable[[Any, Any], bool]) -> Callable[[_Check, Any, Any, Any], bool]:
    """A keyword that limits values of one kind and says nothing of others."""

    def check(_: _Check, value: Any, given: Any, schema: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, kind):
            return True
        return isinstance(given, int | float) and holds(value, given)

    return check


NUMBER = (int, float)
CHECKS: dict[str, Callable[[_Check, Any, Any, Any], bool]] = {
    "type": _types,
    "properties": _properties,
    "additionalProperties": _additional,
    "required": _required,
    "items": _items,
    "enum": lambda check, value, given, schema: isinstance(given, list) and any(_same(value, g) for g in given),
    "const": lambda check, value, given, schema: _same(value, given),
    "anyOf": lambda check, value, given, schema: any(check.fits(value, part) for part in given),
    "allOf": lambda check, value, given, schema: all(check.fits(value, part) for part in given),
    "$ref": lambda check, value, given, schema: check.fits(value, check.referred(given)),
    "minimum": _bound(NUMBER, lambda value, given: value >= given),
    "maximum": _bound(NUMBER, lambda value, given: value <= given),
    "exclusiveMinimum": _bound(NUMBER, lambda value, given: value > given),
    "exclusiveMaximum": _bound(NUMBER, lambda value, given: value < given),
    "multipleOf": _bound(NUMBER, lambda value, given: given > 0 and value / given == round(value / given)),
    "minLength": _bound(str, lambda value, given: len(value) >= given),
    "maxLength": _bound(str, lambda value, given: len(value) <= given),
    "minItems": _bound(list, lambda value, given: len(value) >= given),
    "maxItems": _bound(list, lambda value, given: len(value) <= given),
}
