"""Kimi K2: calls in a section, named by their ids."""

from __future__ import annotations

from tests.proxy.toolformats.cases import OSLO, TIME, Case, Writer, common, dumped

BEGIN, ARGUMENTS, END = "<|tool_call_begin|>", "<|tool_call_argument_begin|>", "<|tool_call_end|>"
CALLS, CALLS_END = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"


def call(id: str, arguments: str) -> str:
    return f"{BEGIN}{id}{ARGUMENTS}{arguments}{END}"


WRITTEN = Writer(
    call=lambda c: call(f"functions.{c[0]}:0", dumped(c[1])),
    start=CALLS,
    between="",
    end=CALLS_END,
    tail=END + CALLS_END,
    marks=(BEGIN, ARGUMENTS, END, CALLS, CALLS_END),
)
ONE = call("functions.weather:0", '{"city": "Oslo"}')
CLOCK = call("functions.time:1", "{}")
CASES = [
    *common(WRITTEN),
    Case(ONE, "", [OSLO]),
    Case(call("weather:12", '{"city": "Oslo"}'), "", [OSLO]),
    Case(call("weather", '{"city": "Oslo"}'), "", [OSLO]),
    Case(call(" functions.time:10 ", " { } "), "", [TIME]),
    Case(f"{CALLS}\n{ONE}\n{CLOCK}\n{CALLS_END}\n", "", [OSLO, TIME]),
    Case(f"a {CALLS}{ONE}{CALLS_END} b {CLOCK} c", "a  b  c", [OSLO, TIME]),
    Case(f"{CALLS}{BEGIN}functions.time:0{ARGUMENTS}{{}}", "", [TIME]),
    Case(f"{CALLS}{CALLS_END}", f"{CALLS}{CALLS_END}", []),
    Case(f"{CALLS}{CALLS}{ONE}", CALLS, [OSLO]),
    Case(call("functions.time", "[]"), call("functions.time", "[]"), []),
    Case(call("functions:0", "{}"), call("functions:0", "{}"), []),
    Case(call("", "{}"), call("", "{}"), []),
    Case(call("functions.time:0", "{]") + CLOCK, call("functions.time:0", "{]"), [TIME]),
    Case(f"{CALLS}{call('x', '{}')}{ONE}{CALLS_END}", CALLS + call("x", "{}"), [OSLO]),
    Case(f'{BEGIN}time{ARGUMENTS}{{"a": "{CLOCK}', f'{BEGIN}time{ARGUMENTS}{{"a": "{CLOCK}', []),
]
