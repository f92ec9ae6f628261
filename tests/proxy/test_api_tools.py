"""Tools over the HTTP API: what is refused, what the model sees, what the client gets."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from mesh.grammar import Vocabulary, compile_grammar
from proxy.generation import GenerateRequest
from tests.proxy.api_client import MODEL, Api, finishes, reply
from tests.proxy.fake_dispatcher import Script
from tests.proxy.http_server import Server
from tests.proxy.tiny_tokenizer import IM_END, TEMPLATE, byte_level

HERMES = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}") + "{# <tool_call> #}{{ tools }}"
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
TIME = '<tool_call>{"name": "time", "arguments": {}}</tool_call>'
CITY: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}}


def api(script: Any = CALL, template: str = HERMES) -> Api:
    return Api(script, tokenizer=byte_level(template), max_model_len=4000)


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **fields}}


def test_a_call_is_an_object_of_the_message() -> None:
    choice = api().chat(tools=[WEATHER])["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert call == {
        "id": call["id"],
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }
    assert call["id"].startswith("call_")
    assert (choice["message"]["content"], choice["finish_reason"]) == (None, "tool_calls")


def test_a_streamed_call_comes_once_with_index_and_id() -> None:
    stream = api(f"Wait. {CALL}\n{CALL}").chat_stream(tools=[WEATHER], stream_options={"include_usage": True})
    deltas = [c["delta"] for event in stream for c in event["choices"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["index"] for call in calls] == [0, 1]
    assert len({call["id"] for call in calls}) == 2
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": "Oslo"}] * 2
    assert "".join(delta.get("content") or "" for delta in deltas) == "Wait. "
    assert finishes(stream) == [(0, "tool_calls")]
    assert stream[-1]["usage"]["completion_tokens"] > 100


def test_what_is_no_call_stays_text() -> None:
    text = CALL.replace("weather", "unheard_of")
    choice = api(text).chat(tools=[WEATHER])["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert "tool_calls" not in choice["message"]


def test_a_call_cut_by_the_limit_is_text_and_ends_with_length() -> None:
    choice = api().chat(tools=[WEATHER], max_tokens=30)["choices"][0]
    assert len(choice["message"]["content"]) >= 30
    assert CALL.startswith(choice["message"]["content"])
    assert choice["finish_reason"] == "length"


def test_length_wins_over_a_call_before_it() -> None:
    tokens = len(byte_level().encode(CALL, add_special_tokens=False))
    choice = api(CALL + " and more").chat(tools=[WEATHER], max_tokens=tokens + 3)["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}])
def test_without_offered_tools_nothing_is_parsed(fields: dict[str, Any]) -> None:
    choice = api().chat(**fields)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL, "stop")


def test_one_call_at_most_stops_the_workers() -> None:
    one = api(CALL * 3)
    choice = one.chat(tools=[WEATHER], parallel_tool_calls=False)["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["finish_reason"] == "tool_calls"
    assert one.dispatcher.generations[-1].stopped == [0]


def test_choices_have_calls_of_their_own() -> None:
    answer = api().chat(tools=[WEATHER], n=2, logprobs=True)
    assert len({choice["message"]["tool_calls"][0]["id"] for choice in answer["choices"]}) == 2
    assert all(len(choice["logprobs"]["content"]) > 50 for choice in answer["choices"])


def test_a_mark_that_is_a_special_token_is_still_seen() -> None:
    tokenizer = byte_level(HERMES)
    tokenizer.backend.add_special_tokens(["<tool_call>", "</tool_call>"])
    marked = type(tokenizer)(tokenizer.backend, eos_token_ids=(3,), templates={"default": HERMES}, vocab_size=320)
    tokens = [*marked.encode(CALL, add_special_tokens=False), 3]
    assert len(tokens) < len(CALL)
    choice = Api(Script(tokens), tokenizer=marked, max_model_len=4000).chat(tools=[WEATHER])["choices"][0]
    assert choice["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [1]}, "tools.0"),
        ({"tools": [{}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools.0.function.name"),
        ({"tools": [WEATHER, function(name="no spaces")]}, "tools.1.function.name"),
        ({"tools": [function(name="x" * 65)]}, "tools.0.function.name"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.function.name"),
        ({"tools": [function(description=3)]}, "tools.0.function.description"),
        ({"tools": [function(parameters=[])]}, "tools.0.function.parameters"),
        ({"tools": [function(strict="yes")]}, "tools.0.function.strict"),
        ({"tools": [function(strict=True, parameters={"pattern": "x"})]}, "tools.0.function.parameters"),
        ({"tools": [function(strict=True, parameters={"items": 5})]}, "tools.0.function.parameters"),
        ({"tools": [function(name=f"f{i}") for i in range(129)]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "perhaps"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": 3}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools"}}, "tool_choice.allowed_tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function"}}, "tool_choice.function.name"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "time"}}},
            "tool_choice.function.name",
        ),
        ({"tools": [function(parameters={"not": {}})], "tool_choice": "required"}, "tools"),
        (
            {"tools": [function(parameters={"minProperties": 3})], "tool_choice": "required"},
            "tools.0.function.parameters",
        ),
        (
            {"tools": [function(parameters={"x-guidance": {"lenient": True}})], "tool_choice": "required"},
            "tools.0.function.parameters.x-guidance",
        ),
        ({"tools": [WEATHER], "parallel_tool_calls": 1}, "parallel_tool_calls"),
        ({"tool_choice": "required"}, "tool_choice"),
    ],
)
def test_a_wrong_tool_is_named(fields: dict[str, Any], param: str) -> None:
    assert api().chat_error(**fields)["param"] == param


@pytest.mark.parametrize(
    ("choice", "allowed", "refused"),
    [
        ("required", [CALL, f"{CALL}\n{TIME}", TIME], ["Hello", CALL.replace("Oslo", 'Oslo", "x": "y')]),
        ({"type": "function", "function": {"name": "weather"}}, [CALL], ["Hello", TIME, f"{CALL}\n{CALL}"]),
    ],
    ids=["required", "named"],
)
def test_an_enforced_call_is_a_grammar(choice: Any, allowed: list[str], refused: list[str]) -> None:
    closed = {**WEATHER, "function": {**WEATHER["function"], "parameters": {**CITY, "additionalProperties": False}}}
    one = api()
    one.chat(tools=[closed, function(name="time")], tool_choice=choice)
    assert one.sent.params.grammar is not None
    tokenizer = byte_level(HERMES)

    def follows(text: str) -> bool:
        matcher = compile_grammar(Vocabulary.of(tokenizer).tokenizer(), one.sent.params.grammar or "")
        tokens = [*tokenizer.encode(text, add_special_tokens=False), IM_END]
        return bool(matcher.validate_tokens(tokens) == len(tokens))

    assert [text for text in allowed if not follows(text)] == []
    assert [text for text in refused if follows(text)] == []


def test_an_offered_call_is_not_enforced() -> None:
    one = api()
    one.chat(tools=[WEATHER], tool_choice="auto")
    assert one.sent.params.grammar is None


def test_tools_for_a_model_without_a_known_format_are_refused() -> None:
    error = api(template=TEMPLATE).chat_error(tools=[WEATHER])
    assert (error["code"], error["param"]) == ("unsupported_parameter", "tools")


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": 1, "maximum": 9},
        "unit": {"enum": ["c", "f", None]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}, "maxItems": 2},
        "size": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    },
    "required": ["n"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "minLength": 2}},
}


@pytest.mark.parametrize(
    ("arguments", "fits"),
    [
        ({"n": 3}, True),
        ({"n": 3, "unit": None, "tags": ["ab"], "size": 2.5}, True),
        ({"n": 3.0}, True),
        ({}, False),
        ({"n": "3"}, False),
        ({"n": True}, False),
        ({"n": 3.5}, False),
        ({"n": 10}, False),
        ({"n": 3, "unit": "k"}, False),
        ({"n": 3, "tags": ["a"]}, False),
        ({"n": 3, "tags": ["ab", "cd", "ef"]}, False),
        ({"n": 3, "size": "big"}, False),
        ({"n": 3, "other": 1}, False),
    ],
)
def test_a_strict_functions_call_fits_its_schema_or_is_text(arguments: dict[str, Any], fits: bool) -> None:
    text = f"<tool_call>{json.dumps({'name': 'f', 'arguments': arguments})}</tool_call>"
    message = api(text).chat(tools=[function(strict=True, parameters=SCHEMA)])["choices"][0]["message"]
    assert ("tool_calls" in message) == fits
    assert message["content"] == (None if fits else text)
    loose = api(text).chat(tools=[function(parameters=SCHEMA)])["choices"][0]["message"]
    assert "tool_calls" in loose


def test_a_schema_that_never_ends_is_given_up() -> None:
    endless = {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]}
    text = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    message = api(text).chat(tools=[function(strict=True, parameters=endless)])["choices"][0]["message"]
    assert message["content"] == text


@pytest.fixture
def client() -> Iterator[openai.OpenAI]:
    def script(request: GenerateRequest) -> Script:
        prompt = byte_level(HERMES).decode(list(request.tokens))
        return reply("It is sunny." if '"sunny"' in prompt else CALL)

    with Server(api(script)) as server, server.client() as client:
        yield client


@pytest.mark.parametrize("stream", [False, True])
def test_the_official_client_goes_round_the_loop(client: openai.OpenAI, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": "What is the weather in Oslo?"}]

    def ask() -> Any:
        if not stream:
            return client.chat.completions.create(model=MODEL, messages=messages, tools=[WEATHER]).choices[0].message
        with client.chat.completions.stream(model=MODEL, messages=messages, tools=[WEATHER]) as events:
            return events.get_final_completion().choices[0].message

    asked = ask()
    (call,) = asked.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    messages += [
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump(include={"id", "type", "function"})]},
        {"role": "tool", "tool_call_id": call.id, "content": '{"weather": "sunny"}'},
    ]
    assert ask().content == "It is sunny."
