"""Outputs and what they must come to: the cases that every format has, written by its own writer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from proxy.text.toolcalls import Function

Call = tuple[str, dict[str, Any]]


class Case(NamedTuple):
    output: str
    text: str
    calls: list[Call]
    reasoning: str = ""
    complete: bool = False
    """The model ended it."""


def _function(accepts: Callable[[dict[str, Any]], bool] = lambda arguments: True, **properties: Any) -> Function:
    return Function({"type": "object", "properties": properties}, accepts)


STRING = {"type": "string"}
FUNCTIONS = {
    "weather": _function(city=STRING),
    "time": _function(),
    "picky": _function(lambda arguments: arguments.get("n") == 8, n={"type": "integer"}),
    "save": _function(
        text=STRING,
        n={"type": "integer"},
        x={"type": "number"},
        ok={"type": "boolean"},
        tags={"type": "array"},
        data={"type": "object"},
        maybe={"anyOf": [STRING, {"type": "null"}]},
    ),
}
OSLO: Call = ("weather", {"city": "Oslo"})
TIME: Call = ("time", {})
UNKNOWN: Call = ("unheard_of", {"city": "Oslo"})
PICKY: Call = ("picky", {"n": 7})


def plain(text: str) -> str:
    return text


@dataclass(frozen=True)
class Writer:
    """How a model of one format writes."""

    call: Callable[[Call], str]
    start: str = ""
    between: str = "\n"
    end: str = ""
    tail: str = ""
    """The end of an output that a model may forget."""
    marks: tuple[str, ...] = ()
    """That a string may hold without harm."""
    anywhere: bool = True
    """A call is one whatever text is before it."""
    unit: bool = False
    """Calls that are written together are calls together or not at all."""
    before: Callable[[str], str] = plain
    """Text before calls, and after them."""
    after: Callable[[str], str] = plain
    alone: Callable[[str], str] = plain

    def write(self, *calls: Call) -> str:
        return self.start + self.between.join(map(self.call, calls)) + self.end


VALUES: tuple[Call, ...] = (
    ("weather", {"city": "São Paulo"}),
    ("weather", {"city": "東京 🌧 München"}),
    ("weather", {"city": ""}),
    ("weather", {"city": " two  spaces "}),
    ("weather", {"city": "say \"hi\" and \\ and 'hey'"}),
    ("weather", {"city": "a { b } [ c ] ( d ), e: f = g;"}),
    ("weather", {"city": "x" * 5000}),
    ("weather", {"city": "42"}),
    ("weather", {"city": "null"}),
    ("save", {"text": "line one\nline two\n\n\tlast", "n": 3}),
    ("save", {"data": {"a": {"b": [1, {"c": None}]}, "d": "x"}}),
    ("save", {"data": {}, "tags": []}),
    ("save", {"tags": [1, -2, "three", [4.5], True, None]}),
    ("save", {"n": -7, "x": 2.5e-3, "ok": False}),
    ("save", {"n": 0, "x": -0.5, "ok": True}),
    ("save", {"maybe": None}),
    ("save", {"maybe": "words"}),
)


def common(writer: Writer) -> list[Case]:
    write, before, after, alone = writer.write, writer.before, writer.after, writer.alone
    single = write(OSLO)
    shortest = len(single) - len(writer.tail)
    cases = [
        Case(single, "", [OSLO]),
        Case(write(TIME), "", [TIME]),
        Case(write(OSLO, TIME), "", [OSLO, TIME]),
        Case(write(OSLO, OSLO, TIME), "", [OSLO, OSLO, TIME]),
        Case(f"\n {single}\n", "", [OSLO]),
        Case(single + after(" and then"), " and then", [OSLO]),
        *(Case(write(call), "", [call]) for call in VALUES),
        *(Case(write(call), "", [call]) for mark in writer.marks if (call := ("weather", {"city": f"a{mark}b"}))),
        Case(write(UNKNOWN), write(UNKNOWN), []),
        Case(write(PICKY), write(PICKY), []),
        Case(alone("Hello!"), "Hello!", []),
        Case("", "", []),
        Case(alone(" \n "), " \n ", []),
        Case(alone("a < b and <x> [1] {y} <| z"), "a < b and <x> [1] {y} <| z", []),
        *(Case(single[:n], single[:n], []) for n in range(shortest // 5, shortest, max(1, shortest // 5))),
        Case(single[: shortest - 1], single[: shortest - 1], []),
    ]
    if writer.anywhere:
        said = "Let me look.\n\n"
        cases += [
            Case(before(said) + single, said, [OSLO]),
            Case(before("one") + write(OSLO, TIME) + after("three"), "onethree", [OSLO, TIME]),
            Case(before("é🌧") + write(TIME), "é🌧", [TIME]),
        ]
    if not writer.unit:
        cases += [
            Case(write(OSLO, UNKNOWN), written(writer, UNKNOWN), [OSLO]),
            Case(write(OSLO, PICKY), written(writer, PICKY), [OSLO]),
        ]
    return cases


def written(writer: Writer, call: Call) -> str:
    """A call that is text behind one that was passed on; what separated the two belongs to the text."""
    return writer.between + writer.call(call) + writer.end


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
