"""Llama 4: a pythonic list, mostly between marks."""

from __future__ import annotations

from tests.proxy.toolformats.cases import OSLO, TIME, Case, Writer, common
from tests.proxy.toolformats.pythonic import BARE, python

START, END = "<|python_start|>", "<|python_end|>"
MARKED = Writer(
    call=python, start=f"{START}[", between=", ", end=f"]{END}", tail=END, marks=(START, END, "]", "'"), unit=True
)
ONE = MARKED.write(OSLO)
CASES = [
    *common(MARKED),
    Case(BARE.write(OSLO, TIME), "", [OSLO, TIME]),
    Case(BARE.write(OSLO) + END, "", [OSLO]),
    Case(f"{START} {BARE.write(OSLO)} {END}\n", "", [OSLO]),
    Case(f"{ONE}\n{MARKED.write(TIME)}", "", [OSLO, TIME]),
    Case(f"a {ONE} b {MARKED.write(TIME)} c", "a  b  c", [OSLO, TIME]),
    Case(f"a {BARE.write(OSLO)}", f"a {BARE.write(OSLO)}", []),
    Case(f"{START}print(1){END}", f"{START}print(1){END}", []),
    Case(f"{START}{END}", f"{START}{END}", []),
    Case(f"{START}[]{END}", f"{START}[]{END}", []),
    Case(f"{START}{ONE}", START, [OSLO]),
    Case(f"{START}[time(x={ONE}", f"{START}[time(x=", [OSLO]),
    Case(f"{START}[time(x='{ONE}", f"{START}[time(x='<|python_start|>[weather(city='Oslo')]<|python_end|>", []),
    Case(END + " stray", END + " stray", []),
]
