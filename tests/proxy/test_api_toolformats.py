"""Formats over the HTTP API: named by the operator, enforced, with a form, and for clients that stream."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from mesh.errors import StartupError
from mesh.grammar import Vocabulary, compile_grammar
from mesh.settings import ProxySettings
from mesh.tokenizer import Tokenizer
from proxy.text.choice import ChoiceText
from proxy.text.detokenizer import detokenizer
from proxy.text.toolformats import detected
from tests.proxy.api_client import MODEL, Api, chat_texts, finishes
from tests.proxy.fake_dispatcher import Script
from tests.proxy.http_server import Server
from tests.proxy.test_toolformats import BY_NAME, SINGLE, TEMPLATES
from tests.proxy.tiny_tokenizer import IM_END, TEMPLATE, byte_level
from tests.proxy.toolformats.cases import OSLO, TIME, UNKNOWN

CITY: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": CITY}}
CLOCK: Any = {"type": "function", "function": {"name": "time"}}
FORM: Any = {
    "type": "json_schema",
    "json_schema": {"name": "n", "schema": {"type": "object", "properties": {"n": {"type": "integer"}}}},
}


def template(name: str) -> str:
    return TEMPLATE + "{% raw %}{# " + TEMPLATES[name] + " #}{% endraw %}"


def marked(name: str) -> Tokenizer:
    """A vocabulary with the format's marks as special tokens."""
    tokenizer = byte_level(template(name))
    tokenizer.backend.add_special_tokens(sorted(set(BY_NAME[name].all_marks)))
    size = tokenizer.backend.get_vocab_size(with_added_tokens=True)
    return Tokenizer(tokenizer.backend, eos_token_ids=(IM_END,), templates={"default": template(name)}, vocab_size=size)


def api(name: str, output: str) -> Api:
    tokenizer = marked(name)
    tokens = [*tokenizer.encode(output, add_special_tokens=False), IM_END]
    return Api(Script(tokens), tokenizer=tokenizer, max_model_len=4000)


def allowed(mode: str, *names: str) -> dict[str, Any]:
    tools = [{"type": "function", "function": {"name": name}} for name in names]
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}


def called(choice: Any) -> list[tuple[str, Any]]:
    calls = choice["message"].get("tool_calls", [])
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


@pytest.mark.parametrize("name", SINGLE)
class TestEveryFormat:
    def test_marks_that_are_special_tokens_are_seen(self, name: str) -> None:
        one = api(name, SINGLE[name].write(OSLO, TIME))
        (choice,) = one.chat(tools=[WEATHER, CLOCK])["choices"]
        assert called(choice) == [OSLO, TIME]
        assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")

    def test_calls_are_streamed_with_index_and_id(self, name: str) -> None:
        stream = api(name, SINGLE[name].write(OSLO, TIME)).chat_stream(tools=[WEATHER, CLOCK])
        deltas = [c["delta"] for event in stream for c in event["choices"]]
        calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
        assert [call["index"] for call in calls] == [0, 1]
        assert len({call["id"] for call in calls}) == 2
        assert [call["function"]["name"] for call in calls] == ["weather", "time"]
        assert chat_texts(stream) == [""]
        assert finishes(stream) == [(0, "tool_calls")]

    def test_a_call_of_no_declared_function_is_text(self, name: str) -> None:
        output = SINGLE[name].write(UNKNOWN)
        (choice,) = api(name, output).chat(tools=[WEATHER])["choices"]
        assert (choice["message"]["content"], choice["finish_reason"]) == (output, "stop")

    def test_an_enforced_call_has_a_grammar_that_the_proxy_has_tried(self, name: str) -> None:
        one = api(name, SINGLE[name].write(OSLO))
        assert called(one.chat(tools=[WEATHER, CLOCK], tool_choice="required")["choices"][0]) == [OSLO]
        assert one.sent.params.grammar is not None
        (choice,) = one.chat(tools=[WEATHER, CLOCK], response_format=FORM)["choices"]
        assert "form: %lark" in (one.sent.params.grammar or "")
        assert called(choice) == [OSLO]


def follows(one: Api, text: str) -> bool:
    matcher = compile_grammar(Vocabulary.of(one.tokenizer).tokenizer(), one.sent.params.grammar or "")
    tokens = [*one.tokenizer.encode(text, add_special_tokens=False), IM_END]
    return bool(matcher.validate_tokens(tokens) == len(tokens))


HERMES_WEATHER = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
HERMES_TIME = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'


