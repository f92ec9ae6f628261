"""The Messages API over HTTP: what is refused, what the model sees, what the client gets."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from mesh.errors import RequestError
from mesh.settings import ProxySettings
from proxy.api.door import Door
from tests.proxy.api_client import MODEL, Api, Call, reply
from tests.proxy.test_api_tools import CALL
from tests.proxy.test_api_tools import api as tool_api
from tests.proxy.tiny_tokenizer import byte_level

MESSAGES = "/v1/messages"
COUNT = "/v1/messages/count_tokens"
HI: list[Any] = [{"role": "user", "content": "hi"}]
WEATHER: Any = {"name": "weather", "description": "Of a city.", "input_schema": {"type": "object"}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "max_tokens": 200, "messages": HI, **fields}


def message(api: Api, **fields: Any) -> Any:
    response = api.http.post(MESSAGES, json=body(**fields))
    assert response.status_code == 200, response.text
    return response.json()


def stream(api: Api, **fields: Any) -> list[Any]:
    """The data of every event; fails unless each is named by its type."""
    response = api.http.post(MESSAGES, json=body(stream=True, **fields))
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return list(events(response.content))


def events(content: bytes) -> Iterator[Any]:
    assert content.endswith(b"\n\n")
    for frame in content.decode().split("\n\n")[:-1]:
        name, data = frame.split("\n")
        value = json.loads(data.removeprefix("data: "))
        assert name == f"event: {value['type']}"
        yield value


def error(response: Any, status: int, kind: str = "invalid_request_error") -> str:
    """The message of an error; fails unless it has Anthropic's form."""
    assert response.status_code == status, response.text
    document = response.json()
    assert document.keys() == {"type", "error", "request_id"}
    assert (document["type"], document["error"]["type"]) == ("error", kind)
    assert document["request_id"] == response.headers["request-id"] == response.headers["x-request-id"]
    text: str = document["error"]["message"]
    return text


def refusal(api: Api | None = None, **fields: Any) -> str:
    return error((api or tool_api()).http.post(MESSAGES, json=body(**fields)), 400)


def prompt(api: Api) -> str:
    return api.tokenizer.decode(api.sent.tokens, skip_special_tokens=False)


def test_a_message_has_every_field_of_anthropics() -> None:
    api = Api("hello é")
    answer = message(api)
    assert answer == {
        "id": answer["id"],
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": "hello é", "citations": None}],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "stop_details": None,
        "usage": {
            "input_tokens": len(api.sent.tokens) - 3,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 3,
            "output_tokens": 4,
        },
    }
    assert answer["id"].startswith("msg_")


def test_a_stream_starts_blocks_and_ends_them() -> None:
    found = stream(Api("ab"))
    assert [e["type"] for e in found] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert found[0]["message"]["usage"]["input_tokens"] > 3
    assert found[2] == {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "a"}}
    assert found[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None, "stop_details": None}
    assert (found[-2]["usage"]["cache_read_input_tokens"], found[-2]["usage"]["output_tokens"]) == (3, 3)


def test_an_empty_answer_has_no_blocks() -> None:
    assert message(Api(""))["content"] == []
    assert [e["type"] for e in stream(Api(""))] == ["message_start", "message_delta", "message_stop"]


@pytest.mark.parametrize(
    ("fields", "reason", "sequence"),
    [
        ({"max_tokens": 2}, "max_tokens", None),
        ({"stop_sequences": ["x", "lo wo"]}, "stop_sequence", "lo wo"),
        ({"stop_sequences": ["x"]}, "end_turn", None),
    ],
)
def test_why_it_ended(fields: dict[str, Any], reason: str, sequence: str | None) -> None:
    answer = message(Api("hello world"), **fields)
    assert (answer["stop_reason"], answer["stop_sequence"]) == (reason, sequence)
    delta = stream(Api("hello world"), **fields)[-2]["delta"]
    assert (delta["stop_reason"], delta["stop_sequence"]) == (reason, sequence)


def test_an_answer_that_the_context_cuts_says_so() -> None:
    answer = message(Api("hello world" * 30, max_model_len=40), max_tokens=5000)
    assert answer["stop_reason"] == "model_context_window_exceeded"


def test_sampling_reaches_the_workers() -> None:
    api = Api()
    message(api, temperature=0.5, top_p=0.25, top_k=7, max_tokens=9, seed=4, cache_salt="s")
    params = api.sent.params
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens, params.seed) == (0.5, 0.25, 7, 9, 4)
    assert api.sent.cache_salt == "s"


