"""Outputs in the Hermes format, fed in every way: the same text and calls, and nothing lost."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from typing import Any

import pytest

from proxy.text.toolcalls import FORMATS, ToolCallParser, format_of
from tests.proxy.tiny_tokenizer import byte_level

HERMES = FORMATS[0]
Call = tuple[str, dict[str, Any]]
W: Call = ("weather", {"city": "Oslo"})
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
TIME = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
T: Call = ("time", {})


def call(body: str) -> str:
    return f"<tool_call>{body}</tool_call>"


def weather(city: str) -> str:
    return call(json.dumps({"name": "weather", "arguments": {"city": city}}))


CASES: list[tuple[str, str, list[Call]]] = [
    # calls alone
    (CALL, "", [W]),
    ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>', "", [W]),
    (f"\n{CALL}\n", "", [W]),
    (call('{"arguments": {"city": "Oslo"}, "name": "weather"}'), "", [W]),
    (call('{"name":"weather","arguments":{"city":"Oslo"}}'), "", [W]),
    (call('{"name": "weather", "parameters": {"city": "Oslo"}}'), "", [W]),
    (call('{"name": "time"}'), "", [T]),
    (TIME, "", [T]),
    # several
    (CALL + CALL, "", [W, W]),
    (f"{CALL}\n{TIME}", "", [W, T]),
    (f"{CALL}\n\n{TIME}\n{CALL}", "", [W, T, W]),
    # text around
    (f"Let me look. {CALL}", "Let me look. ", [W]),
    (f"Let me look.\n\n{CALL}\n", "Let me look.\n\n", [W]),
    (f"{CALL} and then", " and then", [W]),
    (f"one {CALL} two {TIME} three", "one  two  three", [W, T]),
    # values
    (weather("São Paulo 東京 🌧"), "", [("weather", {"city": "São Paulo 東京 🌧"})]),
    (call('{"name": "weather", "arguments": {"city": "\\u6771\\n\\"x\\""}}'), "", [("weather", {"city": '東\n"x"'})]),
    (weather("a { b } c"), "", [("weather", {"city": "a { b } c"})]),
    (weather("</tool_call>"), "", [("weather", {"city": "</tool_call>"})]),
    (weather("<tool_call>"), "", [("weather", {"city": "<tool_call>"})]),
    (weather('say "</tool_call>"') + TIME, "", [("weather", {"city": 'say "</tool_call>"'}), T]),
    (
        call('{"name": "time", "arguments": {"a": {"b": [1, {"c": null}]}, "d": [true, 2.5, -3]}}'),
        "",
        [("time", {"a": {"b": [1, {"c": None}]}, "d": [True, 2.5, -3]})],
    ),
    (weather(""), "", [("weather", {"city": ""})]),
    (weather("x" * 3000), "", [("weather", {"city": "x" * 3000})]),
    # the last mark forgotten
    (CALL[: -len("</tool_call>")], "", [W]),
    (f"{TIME}{CALL[: -len('</tool_call>')]}\n", "", [T, W]),
    # no calls
    ("Hello!", "Hello!", []),
    ("", "", []),
    (" \n ", " \n ", []),
    ("  two spaces", "  two spaces", []),
    ("a < b and <tool> and <tool_cal", "a < b and <tool> and <tool_cal", []),
    ("<tool_call", "<tool_call", []),
    ("</tool_call> alone", "</tool_call> alone", []),
    ('{"name": "weather", "arguments": {}}', '{"name": "weather", "arguments": {}}', []),
    # broken off
    ("<tool_call>", "<tool_call>", []),
    ('<tool_call>{"name": "wea', '<tool_call>{"name": "wea', []),
    (
        'hm <tool_call>{"name": "weather", "arguments": {"city"',
        'hm <tool_call>{"name": "weather", "arguments": {"city"',
        [],
    ),
    (f'{CALL}<tool_call>{{"name"', '<tool_call>{"name"', [W]),
    # malformed: stays text, and what follows is still seen
    (call("nonsense"), call("nonsense"), []),
    (call("[]"), call("[]"), []),
    (call('"weather"'), call('"weather"'), []),
    (call('{"name": 3, "arguments": {}}'), call('{"name": 3, "arguments": {}}'), []),
    (call('{"name": "time", "arguments": [1]}'), call('{"name": "time", "arguments": [1]}'), []),
    (call('{"name": "time", "arguments": {"x": NaN}}'), call('{"name": "time", "arguments": {"x": NaN}}'), []),
    (call('{"name": "time", "arguments": {"x": 1e999}}'), call('{"name": "time", "arguments": {"x": 1e999}}'), []),
    (call('{"name": "time", "arguments": {"x": 1,}}'), call('{"name": "time", "arguments": {"x": 1,}}'), []),
    (call('{"name": "unheard_of", "arguments": {}}'), call('{"name": "unheard_of", "arguments": {}}'), []),
    (call('{"name": "picky", "arguments": {"n": 7}}'), call('{"name": "picky", "arguments": {"n": 7}}'), []),
    (call("oops") + CALL, call("oops"), [W]),
    (call('{"name": "weather') + CALL, call('{"name": "weather'), [W]),
    (call("[" * 5000), call("[" * 5000), []),
]


def parser(**more: Any) -> ToolCallParser:
    functions = {"weather": lambda a: True, "time": lambda a: True, "picky": lambda a: a.get("n") == 8}
    return ToolCallParser(HERMES, functions, **more)


def fed(pieces: Iterable[str], **more: Any) -> tuple[str, list[Call]]:
    """Text and calls of an answer that came in pieces."""
    one = parser(**more)
    parts = [*(one.push(piece) for piece in pieces), one.flush()]
    calls = [call for _, some in parts for call in some]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    return "".join(text for text, _ in parts), [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize(("output", "text", "calls"), CASES, ids=range(len(CASES)))
def test_whole_by_characters_and_in_random_pieces(output: str, text: str, calls: list[Call]) -> None:
    assert fed([output]) == (text, calls)
    assert fed(output) == (text, calls)
    rng = random.Random(output)
    for _ in range(20):
        cuts = sorted(rng.randint(0, len(output)) for _ in range(rng.randint(0, 12)))
        pieces = [output[a:b] for a, b in zip([0, *cuts], [*cuts, len(output)], strict=True)]
        assert fed(pieces) == (text, calls)


def test_text_is_not_held_longer_than_it_may_be_a_mark() -> None:
    one = parser()
    assert one.push("hello <") == ("hello ", ())
    assert one.push("b> ") == ("<b> ", ())


def test_a_call_is_passed_on_with_its_last_character() -> None:
    one = parser()
    assert one.push(CALL[:-1]) == ("", ())
    (found,) = one.push(">")[1]
    assert (found.name, found.arguments) == ("weather", '{"city": "Oslo"}')


def test_without_parallel_calls_the_first_one_ends_the_answer() -> None:
    one = parser(parallel=False)
    said, calls = one.push(f"so {CALL}{TIME} more")
    assert (said, len(calls), one.done) == ("so ", 1, True)
    assert one.push(TIME) == ("", ())
    assert one.flush() == ("", ())


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ tools }} <tool_call>", "hermes"),
        ("{{ tools }}", None),
        ("<tool_call>\n<function=", None),
        ("<tool_call>{name}\n<arg_key>", None),
    ],
)
def test_the_format_is_what_the_chat_template_shows(template: str, name: str | None) -> None:
    found = format_of(byte_level("{% raw %}" + template + "{% endraw %}"))
    assert (found.name if found else None) == name