@pytest.mark.parametrize(
    ("fields", "form"),
    [
        ({"response_format": FORM}, '{"n": 5}'),
        ({"response_format": {"type": "json_object"}}, '{"x": [1]}'),
        ({"structured_outputs": {"regex": "[ab]+"}}, "abba"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes"),
        ({"structured_outputs": {"grammar": 'root ::= "x" [0-9]'}}, "x7"),
        ({"ebnf": 'root ::= "x" item\nitem ::= "y" | "{"'}, "x{"),
    ],
)
def test_with_a_form_the_answer_is_calls_or_that_form(fields: dict[str, Any], form: str) -> None:
    one = api("hermes", form)
    (choice,) = one.chat(tools=[WEATHER, CLOCK], **fields)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (form, "stop")
    assert follows(one, form)
    assert follows(one, HERMES_WEATHER)
    assert follows(one, f"{HERMES_WEATHER}\n{HERMES_TIME}")
    assert not follows(one, "Hello")
    assert not follows(one, form + HERMES_TIME)


def test_one_call_or_the_form_without_parallel_calls() -> None:
    one = api("hermes", "{}")
    one.chat(tools=[WEATHER, CLOCK], response_format=FORM, parallel_tool_calls=False)
    assert follows(one, HERMES_TIME)
    assert not follows(one, f"{HERMES_WEATHER}\n{HERMES_TIME}")


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_enforced_calls_win_over_a_form(choice: Any) -> None:
    one = api("hermes", HERMES_WEATHER)
    one.chat(tools=[WEATHER], tool_choice=choice, response_format=FORM)
    assert follows(one, HERMES_WEATHER)
    assert not follows(one, '{"n": 5}')


def test_without_offered_tools_a_form_is_just_that() -> None:
    one = api("hermes", "{}")
    one.chat(tools=[WEATHER], tool_choice="none", response_format=FORM)
    assert follows(one, '{"n": 5}')
    assert not follows(one, HERMES_WEATHER)


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"not": {}}}}}, None, None),
        ({"structured_outputs": {"grammar": "start: {"}}, "structured_outputs.grammar", "invalid_schema"),
        ({"structured_outputs": {"grammar": 'start: "a"\n}\nx: "b"'}}, "structured_outputs.grammar", "invalid_schema"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "unsupported_parameter"),
    ],
)
def test_a_form_beside_tools_is_checked_as_ever(fields: dict[str, Any], param: str | None, code: str | None) -> None:
    error = api("hermes", "{}").chat_error(tools=[WEATHER], **fields)
    assert error["param"] == (param or "response_format.json_schema.schema")
    assert error["code"] == (code or "invalid_schema")


def test_only_allowed_tools_are_called() -> None:
    one = api("hermes", HERMES_TIME + HERMES_WEATHER)
    (choice,) = one.chat(tools=[WEATHER, CLOCK], tool_choice=allowed("auto", "weather"))["choices"]
    assert called(choice) == [OSLO]
    assert choice["message"]["content"] == HERMES_TIME
    assert one.sent.params.grammar is None


def test_one_of_the_allowed_tools_can_be_required() -> None:
    one = api("hermes", HERMES_WEATHER)
    one.chat(tools=[WEATHER, CLOCK], tool_choice=allowed("required", "weather"))
    assert follows(one, f"{HERMES_WEATHER}\n{HERMES_WEATHER}")
    assert not follows(one, HERMES_TIME)
    assert not follows(one, "Hello")


def test_the_model_sees_the_tools_that_it_may_not_call() -> None:
    tokenizer = byte_level(template("hermes") + "{{ tools }}")
    one = Api("hi", tokenizer=tokenizer, max_model_len=4000)
    one.chat(tools=[WEATHER, CLOCK], tool_choice=allowed("auto", "weather"))
    assert "time" in tokenizer.decode(list(one.sent.tokens))


@pytest.mark.parametrize(
    ("choice", "param"),
    [
        ({"type": "allowed_tools", "allowed_tools": []}, "tool_choice.allowed_tools"),
        (allowed("maybe", "weather"), "tool_choice.allowed_tools.mode"),
        (allowed("auto"), "tool_choice.allowed_tools.tools"),
        (allowed("auto", "weather", "unheard_of"), "tool_choice.allowed_tools.tools.1.function.name"),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [3]}},
            "tool_choice.allowed_tools.tools.0",
        ),
        (
            {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [{"type": "custom"}]}},
            "tool_choice.allowed_tools.tools.0.type",
        ),
        ({"type": "custom", "custom": {"name": "x"}}, "tool_choice.type"),
    ],
)
def test_a_wrong_choice_is_named(choice: Any, param: str) -> None:
    assert api("hermes", "hi").chat_error(tools=[WEATHER], tool_choice=choice)["param"] == param


def test_custom_tools_are_not_served() -> None:
    error = api("hermes", "hi").chat_error(tools=[WEATHER, {"type": "custom", "custom": {"name": "x"}}])
    assert (error["param"], error["code"]) == ("tools.1.type", "unsupported_parameter")