def test_what_changes_no_answer_is_accepted() -> None:
    mark = {"type": "ephemeral"}
    block = {"type": "text", "text": "hi", "cache_control": mark, "citations": None}
    api, plain = Api(), Api()
    message(
        api,
        messages=[{"role": "user", "content": [block]}],
        metadata={"user_id": "u"},
        service_tier="auto",
        cache_control=mark,
        inference_geo="eu",
        speed="fast",
    )
    message(plain)
    assert api.sent.tokens == plain.sent.tokens


def test_system_and_turns_reach_the_template() -> None:
    api = Api()
    blocks = [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
    messages = [*HI, {"role": "assistant", "content": "a"}, {"role": "user", "content": blocks}, *HI]
    message(api, system=[{"type": "text", "text": "S"}], messages=messages)
    assert prompt(api) == (
        "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
        "<|im_start|>user\nb\nc\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_an_assistants_last_message_is_continued() -> None:
    api = Api()
    message(api, messages=[*HI, {"role": "assistant", "content": "well"}])
    assert prompt(api).endswith("<|im_start|>assistant\nwell")


def test_an_assistants_empty_last_message_is_nothing_to_continue() -> None:
    api, plain = Api(), Api()
    message(api, messages=[*HI, {"role": "assistant", "content": []}])
    message(plain)
    assert api.sent.tokens == plain.sent.tokens


def test_a_last_message_that_the_template_changes_is_refused_in_words_of_this_api() -> None:
    api = Api(tokenizer=byte_level("{{ messages[-1].content | upper }}"))
    text = refusal(api, messages=[*HI, {"role": "assistant", "content": "well"}])
    assert text.startswith("An answer that continues the last message needs")


def test_calls_results_and_thoughts_of_earlier_turns_reach_the_template() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }} {{ m.content }}"
        " {{ m.tool_calls[0].function.arguments.city if m.tool_calls }} {{ m.tool_call_id }}"
        " {{ m.reasoning_content }}]{% endfor %}"
    )
    api = Api(tokenizer=byte_level(template))
    use = {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Oslo"}}
    messages = [
        *HI,
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "x"},
                {"type": "redacted_thinking", "data": "x"},
                {"type": "text", "text": "Wait."},
                use,
                {**use, "id": "t2"},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "rain"}]},
                {"type": "tool_result", "tool_use_id": "t2", "content": "gone", "is_error": True},
                {"type": "text", "text": "So?"},
            ],
        },
    ]
    message(api, messages=messages)
    assert prompt(api) == ("[user hi   ][assistant Wait. Oslo  hm][tool rain  t1 ][tool Error: gone  t2 ][user So?   ]")


def test_tools_reach_the_template_as_functions() -> None:
    api = Api(tokenizer=byte_level("{{ tools[0].function.parameters.type }} {# <tool_call> #}"))
    message(api, tools=[{**WEATHER, "type": "custom", "cache_control": {"type": "ephemeral"}}])
    assert prompt(api) == "object "


@pytest.mark.parametrize(
    ("thinking", "shown"), [({"type": "enabled", "budget_tokens": 1024}, "True"), ({"type": "disabled"}, "False")]
)
def test_templates_learn_whether_to_think(thinking: dict[str, Any], shown: str) -> None:
    api = Api(tokenizer=byte_level("{{ enable_thinking }} {{ reasoning_effort }}"))
    message(api, thinking=thinking, output_config={"effort": "low"}, max_tokens=2000)
    assert prompt(api) == f"{shown} low"


@pytest.mark.parametrize("field", ["output_config", "output_format"])
def test_a_form_of_the_output_is_a_grammar(field: str) -> None:
    api = Api('{"a": 1}')
    form = {"type": "json_schema", "schema": SCHEMA}
    message(api, **{field: {"format": form} if field == "output_config" else form})
    assert api.sent.params.grammar is not None
    assert '"a"' in api.sent.params.grammar


def test_a_call_is_a_block() -> None:
    answer = message(tool_api(f"Wait. {CALL}"), tools=[WEATHER])
    text, call = answer["content"]
    assert text["text"] == "Wait. "
    assert call == {"type": "tool_use", "id": call["id"], "name": "weather", "input": {"city": "Oslo"}}
    assert call["id"].startswith("toolu_")
    assert answer["stop_reason"] == "tool_use"


