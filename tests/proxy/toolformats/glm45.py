"""GLM-4.5 to 4.7: keys and values in elements of their own, with and without line breaks."""

from __future__ import annotations

from typing import Any

from tests.proxy.toolformats.cases import OSLO, TIME, Call, Case, Writer, common, dumped


def value(given: Any) -> str:
    return given if isinstance(given, str) else dumped(given)


def element(call: Call, gap: str = "\n") -> str:
    pairs = "".join(
        f"<arg_key>{key}</arg_key>{gap}<arg_value>{value(v)}</arg_value>{gap}" for key, v in call[1].items()
    )
    return f"<tool_call>{call[0]}{gap}{pairs}</tool_call>"


def one(key: str, text: str) -> str:
    return f"<tool_call>save\n<arg_key>{key}</arg_key>\n<arg_value>{text}</arg_value>\n</tool_call>"


WRITTEN = Writer(
    call=element,
    marks=("<tool_call>", "</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
)
WITHOUT_BREAKS = Writer(call=lambda call: element(call, ""), between="")
SINGLE = element(OSLO)
CASES = [
    *common(WRITTEN),
    *common(WITHOUT_BREAKS),
    Case("<tool_call>time</tool_call>", "", [TIME]),
    Case("<tool_call>\ntime\n</tool_call>", "", [TIME]),
    Case(
        "<tool_call> time <arg_key> city </arg_key> <arg_value>x</arg_value></tool_call>", "", [("time", {"city": "x"})]
    ),
    Case(f"{SINGLE}{SINGLE}", "", [OSLO, OSLO]),
    Case(f"one {SINGLE} two {element(TIME)}", "one  two ", [OSLO, TIME]),
    Case(one("text", "\n kept \n"), "", [("save", {"text": "\n kept \n"})]),
    Case(one("text", "a </arg_value> b"), "", [("save", {"text": "a </arg_value> b"})]),
    Case(one("n", "5"), "", [("save", {"n": 5})]),
    Case(one("ok", "True"), "", [("save", {"ok": True})]),
    Case(one("data", "{'a': 1}"), "", [("save", {"data": {"a": 1}})]),
    Case(one("other", "[1]"), "", [("save", {"other": [1]})]),
    Case(one("other", "one"), "", [("save", {"other": "one"})]),
    Case(one("n", "many"), one("n", "many"), []),
    Case(one("tags", "x"), one("tags", "x"), []),
    Case(one("n", "many") + SINGLE, one("n", "many"), [OSLO]),
    # the closing mark forgotten, and not merely cut
    Case(SINGLE.removesuffix("</tool_call>"), "", [OSLO], complete=True),
    Case(element(OSLO, "").removesuffix("</tool_call>") + "\n", "", [OSLO], complete=True),
    Case("<tool_call>time", "", [TIME], complete=True),
    Case(f"{SINGLE}<tool_call>time\n", "", [OSLO, TIME], complete=True),
    Case(SINGLE.removesuffix("</tool_call>"), SINGLE.removesuffix("</tool_call>"), []),
    Case(SINGLE[:-1], SINGLE[:-1], []),
    Case("<tool_call>time<arg_key>", "<tool_call>time<arg_key>", [], complete=True),
    Case("<tool_call>nothing", "<tool_call>nothing", [], complete=True),
    Case(SINGLE.partition("</arg_value>")[0], SINGLE.partition("</arg_value>")[0], [], complete=True),
    Case("<tool_call></tool_call>", "<tool_call></tool_call>", []),
    Case("<tool_call>two words</tool_call>", "<tool_call>two words</tool_call>", []),
    Case("<tool_call>time<arg_value>", "<tool_call>time<arg_value>", []),
    Case(f"<tool_call>time<arg_key>a</arg_key>b{SINGLE}", "<tool_call>time<arg_key>a</arg_key>b", [OSLO]),
    Case(f"<tool_call>time<tool_{SINGLE}", "<tool_call>time<tool_", [OSLO]),
    Case('<tool_call>{"name": "time"}</tool_call>', '<tool_call>{"name": "time"}</tool_call>', []),
]