def test_what_plain_values_cannot_say_is_refused_where_calls_are_enforced() -> None:
    pattern: Any = {"type": "object", "properties": {"a": {"type": "string", "pattern": "x"}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": pattern}}
    one = api("qwen3_coder", "hi")
    error = one.chat_error(tools=[WEATHER, tool], tool_choice="required")
    assert (error["param"], error["code"]) == ("tools.1.function.parameters", "invalid_schema")
    assert one.chat(tools=[WEATHER, tool])["choices"][0]["message"]["content"] == "hi"


def test_a_forgotten_mark_is_forgiven_at_the_turns_end_and_not_at_the_limit() -> None:
    output = SINGLE["glm45"].write(OSLO).removesuffix("</tool_call>")
    one = api("glm45", output)
    assert called(one.chat(tools=[WEATHER])["choices"][0]) == [OSLO]
    limit = len(one.tokenizer.encode(output, add_special_tokens=False))
    (choice,) = one.chat(tools=[WEATHER], max_tokens=limit)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (output, "length")
    (choice,) = one.chat(tools=[WEATHER], stop="\n")["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("<tool_call>weather", "stop")


def test_the_operator_can_name_the_format() -> None:
    settings = ProxySettings(tool_call_parser="qwen25")
    one = Api(HERMES_WEATHER, settings=settings, max_model_len=4000)
    assert called(one.chat(tools=[WEATHER])["choices"][0]) == [OSLO]


def test_an_unknown_name_is_an_error_at_startup() -> None:
    with pytest.raises(StartupError, match="deepseek_v31"):
        Api(settings=ProxySettings(tool_call_parser="hermse"))


THOUGHT = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER]}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_harmony_is_read_with_and_without_tools(fields: dict[str, Any]) -> None:
    one = api("harmony", f"{THOUGHT}<|channel|>final<|message|>Hello")
    (choice,) = one.chat(**fields)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("Hello", "stop")
    assert choice["message"]["reasoning"] == "Hm."
    assert one.sent.params.grammar is None


@pytest.mark.parametrize("shown", [True, False])
def test_harmony_thinking_is_counted_with_the_marks_around_it(shown: bool) -> None:
    one = api("harmony", f"{THOUGHT}<|channel|>final<|message|>Hello")
    usage = one.chat(include_reasoning=shown)["usage"]
    thought = one.tokenizer.encode("<|message|>Hm.<|end|>", add_special_tokens=False)
    assert usage["completion_tokens_details"] == {"reasoning_tokens": len(thought)}


def test_harmony_streams_what_the_model_thinks() -> None:
    stream = api("harmony", THOUGHT + SINGLE["harmony"].write(OSLO)).chat_stream(tools=[WEATHER])
    deltas = [c["delta"] for event in stream for c in event["choices"]]
    assert "".join(delta.get("reasoning", "") for delta in deltas) == "Hm."
    assert sum(len(delta.get("tool_calls", ())) for delta in deltas) == 1


def test_harmony_thinking_can_be_left_out_but_not_left_in() -> None:
    one = api("harmony", f"{THOUGHT}<|channel|>final<|message|>Hello")
    (choice,) = one.chat(include_reasoning=False)["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Hello", "refusal": None}
    for name in ("separate_reasoning", "stream_reasoning"):
        error = one.chat_error(**{name: False})
        assert (error["code"], error["param"]) == ("unsupported_parameter", name)


def test_harmony_calls_need_tools() -> None:
    call = SINGLE["harmony"].write(OSLO)
    (choice,) = api("harmony", call).chat()["choices"]
    assert choice["message"]["content"] == call


def test_a_form_in_harmony_is_that_of_the_final_channel() -> None:
    one = api("harmony", f"{THOUGHT}<|channel|>final<|message|>yes")
    (choice,) = one.chat(structured_outputs={"choice": ["yes", "no"]})["choices"]
    assert choice["message"]["content"] == "yes"
    assert follows(one, f"{THOUGHT}<|channel|>final<|message|>no")
    assert not follows(one, "no")


def test_harmony_thinking_is_the_pieces_reasoning() -> None:
    tokenizer = marked("harmony")
    format = detected(template("harmony"))
    assert format is not None
    keep = frozenset(tokenizer.special_token_ids)
    choice = ChoiceText(detokenizer(tokenizer, [], keep=keep), tools=format.parser({}))
    tokens = tokenizer.encode(f"{THOUGHT}<|channel|>final<|message|>Hello", add_special_tokens=False)
    pieces = [choice.push([token], None) for token in tokens] + [choice.push([IM_END], "stop")]
    assert "".join(piece.reasoning for piece in pieces) == "Hm."
    assert "".join(piece.text for piece in pieces) == "Hello"


@pytest.fixture(params=["qwen3_coder", "mistral_args", "harmony"])
def client(request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    name: str = request.param
    with Server(api(name, SINGLE[name].write(OSLO, TIME))) as server, server.client() as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_the_official_client_reads_the_calls(client: openai.OpenAI, stream: bool) -> None:
    ask: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "tools": [WEATHER, CLOCK]}
    if stream:
        with client.chat.completions.stream(**ask) as events:
            message = events.get_final_completion().choices[0].message
    else:
        message = client.chat.completions.create(**ask).choices[0].message
    found = [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]
    assert found == [OSLO, TIME]
