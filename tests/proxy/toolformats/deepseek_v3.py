"""DeepSeek V3 and R1: calls in a section, each with its type and a fenced block of JSON."""

from __future__ import annotations

from tests.proxy.toolformats.cases import OSLO, TIME, Case, Writer, common, dumped

BEGIN, SEP, END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"


def call(name: str, arguments: str) -> str:
    return f"{BEGIN}function{SEP}{name}\n```json\n{arguments}\n```{END}"


WRITTEN = Writer(
    call=lambda c: call(c[0], dumped(c[1])),
    start=CALLS,
    end=CALLS_END,
    tail=f"\n```{END}{CALLS_END}",
    marks=(BEGIN, SEP, END, CALLS, CALLS_END, "```"),
)
ONE = call("weather", '{"city": "Oslo"}')
CLOCK = call("time", "{}")
CASES = [
    *common(WRITTEN),
    Case(ONE, "", [OSLO]),
    Case(f"{CALLS}\n{ONE}\n{CALLS_END}", "", [OSLO]),
    Case(f"{CALLS}{ONE}{CLOCK}{CALLS_END}", "", [OSLO, TIME]),
    Case(f"{CALLS}{ONE}{CALLS_END}\n{CALLS}{CLOCK}{CALLS_END}", "", [OSLO, TIME]),
    Case(f"{CALLS}{BEGIN}function{SEP}time\n```json\n{{}}\n```", "", [TIME]),
    Case(f"{CALLS}{BEGIN} function {SEP} time ```json {{ }} ``` {END}", "", [TIME]),
    Case(f"a {CALLS}{ONE}{CALLS_END} b {CLOCK} c", "a  b  c", [OSLO, TIME]),
    Case(f"{CALLS}{ONE}{CALLS_END} !", " !", [OSLO]),
    # broken
    Case(f"{CALLS}{CALLS_END}", f"{CALLS}{CALLS_END}", []),
    Case(CALLS, CALLS, []),
    Case(f"{CALLS}{CALLS}{ONE}", CALLS, [OSLO]),
    Case(f"{BEGIN}time{SEP}{{}}{END}", f"{BEGIN}time{SEP}{{}}{END}", []),
    Case(call("time", "[1]"), call("time", "[1]"), []),
    Case(call("time", '{"a": }'), call("time", '{"a": }'), []),
    Case(call("time", '{"a": "\\ud83d"}'), call("time", '{"a": "\\ud83d"}'), []),
    Case(call("", "{}"), call("", "{}"), []),
    Case(call("time", "{]") + CLOCK, call("time", "{]"), [TIME]),
    Case(f"{CALLS}{call('x', '{}')}{ONE}{CALLS_END}", CALLS + call("x", "{}"), [OSLO]),
    # what a broken call's string holds is never a call of its own
    Case(
        f'{BEGIN}function{SEP}time\n```json\n{{"a": "{CLOCK}', f'{BEGIN}function{SEP}time\n```json\n{{"a": "{CLOCK}', []
    ),
    Case(CALLS_END + " stray", CALLS_END + " stray", []),
]
