"""gpt-oss: every output is messages in channels."""

from __future__ import annotations

from tests.proxy.toolformats.cases import OSLO, TIME, UNKNOWN, Case, Writer, common, dumped

START, CHANNEL, MESSAGE, END = "<|start|>assistant", "<|channel|>", "<|message|>", "<|end|>"
THOUGHT = f"{CHANNEL}analysis{MESSAGE}Hm.{END}{START}"
FINAL = f"{CHANNEL}final{MESSAGE}"


def message(recipient: str, body: str) -> str:
    return f"{CHANNEL}commentary to={recipient} <|constrain|>json{MESSAGE}{body}<|call|>"


WRITTEN = Writer(
    call=lambda c: message(f"functions.{c[0]}", dumped(c[1])),
    between=START,
    tail="<|call|>",
    marks=("<|call|>", "<|end|>", "<|start|>", "<|channel|>"),
    before=lambda text: f"{CHANNEL}commentary{MESSAGE}{text}{END}{START}",
    after=lambda text: f"{START}{FINAL}{text}<|return|>",
    alone=lambda text: f"{FINAL}{text}<|return|>",
)
ONE, CLOCK = WRITTEN.write(OSLO), WRITTEN.write(TIME)
LONG = f"{CHANNEL}{'x' * 600}"
BLANK = f"\n {ONE}\n"
CASES = [
    *(case for case in common(WRITTEN) if case.output != BLANK),
    # channels
    Case(f"{THOUGHT}{FINAL}Hello", "Hello", [], "Hm."),
    Case(f"{THOUGHT}{ONE}", "", [OSLO], "Hm."),
    Case(f"{THOUGHT}{THOUGHT}{FINAL}Hello", "Hello", [], "Hm.Hm."),
    Case(f"{CHANNEL}analysis{MESSAGE}Hm", "", [], "Hm"),
    Case(f"{CHANNEL}analysis{MESSAGE}", "", []),
    Case(f"{CHANNEL}analysis{MESSAGE}a < b <|x|> c{END}{START}{FINAL}d", "d", [], "a < b <|x|> c"),
    Case(f"{CHANNEL}analysis{MESSAGE}Hm{CHANNEL}final{MESSAGE}Hello", "Hello", [], "Hm"),
    Case(f"{CHANNEL}commentary{MESSAGE}Look: {END}{START}{ONE}", "Look: ", [OSLO]),
    Case(f"{START}{FINAL}Hello<|return|>", "Hello", []),
    Case(f"{FINAL}one{END}{START}{FINAL}two", "onetwo", []),
    Case("Hello, no channels", "Hello, no channels", []),
    # ways to write a call
    Case(f"{CHANNEL}commentary to=functions.time{MESSAGE}{{}}<|call|>", "", [TIME]),
    Case(f"{CHANNEL}commentary to=functions.time code{MESSAGE} {{ }} <|call|>", "", [TIME]),
    Case(f"{CHANNEL}analysis to=functions.time <|constrain|>json{MESSAGE}{{}}<|call|>", "", [TIME]),
    Case(f" to=functions.time{CHANNEL}commentary json{MESSAGE}{{}}<|call|>", "", [TIME]),
    Case(f"{START} to=functions.time{CHANNEL}commentary{MESSAGE}{{}}<|call|>", "", [TIME]),
    Case(f"{CHANNEL}commentary to=functions.time{MESSAGE}{{}}{END}{START}{ONE}", "", [TIME, OSLO]),
    Case(f"{CHANNEL}commentary to=functions.time{MESSAGE}{{}}{ONE}", "", [TIME, OSLO]),
    # no calls
    Case(message("python", "{}"), message("python", "{}"), []),
    Case(message("time", "{}"), message("time", "{}"), []),
    Case(message("functions.time", "[]"), message("functions.time", "[]"), []),
    Case(message("functions.time", "print(1)"), message("functions.time", "print(1)"), []),
    Case(f"{WRITTEN.call(UNKNOWN)}{START}{FINAL}So.", f"{WRITTEN.call(UNKNOWN)}So.", []),
    Case(f"{message('functions.time', '{]')}{START}{ONE}", message("functions.time", "{]"), [OSLO]),
    # broken headers
    Case(f"{CHANNEL}comm", f"{CHANNEL}comm", []),
    Case(f"{CHANNEL}final{END}", f"{CHANNEL}final{END}", []),
    Case(f"{CHANNEL}one{START}{ONE}", f"{CHANNEL}one", [OSLO]),
    Case(f"{LONG}{MESSAGE}Hello", f"{LONG}{MESSAGE}Hello", []),
    Case(f"{LONG}{ONE}", LONG, [OSLO]),
    Case(f"{FINAL}a {MESSAGE} b <|constrain|>", f"a {MESSAGE} b <|constrain|>", []),
]
