"""Olmo 3: calls as in Python, a line each, between marks."""

from __future__ import annotations

from tests.proxy.toolformats.cases import OSLO, TIME, UNKNOWN, Case, Writer, common
from tests.proxy.toolformats.pythonic import python

OPEN, CLOSE = "<function_calls>", "</function_calls>"
WRITTEN = Writer(
    call=python,
    start=f"{OPEN}\n",
    end=f"\n{CLOSE}",
    tail=f"\n{CLOSE}",
    marks=(OPEN, CLOSE, ")", "'\n"),
    unit=True,
)
ONE, CLOCK = WRITTEN.write(OSLO), WRITTEN.write(TIME)
CASES = [
    *common(WRITTEN),
    Case(f"{OPEN}\nweather(city='Oslo')\ntime()\n{CLOSE}\n", "", [OSLO, TIME]),
    Case(f'{OPEN}weather(city="Oslo") time(){CLOSE}', "", [OSLO, TIME]),
    Case(f"{ONE}\n{CLOCK}", "", [OSLO, TIME]),
    Case(f"a {ONE} b {CLOCK} c", "a  b  c", [OSLO, TIME]),
    Case(f"{OPEN}time()", "", [TIME]),
    Case(f"{OPEN}{CLOSE}", f"{OPEN}{CLOSE}", []),
    Case(f"{OPEN}time{CLOSE}", f"{OPEN}time{CLOSE}", []),
    Case(f"{OPEN}time(1){CLOSE}", f"{OPEN}time(1){CLOSE}", []),
    Case(f"{OPEN}[time()]{CLOSE}", f"{OPEN}[time()]{CLOSE}", []),
    Case(f"{OPEN}time(), time(){CLOSE}", f"{OPEN}time(), time(){CLOSE}", []),
    Case(f"{OPEN}{ONE}", OPEN, [OSLO]),
    Case(WRITTEN.write(OSLO, UNKNOWN), WRITTEN.write(OSLO, UNKNOWN), []),
    Case(f"{OPEN}time(x=open('f')){CLOSE}{CLOCK}", f"{OPEN}time(x=open('f')){CLOSE}", [TIME]),
    Case("time()", "time()", []),
    Case(CLOSE, CLOSE, []),
]
