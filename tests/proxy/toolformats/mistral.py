"""Mistral: a JSON list of calls behind a mark, or a name and its arguments behind marks of their own."""

from __future__ import annotations

from tests.proxy.toolformats.cases import OSLO, TIME, UNKNOWN, Call, Case, Writer, common, dumped


def member(call: Call) -> str:
    return dumped({"name": call[0], "arguments": call[1]})


LIST = Writer(
    call=member, start="[TOOL_CALLS] [", between=", ", end="]", marks=("[TOOL_CALLS]", "[ARGS]", "]"), unit=True
)
NAMED = Writer(
    call=lambda call: f"[TOOL_CALLS]{call[0]}[ARGS]{dumped(call[1])}", between="", marks=("[TOOL_CALLS]", "[ARGS]")
)
ONE = LIST.write(OSLO)
CASES = [
    *common(LIST),
    *common(NAMED),
    Case('[TOOL_CALLS][{"name":"weather","arguments":{"city":"Oslo"}}]', "", [OSLO]),
    Case('[TOOL_CALLS]\n[ {"arguments": {}, "name": "time"} ]\n', "", [TIME]),
    Case('[TOOL_CALLS] {"name": "time", "arguments": {}}', "", [TIME]),
    Case('[TOOL_CALLS]weather{"city": "Oslo"}', "", [OSLO]),
    Case('[TOOL_CALLS] weather [ARGS] {"city": "Oslo"}', "", [OSLO]),
    Case('[TOOL_CALLS]weather[CALL_ID]Ab3dEf6hI[ARGS]{"city": "Oslo"}', "", [OSLO]),
    Case("[TOOL_CALLS]time[ARGS]{}\n[TOOL_CALLS]time[ARGS]{}", "", [TIME, TIME]),
    Case("a [TOOL_CALLS]time[ARGS]{} b", "a  b", [TIME]),
    Case(LIST.write(OSLO, UNKNOWN), LIST.write(OSLO, UNKNOWN), []),
    Case(ONE + NAMED.write(TIME), "", [OSLO, TIME]),
    Case("[TOOL_CALLS] []", "[TOOL_CALLS] []", []),
    Case("[TOOL_CALLS] [1]", "[TOOL_CALLS] [1]", []),
    Case('[TOOL_CALLS] [{"name": "time"},]', '[TOOL_CALLS] [{"name": "time"},]', []),
    Case("[TOOL_CALLS]time[ARGS][1]", "[TOOL_CALLS]time[ARGS][1]", []),
    Case("[TOOL_CALLS][ARGS]{}", "[TOOL_CALLS][ARGS]{}", []),
    Case("[TOOL_CALLS]", "[TOOL_CALLS]", []),
    Case("[TOOL_CALLS] hello", "[TOOL_CALLS] hello", []),
    Case("[TOOL_CALLS]" + ONE, "[TOOL_CALLS]", [OSLO]),
    Case("[TOOL_CALLS][TOOL_" + ONE, "[TOOL_CALLS][TOOL_", [OSLO]),
    Case("[1] and [ARGS]", "[1] and [ARGS]", []),
    Case(
        '[TOOL_CALLS]time[ARGS]{"a": "[TOOL_CALLS]time[ARGS]{}',
        '[TOOL_CALLS]time[ARGS]{"a": "[TOOL_CALLS]time[ARGS]{}',
        [],
    ),
]
