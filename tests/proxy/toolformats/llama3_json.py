"""Llama 3 JSON: bare objects where the answer begins, or behind a mark."""

from __future__ import annotations

from tests.proxy.toolformats.cases import OSLO, TIME, UNKNOWN, Case, Writer, common, dumped

BARE = Writer(
    call=lambda c: dumped({"name": c[0], "parameters": c[1]}),
    between="; ",
    marks=("<|python_tag|>", ";", "{", "}"),
    anywhere=False,
)
TAGGED = Writer(
    call=BARE.call,
    start="<|python_tag|>",
    between="; ",
    marks=("<|python_tag|>", "; {"),
)
ONE, CLOCK = BARE.write(OSLO), BARE.write(TIME)
CASES = [
    *common(BARE),
    *common(TAGGED),
    Case('{"name": "weather", "arguments": {"city": "Oslo"}}', "", [OSLO]),
    Case('{"type": "function", "name": "weather", "parameters": {"city": "Oslo"}}', "", [OSLO]),
    Case('{\n  "name": "weather",\n  "parameters": {\n    "city": "Oslo"\n  }\n}', "", [OSLO]),
    Case('{"name": "time"}', "", [TIME]),
    Case(f"{ONE};{CLOCK}", "", [OSLO, TIME]),
    Case(f"{ONE} ;\n{CLOCK};", "", [OSLO, TIME]),
    Case(f"{ONE}\n{CLOCK}", "", [OSLO, TIME]),
    Case(f"{ONE}{CLOCK}", "", [OSLO, TIME]),
    Case(f"<|python_tag|>{ONE}; <|python_tag|>{CLOCK}", "", [OSLO, TIME]),
    Case(f"<|python_start|>{ONE}<|python_end|>", "", [OSLO]),
    Case(f"<|python_tag|> {ONE} done", " done", [OSLO]),
    Case(f"So: <|python_tag|>{ONE}", "So: ", [OSLO]),
    # what separated two calls is text when no call follows
    Case(f"{ONE}; and more", "; and more", [OSLO]),
    Case(f"{ONE}; {BARE.call(UNKNOWN)}", f"; {BARE.call(UNKNOWN)}", [OSLO]),
    Case("; a; b", "; a; b", []),
    # JSON that is no call
    Case(f"So: {ONE}", f"So: {ONE}", []),
    Case('{"city": "Oslo"}', '{"city": "Oslo"}', []),
    Case("{}", "{}", []),
    Case('{"name": "Ann", "age": 3}', '{"name": "Ann", "age": 3}', []),
    Case('{"name": "weather", "parameters": "Oslo"}', '{"name": "weather", "parameters": "Oslo"}', []),
    Case('{"name": "time", "parameters": {}, }', '{"name": "time", "parameters": {}, }', []),
    Case(f"{{x}} {ONE}", f"{{x}} {ONE}", []),
    Case(f"[{ONE}]", f"[{ONE}]", []),
    Case("<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    Case(f"<|python_tag|>oops <|python_tag|>{ONE}", "<|python_tag|>oops ", [OSLO]),
]
