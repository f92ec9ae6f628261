"""Every format's outputs, fed in every way: the same text, thinking and calls, and nothing lost."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterable

import pytest

from mesh.errors import StartupError
from proxy.text.toolcalls import CallParser, Parsed
from proxy.text.toolformats import FORMATS, ToolFormat, detected, tool_format
from tests.proxy.tiny_tokenizer import byte_level
from tests.proxy.toolformats import (
    deepseek_v3,
    deepseek_v31,
    glm45,
    harmony,
    hermes,
    kimi_k2,
    llama3_json,
    llama4_pythonic,
    mistral,
    olmo3,
    pythonic,
    qwen3_coder,
)
from tests.proxy.toolformats.cases import FUNCTIONS, Call, Case

CORPORA = {
    "deepseek_v3": deepseek_v3.CASES,
    "deepseek_v31": deepseek_v31.CASES,
    "glm45": glm45.CASES,
    "glm47": glm45.CASES,
    "harmony": harmony.CASES,
    "hermes": hermes.CASES,
    "kimi_k2": kimi_k2.CASES,
    "llama3_json": llama3_json.CASES,
    "llama4_json": llama3_json.CASES,
    "llama4_pythonic": llama4_pythonic.CASES,
    "mistral": mistral.CASES,
    "mistral_args": mistral.CASES,
    "olmo3": olmo3.CASES,
    "pythonic": pythonic.CASES,
    "qwen3_coder": qwen3_coder.CASES,
}
BY_NAME = {format.name: format for format in FORMATS}
ALL = [
    pytest.param(BY_NAME[name], case, id=f"{name}-{i}")
    for name, cases in CORPORA.items()
    for i, case in enumerate(cases)
]


def fed(parser: CallParser, pieces: Iterable[str], *, complete: bool = False) -> tuple[str, list[Call], str]:
    """What an answer that came in pieces comes to."""
    parts = [*(parser.push(piece) for piece in pieces), parser.flush(complete=complete)]
    calls = [call for part in parts for call in part.calls]
    assert [call.index for call in calls] == list(range(len(calls)))
    assert len({call.id for call in calls}) == len(calls)
    text, reasoning = ("".join(parts) for parts in zip(*((part.text, part.reasoning) for part in parts), strict=True))
    return text, [(call.name, json.loads(call.arguments)) for call in calls], reasoning


def test_every_format_has_a_corpus() -> None:
    assert set(CORPORA) == set(BY_NAME)
    assert min(map(len, CORPORA.values())) >= 40


@pytest.mark.parametrize(("format", "case"), ALL)
def test_whole_by_characters_and_in_random_pieces(format: ToolFormat, case: Case) -> None:
    output, complete = case.output, case.complete
    expected = (case.text, case.calls, case.reasoning)
    assert fed(format.parser(FUNCTIONS), [output], complete=complete) == expected
    assert fed(format.parser(FUNCTIONS), output, complete=complete) == expected
    rng = random.Random(output)
    for _ in range(8):
        cuts = sorted(rng.randint(0, len(output)) for _ in range(rng.randint(0, 12)))
        pieces = [output[a:b] for a, b in zip([0, *cuts], [*cuts, len(output)], strict=True)]
        assert fed(format.parser(FUNCTIONS), pieces, complete=complete) == expected


WEATHER = ("weather", {"city": "Oslo"})
SINGLE = {
    "hermes": hermes.WRITTEN,
    "qwen3_coder": qwen3_coder.WRITTEN,
    "glm45": glm45.WRITTEN,
    "kimi_k2": kimi_k2.WRITTEN,
    "llama3_json": llama3_json.BARE,
    "mistral": mistral.LIST,
    "mistral_args": mistral.NAMED,
    "deepseek_v3": deepseek_v3.WRITTEN,
    "deepseek_v31": deepseek_v31.WRITTEN,
    "pythonic": pythonic.BARE,
    "llama4_pythonic": llama4_pythonic.MARKED,
    "olmo3": olmo3.WRITTEN,
    "harmony": harmony.WRITTEN,
}


@pytest.mark.parametrize("name", CORPORA)
def test_spliced_outputs_do_not_depend_on_the_pieces_either(name: str) -> None:
    format = BY_NAME[name]
    rng = random.Random(name)
    outputs = [case.output for case in CORPORA[name] if len(case.output) < 400]
    scraps = [*format.all_marks, "x", "\n", '"', "'", "{", "[", ";"]
    for _ in range(60):
        output = ""
        for _ in range(rng.randint(1, 5)):
            part = rng.choice(outputs)
            output += part[rng.randint(0, len(part)) // 3 :][: rng.randint(0, 400)] + rng.choice(scraps)
        whole = fed(format.parser(FUNCTIONS), [output])
        assert fed(format.parser(FUNCTIONS), output) == whole, output
        assert whole[1] or format.always or whole[0] == output, output


@pytest.mark.parametrize("name", SINGLE)
def test_a_call_is_passed_on_with_its_last_character(name: str) -> None:
    parser = BY_NAME[name].parser(FUNCTIONS)
    output = SINGLE[name].write(WEATHER)
    passed = [i for i, character in enumerate(output) if parser.push(character).calls]
    end = output.rindex("Oslo")
    assert len(passed) == 1
    closing = output[end : passed[0] + 1].removeprefix("Oslo")
    assert closing == output[end + 4 :][: len(closing)]
    assert "weather" not in closing
    held = output[passed[0] + 1 :]  # marks that belong to nobody
    assert held.strip() in ("", *BY_NAME[name].all_marks)


@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
def test_text_is_not_held_longer_than_it_may_be_a_mark(format: ToolFormat) -> None:
    parser = format.parser(FUNCTIONS)
    assert parser.push("hello ").text == "hello "
    assert parser.push("a <").text.startswith("a ")
    assert parser.push("b> [ { ").text.endswith("b> [ { ")


def test_json_that_cannot_be_a_call_is_not_held() -> None:
    parser = BY_NAME["llama3_json"].parser(FUNCTIONS)
    assert parser.push('{"city').text == ""
    assert parser.push('":').text == '{"city":'


@pytest.mark.parametrize("name", SINGLE)
def test_without_parallel_calls_the_first_one_ends_the_answer(name: str) -> None:
    output = SINGLE[name].write(WEATHER, ("time", {}))
    for pieces in ([output], list(output)):
        parser = BY_NAME[name].parser(FUNCTIONS, parallel=False)
        assert fed(parser, pieces) == ("", [WEATHER], "")
        assert parser.done
        assert parser.push(output).calls == ()
        assert parser.flush() == Parsed("")


def ids(name: str, output: str) -> list[str]:
    parser = BY_NAME[name].parser(FUNCTIONS)
    return [call.id for part in (parser.push(output), parser.flush()) for call in part.calls]


def test_kimi_keeps_the_ids_that_the_model_wrote_as_long_as_they_differ() -> None:
    call = kimi_k2.call
    assert ids("kimi_k2", call("functions.time:7", "{}") + call("functions.time:8", "{}")) == [
        "functions.time:7",
        "functions.time:8",
    ]
    assert ids("kimi_k2", call("time", "{}") * 2) == ["functions.time:0", "functions.time:1"]
    assert ids("kimi_k2", call("functions.time:7", "{}") * 2) == ["functions.time:7", "functions.time:1"]
    first, second = ids("kimi_k2", call("functions.time:1", "{}") * 2)
    assert first == "functions.time:1"
    assert second.startswith("call_")


def test_mistral_ids_are_nine_letters_and_digits() -> None:
    assert ids("mistral", "[TOOL_CALLS]time[CALL_ID]Ab3dEf6hI[ARGS]{}") == ["Ab3dEf6hI"]
    assert ids("mistral", '[TOOL_CALLS][{"name": "time", "id": "Ab3dEf6hI"}]') == ["Ab3dEf6hI"]
    twice = "[TOOL_CALLS]time[CALL_ID]Ab3dEf6hI[ARGS]{}" * 2
    for id in ids("mistral", twice + "[TOOL_CALLS]time[CALL_ID]too_long_for_it[ARGS]{}[TOOL_CALLS]time{}"):
        assert re.fullmatch("[A-Za-z0-9]{9}", id)


HOSTILE = {
    "hermes": ("<tool_call>", '<tool_call>{"name": "', '<tool_call>{"a": "<tool_call>{",":",":",', "<tool_call>{"),
    "qwen3_coder": ("<tool_call>\n<function=f>\n<parameter=a>\n", "<function=", "</parameter>", "<function=f>x"),
    "glm45": ("<tool_call>f<arg_key>a</arg_key><arg_value>", "</arg_value>", "<tool_call>"),
    "kimi_k2": ("<|tool_call_begin|>", '<|tool_call_begin|>f<|tool_call_argument_begin|>{"'),
    "deepseek_v3": ("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f```json{"),
    "mistral": ("[TOOL_CALLS]", '[TOOL_CALLS][{"a":"'),
    "llama3_json": ("<|python_tag|>", '{"name":"', ";", '<|python_tag|>{"name":'),
    "pythonic": ('[f(a="', "[f(a=[", "[f(a=1,"),
    "llama4_pythonic": ("<|python_start|>[f(", '<|python_start|>[f(a="'),
    "olmo3": ("<function_calls>", "f(a='"),
    "harmony": ("<|channel|>", "<|start|>x", "<|channel|>c to=functions.f<|message|>{", "<|channel|>x<|end|>"),
}


@pytest.mark.parametrize(("name", "part"), [(name, part) for name, parts in HOSTILE.items() for part in parts])
@pytest.mark.parametrize("whole", [False, True])
def test_the_work_grows_with_the_text_and_no_faster(name: str, part: str, whole: bool) -> None:
    def work(output: str) -> int:
        calls = 0

        def count(*_: object) -> None:
            nonlocal calls
            calls += 1

        parser = BY_NAME[name].parser({"f": FUNCTIONS["time"]})
        sys.setprofile(count)
        try:
            text, _, _ = fed(parser, [output] if whole else output)
        finally:
            sys.setprofile(None)
        assert text == output
        return calls

    assert work(part * 160) < 2.3 * work(part * 80) + 500


TEMPLATES = {
    "harmony": "<|start|>assistant<|channel|>commentary to=functions.x <|constrain|>json<|message|>{}<|call|>",
    "deepseek_v3": "'<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + name + '\\n```json\\n' + args",
    "deepseek_v31": "'<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' + args",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>id<|tool_call_argument_begin|>{}<|tool_call_end|>",
    "qwen3_coder": "<tool_call>\n<function=example>\n<parameter=one>\nvalue\n</parameter>\n</function>\n</tool_call>",
    "glm45": "<tool_call>{name}\n<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n</tool_call>",
    "glm47": "<tool_call>{name}<arg_key>{key}</arg_key><arg_value>{value}</arg_value></tool_call>",
    "hermes": '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call> "parameters": ',
    "mistral": "'[TOOL_CALLS] [' + calls + ']'",
    "mistral_args": "'[TOOL_CALLS]' + name + '[ARGS]' + arguments",
    "llama4_pythonic": "<|header_start|>system Use exact format: [func_name1(param1=value1), func_name2(...)]",
    "olmo3": "<function_calls>\nf(a=1)\n</function_calls>",
    "pythonic": "<|start_header_id|> [func_name1(params_name1=params_value1), func_name2(params)]",
    "llama3_json": '<|start_header_id|> {"name": function name, "parameters": dictionary} "parameters": <|python_tag|>',
    "llama4_json": '<|header_start|> <|python_start|> {"name": "f", "parameters": {}}',
    # families whose formats are not known here, though their marks look alike
    "": "<seed:tool_call><function=f><parameter=a>",
    " ": "<minimax:tool_call><invoke name=",
    "  ": "<｜DSML｜function_calls><｜DSML｜invoke name=",
    "   ": "<tool_calls><tool_call>name<tool_sep><arg_key>a</arg_key>",
    "    ": "<|tool_call>call:f{}<tool_call|>",
    "     ": "a model without tools",
}


@pytest.mark.parametrize(("name", "template"), TEMPLATES.items())
def test_the_format_is_what_the_chat_template_shows(name: str, template: str) -> None:
    found = [format.name for format in FORMATS if format.is_in(template)]
    assert found == [name] * bool(name.strip())
    assert detected(template) is BY_NAME.get(name)


def test_every_format_is_detected() -> None:
    assert set(BY_NAME) <= set(TEMPLATES)


@pytest.mark.parametrize(
    ("name", "template", "format"),
    [
        ("auto", "hermes", "hermes"),
        ("auto", "     ", None),
        ("llama3_json", "hermes", "llama3_json"),
        ("openai", "     ", "harmony"),
        ("qwen25", "     ", "hermes"),
        ("mistral", "     ", "mistral"),
        ("mistral", "mistral_args", "mistral_args"),
    ],
)
def test_a_format_can_be_named(name: str, template: str, format: str | None) -> None:
    tokenizer = byte_level("{% raw %}" + TEMPLATES[template] + "{% endraw %}")
    found = tool_format(name, tokenizer)
    assert (found.name if found else None) == format


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        StartupError, match=r"--tool-call-parser hermse is not known; give auto or one of .*hermes, qwen"
    ):
        tool_format("hermse", byte_level())


def test_a_name_means_one_family() -> None:
    names = [name for format in FORMATS for name in {format.name, *format.aliases} - {"mistral"}]
    assert len(names) == len(set(names))
