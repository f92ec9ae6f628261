"""DeepSeek V3.1: as V3, with neither type nor fence."""

from __future__ import annotations

from tests.proxy.toolformats.cases import OSLO, TIME, Case, Writer, common, dumped
from tests.proxy.toolformats.deepseek_v3 import BEGIN, CALLS, CALLS_END, END, SEP


def call(name: str, arguments: str) -> str:
    return f"{BEGIN}{name}{SEP}{arguments}{END}"


WRITTEN = Writer(
    call=lambda c: call(c[0], dumped(c[1])),
    start=CALLS,
    between="",
    end=CALLS_END,
    tail=f"{END}{CALLS_END}",
    marks=(BEGIN, SEP, END, CALLS, CALLS_END),
)
ONE = call("weather", '{"city": "Oslo"}')
CLOCK = call("time", "{}")
CASES = [
    *common(WRITTEN),
    Case(ONE, "", [OSLO]),
    Case(f"{CALLS}\n{ONE}\n{CLOCK}\n{CALLS_END}\n", "", [OSLO, TIME]),
    Case(f"{CALLS}{ONE}{CALLS_END}{CALLS}{CLOCK}{CALLS_END}", "", [OSLO, TIME]),
    Case(f"{CALLS}{BEGIN} time {SEP} {{ }} {END} {CALLS_END}", "", [TIME]),
    Case(f"{CALLS}{BEGIN}time{SEP}{{}}", "", [TIME]),
    Case(f"a {CALLS}{ONE}{CALLS_END} b {CLOCK} c", "a  b  c", [OSLO, TIME]),
    Case(f"{CALLS}{CALLS_END}", f"{CALLS}{CALLS_END}", []),
    Case(f"{CALLS}{CALLS}{ONE}", CALLS, [OSLO]),
    Case(call("time", "[]"), call("time", "[]"), []),
    Case(call("time", '{"a": NaN}'), call("time", '{"a": NaN}'), []),
    Case(call("time", "{]") + CLOCK, call("time", "{]"), [TIME]),
    Case(f"{CALLS}{call('x', '{}')}{ONE}{CALLS_END}", CALLS + call("x", "{}"), [OSLO]),
    Case(
        f"{BEGIN}function{SEP}time\n```json\n{{}}\n```{END}", f"{BEGIN}function{SEP}time\n```json\n{{}}\n```{END}", []
    ),
    Case(f'{BEGIN}time{SEP}{{"a": "{CLOCK}', f'{BEGIN}time{SEP}{{"a": "{CLOCK}', []),
    Case(f"{BEGIN}time", f"{BEGIN}time", []),
    Case(f"{BEGIN}time{SEP}", f"{BEGIN}time{SEP}", []),
]
