"""Pythonic: a list of calls where the answer begins, or behind a mark."""

from __future__ import annotations

from tests.proxy.toolformats.cases import OSLO, TIME, UNKNOWN, Call, Case, Writer, common


def python(call: Call) -> str:
    return f"{call[0]}({', '.join(f'{key}={value!r}' for key, value in call[1].items())})"


BARE = Writer(call=python, start="[", between=", ", end="]", marks=("]", ")", "[", "', "), anywhere=False, unit=True)


def save(arguments: str) -> str:
    return f"[save({arguments})]"


ONE = BARE.write(OSLO)
CASES = [
    *common(BARE),
    Case('[weather(city="Oslo")]', "", [OSLO]),
    Case('[ weather ( city = "Oslo" ) ]', '[ weather ( city = "Oslo" ) ]', []),
    Case('[ weather( city = "Oslo" , ) , ]', "", [OSLO]),
    Case('[\n  weather(\n    city="Oslo"\n  ),\n  time()\n]', "", [OSLO, TIME]),
    Case(f"{ONE}\n{ONE}", "", [OSLO, OSLO]),
    # literals
    Case(save("text='a\\tb\\\\c\\'d'"), "", [("save", {"text": "a\tb\\c'd"})]),
    Case(save('text="\\u6771\\x41\\U0001F327"'), "", [("save", {"text": "東A🌧"})]),
    Case(save('text="\\ud83c\\udf27"'), "", [("save", {"text": "🌧"})]),
    Case(save('text="\\d+\\q"'), "", [("save", {"text": "\\d+\\q"})]),
    Case(save('text="""two\nlines "quoted" """'), "", [("save", {"text": 'two\nlines "quoted" '})]),
    Case(save("text=''"), "", [("save", {"text": ""})]),
    Case(save("n=1_000, x=.5"), "", [("save", {"n": 1000, "x": 0.5})]),
    Case(save("x=1., n=+3"), "", [("save", {"x": 1.0, "n": 3})]),
    Case(save("ok=true, maybe=null"), "", [("save", {"ok": True, "maybe": None})]),
    Case(save("tags=(1, 'two'), n=(3)"), "", [("save", {"tags": [1, "two"], "n": 3})]),
    Case(save("tags=[], data={}"), "", [("save", {"tags": [], "data": {}})]),
    Case(save("data={'a': {'b': (1,)},}"), "", [("save", {"data": {"a": {"b": [1]}}})]),
    # nothing but literals
    *(
        Case(save(arguments), save(arguments), [])
        for arguments in (
            "n=1+1",
            "text=str(1)",
            "text=name",
            "text=f'{n}'",
            "n=__import__('os')",
            "data={1: 2}",
            "data={1}",
            "tags=[x for x in y]",
            "'positional'",
            "**data",
            "n=1, n=2",
            "n=1 x=2",
            "n=-",
            "text='\\ud83c'",
            "x=1e999",
            "n=" + "[" * 200,
        )
    ),
    Case("[weather]", "[weather]", []),
    Case("[1] Smith, [2] Jones", "[1] Smith, [2] Jones", []),
    Case("[a link](city)", "[a link](city)", []),
    Case("[]", "[]", []),
    Case("weather(city='Oslo')", "weather(city='Oslo')", []),
    Case(f"So: {ONE}", f"So: {ONE}", []),
    Case(BARE.write(OSLO, UNKNOWN), BARE.write(OSLO, UNKNOWN), []),
    Case("[time(), time(]", "[time(), time(]", []),
]
