"""Hermes and Qwen2.5/3: a JSON object between `<tool_call>` and `</tool_call>`."""

from __future__ import annotations

import json

from tests.proxy.toolformats.cases import OSLO, TIME, Call, Case, Writer, common, dumped


def call(body: str) -> str:
    return f"<tool_call>{body}</tool_call>"


def weather(city: str) -> str:
    return call(json.dumps({"name": "weather", "arguments": {"city": city}}))


SINGLE = weather("Oslo")
CLOCK = call('{"name": "time", "arguments": {}}')
WRITTEN = Writer(
    call=lambda c: "<tool_call>\n" + dumped({"name": c[0], "arguments": c[1]}) + "\n</tool_call>",
    tail="\n</tool_call>",
    marks=("<tool_call>", "</tool_call>"),
)
OWN: list[tuple[str, str, list[Call]]] = [
    # calls alone
    (SINGLE, "", [OSLO]),
    ('<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>', "", [OSLO]),
    (f"\n{SINGLE}\n", "", [OSLO]),
    (call('{"arguments": {"city": "Oslo"}, "name": "weather"}'), "", [OSLO]),
    (call('{"name":"weather","arguments":{"city":"Oslo"}}'), "", [OSLO]),
    (call('{"name": "weather", "parameters": {"city": "Oslo"}}'), "", [OSLO]),
    (call('{"name": "time"}'), "", [TIME]),
    (CLOCK, "", [TIME]),
    # several
    (SINGLE + SINGLE, "", [OSLO, OSLO]),
    (f"{SINGLE}\n{CLOCK}", "", [OSLO, TIME]),
    (f"{SINGLE}\n\n{CLOCK}\n{SINGLE}", "", [OSLO, TIME, OSLO]),
    # text around
    (f"Let me look. {SINGLE}", "Let me look. ", [OSLO]),
    (f"Let me look.\n\n{SINGLE}\n", "Let me look.\n\n", [OSLO]),
    (f"{SINGLE} and then", " and then", [OSLO]),
    (f"one {SINGLE} two {CLOCK} three", "one  two  three", [OSLO, TIME]),
    # values
    (weather("São Paulo 東京 🌧"), "", [("weather", {"city": "São Paulo 東京 🌧"})]),
    (call('{"name": "weather", "arguments": {"city": "\\u6771\\n\\"x\\""}}'), "", [("weather", {"city": '東\n"x"'})]),
    (weather("a { b } c"), "", [("weather", {"city": "a { b } c"})]),
    (weather("</tool_call>"), "", [("weather", {"city": "</tool_call>"})]),
    (weather("<tool_call>"), "", [("weather", {"city": "<tool_call>"})]),
    (weather('say "</tool_call>"') + CLOCK, "", [("weather", {"city": 'say "</tool_call>"'}), TIME]),
    (
        call('{"name": "time", "arguments": {"a": {"b": [1, {"c": null}]}, "d": [true, 2.5, -3]}}'),
        "",
        [("time", {"a": {"b": [1, {"c": None}]}, "d": [True, 2.5, -3]})],
    ),
    (weather(""), "", [("weather", {"city": ""})]),
    (weather("x" * 3000), "", [("weather", {"city": "x" * 3000})]),
    # the last mark forgotten
    (SINGLE[: -len("</tool_call>")], "", [OSLO]),
    (f"{CLOCK}{SINGLE[: -len('</tool_call>')]}\n", "", [TIME, OSLO]),
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
    (f'{SINGLE}<tool_call>{{"name"', '<tool_call>{"name"', [OSLO]),
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
    (call("oops") + SINGLE, call("oops"), [OSLO]),
    (call('{"name": "weather') + SINGLE, call('{"name": "weather'), [OSLO]),
    (call("[" * 5000), call("[" * 5000), []),
]
CASES = [*common(WRITTEN), *(Case(*case) for case in OWN)]
