"""JSON in a text that is still coming: where it ends, and that it is JSON so far."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from typing import Any

from proxy.text.source import BLANKS, Malformed, Source, Steps

MAX_DEPTH = 100
"""As in a request's body."""
PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
WORD = re.compile(r"[-+.0-9A-Za-z]*")
SCALAR = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?|true|false|null")
ESCAPED = frozenset('"\\/bfnrtu')
CLOSING = {"{": "}", "[": "]"}


def json_value(source: Source, first: Collection[str], keys: Collection[str] | None = None) -> Steps[Any]:
    """A value that begins with one of the characters `first`; of an object, whose members are among `keys`. Raises
    `Malformed` at the first character that no such JSON continues with, and for what Python cannot hold."""
    text = yield from _json_text(source, first, keys)
    try:
        return json.loads(text)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        raise Malformed from None


def _json_text(source: Source, first: Collection[str], keys: Collection[str] | None) -> Steps[str]:
    if (yield from source.next()) not in first:
        raise Malformed
    parts: list[str] = []
    closing: list[str] = []
    """Of every open bracket."""
    may_close = False
    while True:
        # a member or an element
        parts.append((yield from source.run(BLANKS)))
        character = yield from source.next()
        if may_close and character == closing[-1]:
            parts.append(source.take())
            closing.pop()
        else:
            if closing and closing[-1] == "}":
                parts.append((yield from _key(source, keys if len(closing) == 1 else None)))
                character = yield from source.next()
            if character in CLOSING:
                parts.append(source.take())
                closing.append(CLOSING[character])
                if len(closing) > MAX_DEPTH:
                    raise Malformed
                may_close = True
                continue
            parts.append((yield from _string(source) if character == '"' else _scalar(source)))
        # what follows a value
        while closing:
            parts.append((yield from source.run(BLANKS)))
            character = yield from source.next()
            if character == "," or not character:
                break
            if character != closing[-1]:
                raise Malformed
            parts.append(source.take())
            closing.pop()
        if not closing:
            return "".join(parts)
        if not character:
            raise Malformed
        parts.append(source.take())
        may_close = False


def _key(source: Source, allowed: Collection[str] | None) -> Steps[str]:
    """A member's name, the colon and the blanks around it."""
    if (yield from source.next()) != '"':
        raise Malformed
    name = yield from _string(source)
    if allowed is not None and name.strip('"') not in allowed:
        raise Malformed
    parts = [name, (yield from source.run(BLANKS)), (yield from source.mark(":"))]
    parts.append((yield from source.run(BLANKS)))
    return "".join(parts)


def _string(source: Source) -> Steps[str]:
    parts = [source.take()]
    while True:
        parts.append((yield from source.run(PLAIN)))
        character = yield from source.next()
        if character == '"':
            return "".join(parts) + source.take()
        if character != "\\":
            raise Malformed
        parts.append(source.take())
        if (yield from source.next()) not in ESCAPED:
            raise Malformed
        parts.append(source.take())


def _scalar(source: Source) -> Steps[str]:
    text = yield from source.run(WORD)
    if not SCALAR.fullmatch(text):
        raise Malformed
    return text