def test_a_streamed_call_is_a_block_of_its_own() -> None:
    found = stream(tool_api(f"Wait. {CALL}{CALL}"), tools=[WEATHER])
    starts = [(e["index"], e["content_block"]["type"]) for e in found if e["type"] == "content_block_start"]
    assert starts == [(0, "text"), (1, "tool_use"), (2, "tool_use")]
    assert [e["index"] for e in found if e["type"] == "content_block_stop"] == [0, 1, 2]
    inputs = [e["delta"]["partial_json"] for e in found if e.get("delta", {}).get("type") == "input_json_delta"]
    assert [json.loads(text) for text in inputs] == [{"city": "Oslo"}] * 2
    assert found[-2]["delta"]["stop_reason"] == "tool_use"


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_calls_are_enforced_by_grammar(choice: dict[str, Any]) -> None:
    api = tool_api()
    message(api, tools=[WEATHER], tool_choice=choice)
    assert api.sent.params.grammar is not None
    assert "weather" in api.sent.params.grammar


def test_one_call_at_most_ends_the_answer() -> None:
    answer = message(
        tool_api(CALL * 3), tools=[WEATHER], tool_choice={"type": "auto", "disable_parallel_tool_use": True}
    )
    assert len(answer["content"]) == 1
    assert answer["stop_reason"] == "tool_use"


def test_without_calls_the_marks_are_text() -> None:
    answer = message(tool_api(), tools=[WEATHER], tool_choice={"type": "none"})
    assert answer["content"][0]["text"] == CALL


def test_tokens_are_counted_as_the_message_would_have_them() -> None:
    api = tool_api()
    fields = {"model": MODEL, "messages": HI, "system": "S", "tools": [WEATHER], "thinking": {"type": "adaptive"}}
    response = api.http.post(COUNT, json=fields)
    message(api, **fields)
    assert response.json() == {"input_tokens": len(api.sent.tokens)}
    long = api.http.post(COUNT, json={"model": MODEL, "messages": [{"role": "user", "content": "x" * 10_000}]})
    assert long.json()["input_tokens"] > 10_000
    assert "Extra inputs" in error(api.http.post(COUNT, json=body()), 400)


def user(*blocks: Any) -> list[Any]:
    return [{"role": "user", "content": list(blocks)}]


def assistant(*blocks: Any) -> list[Any]:
    return [*HI, {"role": "assistant", "content": list(blocks)}]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": 1.5}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"stop_sequences": ["a"] * 5}, "stop_sequences"),
        ({"stop_sequences": [""]}, "stop"),
        ({"system": 3}, "system"),
        ({"system": [{"type": "image"}]}, "system.0.type"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [3]}, "messages.0"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": "x", "name": "y"}]}, "messages.0"),
        ({"messages": user("x")}, "messages.0.content.0"),
        ({"messages": user({"type": "image", "source": {}})}, "messages.0.content.0.type"),
        ({"messages": user({"type": "text"})}, "messages.0.content.0.text"),
        ({"messages": user({"type": "tool_result"})}, "messages.0.content.0.tool_use_id"),
        (
            {"messages": user({"type": "tool_result", "tool_use_id": "t", "is_error": 1})},
            "messages.0.content.0.is_error",
        ),
        ({"messages": user({"type": "tool_result", "tool_use_id": "t", "content": 0})}, "messages.0.content.0.content"),
        ({"messages": user({"type": "thinking", "thinking": "x"})}, "messages.0.content.0.type"),
        ({"messages": assistant({"type": "tool_use", "id": "t", "name": "f", "input": []})}, "content.0.input"),
        ({"messages": assistant({"type": "tool_use", "id": "t", "name": "f", "input": {}})}, "tool_result"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"name": "f"}]}, "tools.0.input_schema"),
        ({"tools": [{**WEATHER, "name": "no spaces"}]}, "tools.0.name"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools.0.defer_loading"),
        ({"tools": [{**WEATHER, "strict": True, "input_schema": {"not": {}}}]}, "tools.0.input_schema"),
        ({"tool_choice": {"type": "any"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "g"}}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 1024}, "max_tokens": 1024}, "thinking.budget_tokens"),
        ({"thinking": {"type": "enabled", "budget_tokens": 10}}, "thinking.budget_tokens"),
        ({"thinking": {"type": "between_tools"}}, "thinking.type"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "output_config.format.schema"),
        ({"output_format": {"type": "json_schema", "schema": {"type": "no"}}}, "output_config.format.schema"),
        ({"container": "c"}, "container"),
        ({"mcp_servers": []}, "mcp_servers"),
        ({"unheard_of": 1}, "unheard_of"),
    ],
)
def test_a_refusal_names_the_field_as_the_client_wrote_it(fields: dict[str, Any], named: str) -> None:
    text = refusal(**fields)
    assert named in text
    assert "response_format" not in text
    assert ".function" not in text


