"""Qwen3-Coder: functions and parameters as elements, values as plain text."""

from __future__ import annotations

from typing import Any

from tests.proxy.toolformats.cases import OSLO, TIME, Call, Case, Writer, common, dumped


def value(given: Any) -> str:
    return given if isinstance(given, str) else dumped(given)


def element(call: Call) -> str:
    parameters = "".join(f"<parameter={key}>\n{value(v)}\n</parameter>\n" for key, v in call[1].items())
    return f"<tool_call>\n<function={call[0]}>\n{parameters}</function>\n</tool_call>"


def save(parameters: str) -> str:
    return f"<tool_call>\n<function=save>\n{parameters}\n</function>\n</tool_call>"


def one(key: str, text: str) -> str:
    return save(f"<parameter={key}>\n{text}\n</parameter>")


WRITTEN = Writer(
    call=element,
    tail="\n</tool_call>",
    marks=("<tool_call>", "</tool_call>", "<function=f>", "</function>x", "<parameter=a>", "</parameter>"),
)
SINGLE = element(OSLO)
HTML = "<html>\n  <p class='x'>1 &lt; 2</p>\n</html>"
CASES = [
    *common(WRITTEN),
    # blanks and marks that models leave out
    Case("<tool_call><function=time></function></tool_call>", "", [TIME]),
    Case("<function=time>\n</function>", "", [TIME]),
    Case("<function=weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>", "", [OSLO]),
    Case("<tool_call>\n\n <function=weather> <parameter=city>Oslo</parameter> </function> </tool_call>", "", [OSLO]),
    Case("<function=weather><parameter= city >Oslo</parameter></function> then", " then", [OSLO]),
    Case(f"{SINGLE}{SINGLE}", "", [OSLO, OSLO]),
    Case(f"one {SINGLE} two {element(TIME)}", "one  two ", [OSLO, TIME]),
    # values
    Case(one("text", HTML), "", [("save", {"text": HTML})]),
    Case(one("text", "\nfirst\n"), "", [("save", {"text": "\nfirst\n"})]),
    Case(one("text", "  indented\n\tdeeper  "), "", [("save", {"text": "  indented\n\tdeeper  "})]),
    Case(one("text", '{"a": 1}'), "", [("save", {"text": '{"a": 1}'})]),
    Case(one("text", "a </parameter> b"), "", [("save", {"text": "a </parameter> b"})]),
    Case(one("n", " 5 "), "", [("save", {"n": 5})]),
    Case(one("n", "5.0"), "", [("save", {"n": 5})]),
    Case(one("x", "1e3"), "", [("save", {"x": 1000.0})]),
    Case(one("ok", "True"), "", [("save", {"ok": True})]),
    Case(one("ok", "false"), "", [("save", {"ok": False})]),
    Case(one("data", "{'a': [None, 'it']}"), "", [("save", {"data": {"a": [None, "it"]}})]),
    Case(one("maybe", "None"), "", [("save", {"maybe": None})]),
    Case(one("maybe", '"quoted"'), "", [("save", {"maybe": '"quoted"'})]),
    Case(one("other", "12"), "", [("save", {"other": 12})]),
    Case(one("other", "twelve"), "", [("save", {"other": "twelve"})]),
    # no value of that type
    Case(one("n", "many"), one("n", "many"), []),
    Case(one("tags", "[1, 2"), one("tags", "[1, 2"), []),
    Case(one("data", '"words"'), one("data", '"words"'), []),
    Case(one("x", "1e999"), one("x", "1e999"), []),
    # what another value holds is never a call of its own
    Case(
        save(f"<parameter=n>x</parameter><parameter=text>{SINGLE}</parameter>"),
        save(f"<parameter=n>x</parameter><parameter=text>{SINGLE}</parameter>"),
        [],
    ),
    Case(
        f"<tool_call>\n<function=save>\n<parameter=text>\n{SINGLE}\n",
        "",
        [("save", {"text": "<tool_call>\n<function=weather>\n<parameter=city>\nOslo"})],
    ),
    # closing marks forgotten, and not merely cut
    Case(SINGLE.partition("</function>")[0], "", [OSLO], complete=True),
    Case("<function=time>", "", [TIME], complete=True),
    Case(SINGLE.partition("</function>")[0], SINGLE.partition("</function>")[0], []),
    Case(SINGLE.partition("</parameter>")[0], SINGLE.partition("</parameter>")[0], [], complete=True),
    # malformed
    Case("<tool_call>\nnothing\n</tool_call>", "<tool_call>\nnothing\n</tool_call>", []),
    Case("<function=>\n</function>", "<function=>\n</function>", []),
    Case("<function=time\n</function>", "<function=time\n</function>", []),
    Case("<function=time>\nwords</function>", "<function=time>\nwords</function>", []),
    Case(f"<tool_call>\n{SINGLE}", "<tool_call>\n", [OSLO]),
    Case(f"<function=time><tool_{SINGLE}", "<function=time><tool_", [OSLO]),
    Case(
        '<tool_call>{"name": "time", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "time", "arguments": {}}</tool_call>',
        [],
    ),
    Case("</tool_call> and </function>", "</tool_call> and </function>", []),
]
