"""Readers of calls that are Python: `[f(a=1), g(b="x")]`. Values are literals, nothing is ever evaluated."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from proxy.text.jsoncalls import closed
from proxy.text.jsonvalue import MAX_DEPTH
from proxy.text.source import BLANKS, Malformed, Source, Steps
from proxy.text.toolcalls import Found, Functions

NAME = re.compile(r"[A-Za-z0-9_.-]*")
WORD = re.compile(r"[-+0-9A-Za-z_.]*")
NUMBER = re.compile(r"[-+]?(?:[0-9](?:_?[0-9])*\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?")
WORDS = {"True": True, "False": False, "None": None, "true": True, "false": False, "null": None}
"""JSON's as well: models mix them up, and nothing else can be meant."""
HEX = re.compile(r"[0-9A-Fa-f]*")
PLAIN = {'"': re.compile(r'[^"\\]*'), "'": re.compile(r"[^'\\]*")}
ESCAPES = {"\n": "", "\\": "\\", "'": "'", '"': '"', "a": "\a", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
ESCAPES |= {"v": "\v", "0": "\0"}
CODES = {"x": 2, "u": 4, "U": 8}
"""Hexadecimal digits of a character's number."""
SURROGATES = re.compile(r"[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class PythonCalls:
    """`OPENING [f(a=1), g(b="x")]`, the mark only where there is one. A list is one unit."""

    opening: tuple[str, ...] = ()

    def __call__(self, source: Source, functions: Functions) -> Steps[list[Found]]:
        if self.opening:
            source.take(len((yield from source.ahead(*self.opening))))
            yield from source.run(BLANKS)
        yield from source.mark("[")
        yield from source.run(BLANKS)
        calls: list[Found] = []
        while not calls or not (yield from source.ahead("]")):
            calls.append((yield from _call(source)))
            if not (yield from _comma(source, "]")):
                break
        yield from source.mark("]")
        return calls


@dataclass(frozen=True, slots=True)
class PythonLines:
    """`OPENING f(a=1) g(b="x") CLOSING`, a line each."""

    opening: str
    closing: str

    def __call__(self, source: Source, functions: Functions) -> Steps[list[Found]]:
        yield from source.mark(self.opening)
        yield from source.run(BLANKS)
        calls = [(yield from _call(source))]
        yield from source.run(BLANKS)
        while not (yield from source.ended()) and not (yield from source.ahead(self.closing)):
            calls.append((yield from _call(source)))
            yield from source.run(BLANKS)
        yield from closed(source, self.closing)
        return calls


def python_literal(text: str) -> Any:
    """The value of a whole text. Raises `Malformed`."""
    source = Source(text, over=True)
    steps = _whole(source)
    try:
        next(steps)
    except StopIteration as read:
        return read.value
    raise AssertionError("a text that is over needs no more of it")


def _whole(source: Source) -> Steps[Any]:
    value = yield from _value(source, 0)
    yield from source.run(BLANKS)
    if not (yield from source.ended()):
        raise Malformed
    return value


def _call(source: Source) -> Steps[Found]:
    name = yield from source.run(NAME)
    if not name:
        raise Malformed
    yield from source.mark("(")
    yield from source.run(BLANKS)
    arguments: dict[str, Any] = {}
    while not (yield from source.ahead(")")):
        key = yield from source.run(NAME)
        yield from source.run(BLANKS)
        if not key or key in arguments:
            raise Malformed
        yield from source.mark("=")
        yield from source.run(BLANKS)
        arguments[key] = yield from _value(source, 0)
        if not (yield from _comma(source, ")")):
            break
    yield from source.mark(")")
    return Found(name, arguments)


def _comma(source: Source, closing: str) -> Steps[bool]:
    """Whether a comma follows a value, which is taken; else its list must be closed."""
    yield from source.run(BLANKS)
    if not (yield from source.ahead(",", closing)):
        raise Malformed
    if not (yield from source.ahead(",")):
        return False
    source.take()
    yield from source.run(BLANKS)
    return True


def _value(source: Source, depth: int) -> Steps[Any]:
    if depth > MAX_DEPTH:
        raise Malformed
    first = yield from source.next()
    if first in PLAIN:
        return (yield from _string(source))
    if first in ("[", "("):
        return (yield from _list(source, "]" if first == "[" else ")", depth))
    if first == "{":
        return (yield from _dict(source, depth))
    word = yield from source.run(WORD)
    if word in WORDS:
        return WORDS[word]
    if not NUMBER.fullmatch(word):
        raise Malformed
    try:
        return float(word) if set(word) & set(".eE") else int(word)
    except ValueError:  # of thousands of digits
        raise Malformed from None


def _list(source: Source, closing: str, depth: int) -> Steps[Any]:
    """A list or a tuple; brackets around a single value are just brackets."""
    source.take()
    yield from source.run(BLANKS)
    values: list[Any] = []
    comma = True
    while comma and not (yield from source.ahead(closing)):
        values.append((yield from _value(source, depth + 1)))
        comma = yield from _comma(source, closing)
    yield from source.mark(closing)
    return values[0] if closing == ")" and len(values) == 1 and not comma else values


def _dict(source: Source, depth: int) -> Steps[dict[str, Any]]:
    source.take()
    yield from source.run(BLANKS)
    members: dict[str, Any] = {}
    comma = True
    while comma and not (yield from source.ahead("}")):
        if (yield from source.next()) not in PLAIN:
            raise Malformed
        key = yield from _string(source)
        yield from source.run(BLANKS)
        yield from source.mark(":")
        yield from source.run(BLANKS)
        members[key] = yield from _value(source, depth + 1)
        comma = yield from _comma(source, "}")
    yield from source.mark("}")
    return members


def _string(source: Source) -> Steps[str]:
    quote = source.take()
    closing = quote
    if (yield from source.ahead(quote * 2)):
        source.take(2)
        closing = quote * 3
    parts = []
    while True:
        parts.append((yield from source.run(PLAIN[quote])))
        if (yield from source.ahead(closing)):
            source.take(len(closing))
            return _joined(parts)
        if not (character := (yield from source.next())):
            raise Malformed
        source.take()
        parts.append(quote if character == quote else (yield from _escaped(source)))


def _escaped(source: Source) -> Steps[str]:
    """The character after a backslash; like Python, one that means nothing keeps it."""
    character = yield from source.next()
    if not character:
        raise Malformed
    source.take()
    if character not in CODES:
        return ESCAPES.get(character, "\\" + character)
    digits = ""
    while len(digits) < CODES[character] and HEX.fullmatch((yield from source.next()) or "-"):
        digits += source.take()
    if len(digits) < CODES[character] or int(digits, 16) > 0x10FFFF:
        raise Malformed
    return chr(int(digits, 16))


def _joined(parts: list[str]) -> str:
    text = "".join(parts)
    if not SURROGATES.search(text):
        return text
    try:  # written as in JSON, two for one character
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError:
        raise Malformed from None