def test_a_late_schema_error_is_one_too() -> None:
    form = {"type": "json_schema", "schema": {"type": "object", "not": {}}}
    assert "output_config.format.schema" in refusal(Api(), output_config={"format": form})


def test_every_failure_has_anthropics_form() -> None:
    api = Api(settings=ProxySettings(max_body_bytes=1000))
    assert "does not exist" in error(api.http.post(MESSAGES, json=body(model="x")), 404, "not_found_error")
    error(api.http.get(MESSAGES), 405)
    error(api.http.post(MESSAGES + "/batches", json={}), 404, "not_found_error")
    error(api.http.post(MESSAGES, content=b"{", headers={"content-type": "application/json"}), 400)
    error(api.http.post(MESSAGES, content=b"x"), 400)
    error(api.http.post(MESSAGES, json=body(system="x" * 1000)), 413, "request_too_large")
    error(
        api.http.post(MESSAGES, content=iter([b"x" * 2000]), headers={"content-type": "application/json"}),
        413,
        "request_too_large",
    )
    api.dispatcher.facts = None
    assert error(api.http.post(MESSAGES, json=body()), 503, "overloaded_error")
    api.dispatcher.submit = lambda request: 1 / 0  # type: ignore[method-assign, assignment, return-value]
    api.dispatcher.facts = Api().dispatcher.facts
    error(api.http.post(MESSAGES, json=body()), 500, "api_error")


def test_overload_is_529_wherever_it_is_noticed() -> None:
    door = Door(0)
    full = Api(door=door).http.post(MESSAGES, json=body())
    error(full, 529, "overloaded_error")
    assert full.headers["retry-after"] == "1"
    api = Api()
    api.dispatcher.refusals = [RequestError(503, "Busy.", code="overloaded", retry_after=7)]
    busy = api.http.post(MESSAGES, json=body())
    error(busy, 529, "overloaded_error")
    assert busy.headers["retry-after"] == "7"
    door.draining = True
    draining = Api(door=door).http.post(MESSAGES, json=body())
    error(draining, 503, "overloaded_error")
    assert draining.headers["connection"] == "close"


def test_a_failure_before_the_first_token_is_a_status() -> None:
    lost = RequestError(504, "Too late.", type="server_error", code="timeout")
    error(Api(reply("abc", fail_at=0, error=lost)).http.post(MESSAGES, json=body(stream=True)), 504, "timeout_error")


def test_a_failure_in_a_stream_is_an_error_event() -> None:
    found = stream(Api(reply("abc", fail_at=2, error=RequestError(503, "The worker was lost."))))
    assert found[-1]["error"] == {"type": "api_error", "message": "The worker was lost."}
    assert found[-1]["request_id"].startswith("req-")
    assert [e["type"] for e in found].count("content_block_delta") == 2
    assert "message_stop" not in [e["type"] for e in found]


def test_other_paths_keep_their_form() -> None:
    response = Api().http.post("/v1/messagesx", json={})
    assert response.json().keys() == {"error"}
    assert "request-id" not in response.headers


def test_the_template_of_tools_is_needed() -> None:
    assert "tools" in refusal(Api(), tools=[WEATHER])


def test_a_silent_stream_gets_pings_and_may_fail_after_them() -> None:
    async def test() -> None:
        hold = asyncio.Event()
        lost = RequestError(503, "The worker was lost.")
        api = Api(reply("abc", pauses={0: hold}, fail_at=0, error=lost), keep_alive_s=0.02)
        call = Call(api.app, MESSAGES, body(stream=True))
        await call.next_write()
        hold.set()
        await call.task
        types = [event["type"] for event in events(call.body)]
        assert types[0] == "ping"
        assert types[-1] == "error"

    asyncio.run(test())
