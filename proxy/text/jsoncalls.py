"""Readers of calls whose arguments are JSON."""

from __future__ import annotations

import re
import secrets
import string
from dataclasses import dataclass
from typing import Any

from proxy.text.jsonvalue import json_value
from proxy.text.source import BLANKS, Malformed, Source, Steps
from proxy.text.toolcalls import Found, Functions

NAME = re.compile(r"[A-Za-z0-9_.:/-]*")
CALL_KEYS = frozenset({"type", "id", "name", "arguments", "parameters"})
MISTRAL_ID = re.compile(r"[A-Za-z0-9]{9}")
KIMI_NAME = re.compile(r"(?:functions\.)?(.+?)(?::[0-9]+)?")


def call_of(value: Any) -> Found:
    """The call that `{"name": ..., "arguments": {...}}` is."""
    if not isinstance(value, dict) or not isinstance(value.get("name"), str):
        raise Malformed
    return Found(value["name"], value.get("arguments", value.get("parameters", {})))


def closed(source: Source, *marks: str) -> Steps[None]:
    """Takes the marks behind a call; models forget them at the end of the text."""
    for mark in marks:
        yield from source.run(BLANKS)
        if (yield from source.ended()):
            return
        yield from source.mark(mark)


@dataclass(frozen=True, slots=True)
class JsonCall:
    """`OPENING {"name": ..., "arguments": {...}} CLOSING`, where a bare object may have neither."""

    opening: tuple[str, ...]
    closing: tuple[str, ...] = ()

    def __call__(self, source: Source, functions: Functions) -> Steps[list[Found]]:
        marked = yield from source.ahead(*self.opening)
        source.take(len(marked))
        yield from source.run(BLANKS)
        # an answer that merely is JSON need not be held to its end
        value = yield from json_value(source, "{", None if marked else CALL_KEYS)
        if marked:
            yield from closed(source, *self.closing)
        return [call_of(value)]


@dataclass(frozen=True, slots=True)
class NamedJson:
    """`SECTION? BEFORE-NAME name BEFORE-ARGUMENTS {...} CLOSING`, with any blanks between the marks."""

    section: str
    before_name: tuple[str, ...]
    before_arguments: tuple[str, ...]
    closing: tuple[str, ...]

    def __call__(self, source: Source, functions: Functions) -> Steps[list[Found]]:
        if (yield from source.ahead(self.section, self.before_name[0])) == self.section:
            source.take(len(self.section))
        name = yield from self._name(source)
        for mark in self.before_arguments:
            yield from source.run(BLANKS)
            yield from source.mark(mark)
        yield from source.run(BLANKS)
        arguments = yield from json_value(source, "{")
        yield from closed(source, *self.closing)
        return [Found(name, arguments)]

    def _name(self, source: Source) -> Steps[str]:
        for mark in self.before_name:
            yield from source.run(BLANKS)
            yield from source.mark(mark)
        yield from source.run(BLANKS)
        return (yield from source.run(NAME))


@dataclass(frozen=True, slots=True)
class KimiCall:
    """A `NamedJson` whose name is the call's id, `functions.NAME:INDEX`."""

    call: NamedJson

    def __call__(self, source: Source, functions: Functions) -> Steps[list[Found]]:
        (found,) = yield from self.call(source, functions)
        name = KIMI_NAME.fullmatch(found.name)
        return [found if name is None else Found(name[1], found.arguments, found.name)]


def kimi_id(found: Found, index: int) -> str:
    """As the model wrote it, for its template repeats it."""
    return found.id if found.id.startswith("functions.") and ":" in found.id else f"functions.{found.name}:{index}"


def mistral_calls(source: Source, functions: Functions) -> Steps[list[Found]]:
    """`[TOOL_CALLS]` and a JSON list of calls, one call, or `name[CALL_ID]id[ARGS]{...}`, where only the name and the
    arguments must be."""
    yield from source.mark("[TOOL_CALLS]")
    yield from source.run(BLANKS)
    first = yield from source.next()
    if first in ("{", "["):
        value = yield from json_value(source, "{[")
        calls = value if isinstance(value, list) else [value]
        if not calls:
            raise Malformed
        return [_mistral_call(call) for call in calls]
    name = yield from source.run(NAME)
    yield from source.run(BLANKS)
    id = ""
    if (yield from source.ahead("[CALL_ID]", "[ARGS]", "{")) == "[CALL_ID]":
        source.take(len("[CALL_ID]"))
        id = yield from source.run(NAME)
        yield from source.run(BLANKS)
    if (yield from source.ahead("[ARGS]", "{")) == "[ARGS]":
        source.take(len("[ARGS]"))
        yield from source.run(BLANKS)
    arguments = yield from json_value(source, "{")
    return [Found(name, arguments, id)]


def _mistral_call(value: Any) -> Found:
    call = call_of(value)
    id = value.get("id")
    return Found(call.name, call.arguments, id if isinstance(id, str) else "")


def mistral_id(found: Found, index: int) -> str:
    """Mistral's templates refuse any other form."""
    if MISTRAL_ID.fullmatch(found.id):
        return found.id
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
