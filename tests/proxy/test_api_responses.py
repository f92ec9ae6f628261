"""/v1/responses over the application: fields, the object, the events, and what is kept."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from openai.types.responses import Response as ResponseModel
from openai.types.responses import ResponseInputItem, ResponseStreamEvent
from pydantic import TypeAdapter

from mesh.errors import RequestError
from mesh.settings import ProxySettings
from proxy.api.answer import Usage
from proxy.api.responses_body import ResponsesBody
from proxy.api.responses_items import ItemIds
from proxy.api.responses_object import response_object
from proxy.api.responses_output import Output
from proxy.api.responses_stream import ResponseStream
from proxy.generation import Chunk
from proxy.text.choice import Piece
from proxy.text.toolcalls import ToolCall
from tests.proxy.api_client import MODEL, Api, Call, error_of, reply
from tests.proxy.response_events import checked, parsed
from tests.proxy.tiny_tokenizer import TEMPLATE, byte_level

RESPONSES = "/v1/responses"
HERMES = TEMPLATE.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls }}") + "{# <tool_call> #}{{ tools }}"
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
CITY: Any = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER: Any = {"type": "function", "name": "weather", "description": "Of a city.", "parameters": CITY}
LOGPROBS = ["message.output_text.logprobs"]
LOST = RequestError(503, "The worker was lost.", type="server_error", code="worker_lost")
EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
ITEM: TypeAdapter[Any] = TypeAdapter(ResponseInputItem)


def create(api: Api, input: Any = "hi", **fields: Any) -> Any:
    """The response; fails unless it is 200 and of the official type."""
    response = api.http.post(RESPONSES, json={"model": MODEL, "input": input, **fields})
    assert response.status_code == 200, response.text
    ResponseModel.model_validate(response.json())
    return response.json()


def stream(api: Api, input: Any = "hi", **fields: Any) -> list[dict[str, Any]]:
    """The events; fails unless each is of the official types."""
    response = api.http.post(RESPONSES, json={"model": MODEL, "input": input, "stream": True, **fields})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = parsed(response.content)
    for event in events:
        EVENT.validate_python(event)
    return events


def refused(api: Api, status: int = 400, **fields: Any) -> dict[str, Any]:
    return api.error(RESPONSES, {"input": "hi", **fields}, status)


def get(api: Api, path: str, status: int = 200) -> Any:
    response = api.http.get(f"{RESPONSES}/{path}")
    assert response.status_code == status, response.text
    return response.json() if status == 200 else error_of(response.json())


def with_tools(script: Any = CALL) -> Api:
    return Api(script, tokenizer=byte_level(HERMES), max_model_len=4000)


def prompt(api: Api) -> str:
    return api.tokenizer.decode(list(api.sent.tokens))


def test_the_object_repeats_what_was_asked() -> None:
    api = Api("hello world")
    response = create(
        api,
        instructions="Be nice.",
        max_output_tokens=50,
        max_tool_calls=3,
        metadata={"a": "b"},
        temperature=0.5,
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        service_tier="flex",
        text={"verbosity": "low"},
        reasoning={"effort": "low", "summary": "auto"},
        truncation="disabled",
    )
    (item,) = response.pop("output")
    assert item == {
        "id": item["id"],
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "hello world", "annotations": [], "logprobs": []}],
        "status": "completed",
    }
    usage = response.pop("usage")
    assert usage == {
        "input_tokens": len(api.sent.tokens),
        "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0},
        "output_tokens": 7,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": len(api.sent.tokens) + 7,
    }
    assert response == {
        "id": response["id"],
        "object": "response",
        "created_at": response["created_at"],
        "completed_at": response["completed_at"],
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "background": False,
        "instructions": "Be nice.",
        "max_output_tokens": 50,
        "max_tool_calls": 3,
        "metadata": {"a": "b"},
        "model": MODEL,
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": "k",
        "prompt_cache_retention": None,
        "reasoning": {"effort": "low", "summary": "auto"},
        "safety_identifier": "s",
        "service_tier": "default",
        "store": True,
        "temperature": 0.5,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "text": {"format": {"type": "text"}, "verbosity": "low"},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "user": "u",
    }
    assert response["completed_at"] >= response["created_at"] > 1_700_000_000


def test_sampling_fields_reach_the_workers() -> None:
    api = Api()
    create(
        api,
        max_output_tokens=7,
        temperature=0.5,
        top_p=0.4,
        top_k=3,
        min_p=0.1,
        seed=11,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.5,
        logit_bias={"5": 1},
        cache_salt="salt",
        stop_token_ids=[9],
        ignore_eos=True,
    )
    params = api.sent.params
    assert (params.max_tokens, params.temperature, params.top_p, params.top_k, params.min_p) == (7, 0.5, 0.4, 3, 0.1)
    assert (params.presence_penalty, params.frequency_penalty, params.repetition_penalty) == (0.5, 0.25, 1.5)
    assert (params.seed, params.logit_bias, params.stop_token_ids) == (11, ((5, 1.0),), (9,))
    assert (api.sent.n, api.sent.cache_salt) == (1, "salt")


def test_a_stop_string_ends_the_text() -> None:
    assert create(Api("hello world"), stop=" wo")["output"][0]["content"][0]["text"] == "hello"


def test_the_limit_makes_a_response_incomplete() -> None:
    response = create(Api("hello world"), max_output_tokens=2)
    assert (response["status"], response["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert (response["output"][0]["status"], response["completed_at"]) == ("incomplete", None)


def test_an_answer_without_text_is_an_empty_message() -> None:
    (item,) = create(Api(""))["output"]
    assert (item["type"], item["content"][0]["text"], item["status"]) == ("message", "", "completed")


def test_log_probabilities_are_in_the_text_part() -> None:
    response = create(Api("hello world"), include=LOGPROBS, top_logprobs=2)
    entries = response["output"][0]["content"][0]["logprobs"]
    assert len(entries) == 7  # the last one is of the end of the turn
    assert entries[0]["token"] == "hello"
    assert entries[0]["bytes"] == list(b"hello")
    assert [len(e["top_logprobs"]) for e in entries] == [2] * 7
    events = stream(Api("hello world"), include=LOGPROBS)
    deltas = [e for e in events if e["type"] == "response.output_text.delta"]
    assert [len(e["logprobs"]) for e in deltas] == [1] * 6
    assert len(checked(events)["output"][0]["content"][0]["logprobs"]) == 7


def test_instructions_and_items_are_the_prompt() -> None:
    api = Api()
    given = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    create(api, given, instructions="Be nice.")
    assert prompt(api) == "system\nBe nice.\nuser\na\nassistant\nb\nuser\nc\nassistant\n"


def test_a_form_of_the_text_is_a_grammar() -> None:
    api = Api('{"city":"Oslo"}')
    format = {"type": "json_schema", "name": "city", "schema": CITY, "strict": True}
    response = create(api, text={"format": format})
    assert response["text"]["format"] == format
    assert '"city"' in (api.sent.params.grammar or "")
    create(api, text={"format": {"type": "json_object"}})
    assert api.sent.params.grammar is not None
    create(api, text={"format": {"type": "text"}})
    assert api.sent.params.grammar is None


def test_calls_are_items() -> None:
    response = create(with_tools(f"Wait. {CALL}\n{CALL}"), tools=[WEATHER])
    message, *calls = response["output"]
    assert message["content"][0]["text"] == "Wait. "
    assert [call["arguments"] for call in calls] == ['{"city": "Oslo"}'] * 2
    assert {(call["type"], call["name"], call["status"]) for call in calls} == {
        ("function_call", "weather", "completed")
    }
    assert len({call["call_id"] for call in calls} | {call["id"] for call in calls}) == 4
    assert response["tools"] == [{**WEATHER, "strict": False}]
    assert response["status"] == "completed"


def test_tools_reach_the_template_and_the_grammar() -> None:
    api = with_tools()
    create(api, tools=[WEATHER], tool_choice="required")
    assert "weather" in (api.sent.params.grammar or "")
    assert "Of a city." in prompt(api)
    create(api, tools=[WEATHER, {**WEATHER, "name": "time"}], tool_choice={"type": "function", "name": "weather"})
    assert "time" not in (api.sent.params.grammar or "")
    create(api, tools=[WEATHER], tool_choice="none")
    assert api.sent.params.grammar is None


def test_one_call_at_most() -> None:
    response = create(with_tools(CALL * 3), tools=[WEATHER], parallel_tool_calls=False)
    assert [item["type"] for item in response["output"]] == ["function_call"]


@pytest.mark.parametrize(
    ("script", "fields", "kinds", "status"),
    [
        ("hello é😀", {}, ["message"], "completed"),
        ("", {}, ["message"], "completed"),
        ("hello world", {"max_output_tokens": 2}, ["message"], "incomplete"),
        (f"Wait. {CALL}\n{CALL}", {"tools": [WEATHER]}, ["message", "function_call", "function_call"], "completed"),
    ],
)
@pytest.mark.parametrize("per_chunk", [1, 5, 1000])
def test_a_stream_tells_what_the_document_says(
    script: str, fields: Any, kinds: list[str], status: str, per_chunk: int
) -> None:
    whole = create(with_tools(reply(script, per_chunk=per_chunk)), **fields)
    response = checked(stream(with_tools(reply(script, per_chunk=per_chunk)), **fields))
    assert response["status"] == whole["status"] == status

    def shape(output: Any) -> list[Any]:
        return [(i["type"], i["status"], i.get("content"), i.get("arguments"), i.get("name")) for i in output]

    assert shape(response["output"]) == shape(whole["output"])
    assert [item["type"] for item in response["output"]] == kinds
    assert response["usage"] == whole["usage"]


def test_text_after_a_call_is_a_message_of_its_own() -> None:
    api = with_tools(f"Wait. {CALL} and {CALL}")
    response = checked(stream(api, tools=[WEATHER]))
    assert [item["type"] for item in response["output"]] == ["message", "function_call"] * 2
    cut = checked(stream(api, tools=[WEATHER], max_output_tokens=90))
    assert [(item["type"], item["status"]) for item in cut["output"]] == [
        ("message", "completed"),
        ("function_call", "completed"),
        ("message", "incomplete"),
    ]


@pytest.mark.parametrize("at_once", [False, True])
def test_what_a_model_thinks_is_an_item_before_its_answer(at_once: bool) -> None:
    sink = sink_of(include=LOGPROBS)
    call = ToolCall(0, "call_1", "weather", "{}")
    pieces = [
        Piece("", 1, None, (0,), reasoning="Hm", num_reasoning_tokens=1),
        Piece("", 1, None, (2,), reasoning="m.", num_reasoning_tokens=1),
        Piece("Yes", 1, None, (4,)),
        Piece("", 1, "tool_calls", (7,), calls=(call,)),
    ]
    if at_once:
        pieces = [Piece("Yes", 4, "tool_calls", (0, 1, 2, 3), (call,), "Hmm.", 2)]
    body = b"".join(sink.take(0, Chunk(0, 0, (), (), None), piece) for piece in pieces) + sink.end([])
    events = parsed(body)
    for event in events:
        EVENT.validate_python(event)
    thought, message, function_call = checked(events)["output"]
    assert (thought["type"], thought["content"]) == ("reasoning", [{"type": "reasoning_text", "text": "Hmm."}])
    assert message["content"][0]["text"] == "Yes"
    assert (function_call["call_id"], function_call["arguments"]) == ("call_1", "{}")


def test_log_probabilities_are_those_of_the_answer() -> None:
    output = Output(ItemIds("resp_" + "ab" * 24))
    pieces = [
        (Piece("", 1, None, (0,)), ["mark"]),
        (Piece("", 1, None, (1,), reasoning="Hm.", num_reasoning_tokens=1), []),
        (Piece("", 1, None, (2,)), ["held"]),
        (Piece("Yes", 1, None, (3,)), ["certain"]),
        (Piece("", 1, "stop", (4,)), ["end"]),
    ]
    for piece, names in pieces:
        for _ in output.take(piece, [{"token": name} for name in names]):
            pass
    for _ in output.end("completed"):
        pass
    message = output.objects()[1]
    assert [entry["token"] for entry in message["content"][0]["logprobs"]] == ["held", "certain", "end"]


def sink_of(**fields: Any) -> ResponseStream:
    body = ResponsesBody.model_validate({"model": MODEL, "input": "hi", **fields})
    id = "resp_" + "ab" * 24
    return ResponseStream(response_object(id, 1, body, byte_level()), Output(ItemIds(id)), Usage(3), None)


def test_a_failure_in_a_stream_is_a_failed_response() -> None:
    api = Api(reply("abcdef", fail_at=3, error=LOST))
    events = stream(api)
    response = checked(events)
    assert [e["delta"] for e in events if e["type"] == "response.output_text.delta"] == ["a", "b", "c"]
    assert response["status"] == "failed"
    assert response["error"] == {
        "code": "server_error",
        "message": "The worker was lost.",
        "param": None,
        "type": "worker_lost",
    }
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "abc"
    assert get(api, response["id"]) == response


def test_a_stream_that_has_only_been_kept_alive_fails_with_a_response() -> None:
    async def test() -> bytes:
        pause = asyncio.Event()
        script = reply("abc", pauses={0: pause}, fail_at=0, error=LOST)
        call = Call(Api(script, keep_alive_s=0.01).app, RESPONSES, {"input": "hi", "stream": True})
        await call.next_write()
        pause.set()
        await asyncio.wait_for(call.task, 5)
        return call.body

    body = asyncio.run(test())
    assert body.startswith(b": keep-alive\n\n")
    assert checked(parsed(body))["error"]["type"] == "worker_lost"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_failure_before_the_first_token_is_a_status(streamed: bool) -> None:
    api = Api(reply("abc", fail_at=0, error=LOST))
    assert refused(api, 503, stream=streamed)["code"] == "worker_lost"


def test_a_failure_of_a_whole_answer_is_a_status() -> None:
    assert refused(Api(reply("abcdef", fail_at=3, error=LOST)), 503)["code"] == "worker_lost"


def test_a_refusal_of_the_dispatcher_is_a_status() -> None:
    api = Api()
    api.dispatcher.refusals = [RequestError(503, "Not now.", code="overloaded", retry_after=7)]
    response = api.http.post(RESPONSES, json={"model": MODEL, "input": "hi"})
    assert (response.status_code, response.headers["retry-after"]) == (503, "7")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input.0.content.0.type"),
        ({"instructions": 5}, "instructions"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": -1}, "max_output_tokens"),
        ({"max_output_tokens": 5, "min_tokens": 6}, "min_tokens"),
        ({"max_tool_calls": 0}, "max_tool_calls"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"include": ["everything"]}, "include.0"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {"a": "x" * 513}}, "metadata.a"),
        ({"user": "x" * 513}, "user"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": True}}, "stream_options.include_usage"),
        ({"background": True, "store": False}, "background"),
        ({"truncation": "some"}, "truncation"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": 5}}}, "text.format.schema"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": "?"}}}}, "text.format.schema"),
        ({"text": {"verbosity": "huge"}}, "text.verbosity"),
        ({"text": {"mood": "good"}}, "text.mood"),
        ({"reasoning": {"mode": "pro"}}, "reasoning.mode"),
        ({"stop": [""]}, "stop"),
        ({"priority": 5}, "priority"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [{"type": "custom", "name": "x"}]}, "tools.0.type"),
        ({"tools": [{"type": "function"}]}, "tools.0.name"),
        ({"tools": [{"type": "function", "function": WEATHER}]}, "tools.0.function"),
        ({"tools": [{**WEATHER, "parameters": 5}]}, "tools.0.parameters"),
        ({"tools": [{**WEATHER, "async": True}]}, "tools.0.async"),
        ({"tools": [{**WEATHER, "defer_loading": True}]}, "tools.0.defer_loading"),
        ({"tools": [WEATHER, WEATHER]}, "tools.1.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "time"}}, "tool_choice.name"),
        ({"tools": [WEATHER], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"context_management": [{"type": "compaction"}]}, "context_management"),
        ({"moderation": {"model": "m"}}, "moderation"),
        ({"prompt_cache_options": {"prewarm": True}}, "prompt_cache_options.prewarm"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"n": 2}, "n"),
        ({"n": 0}, "n"),
        ({"prompt_logprobs": 0}, "prompt_logprobs"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "messages"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"logprobs": True}, "logprobs"),
        ({"kv_transfer_params": {}}, "kv_transfer_params"),
        ({"previous_response_id": 5}, "previous_response_id"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], param: str) -> None:
    error = refused(with_tools(), **fields)
    assert error["param"] == param
    assert "messages" not in error["message"] or "messages" in param


def test_harmless_fields_are_taken() -> None:
    create(
        Api(),
        n=1,
        prompt_cache_options={"mode": "implicit", "ttl": "30m"},
        prompt_cache_retention="24h",
        include=["reasoning.encrypted_content"],
        background=False,
        conversation=None,
        context_management=[],
        reasoning={"context": "auto", "mode": "standard"},
    )
    create(Api(), stream_options=None)
    assert stream(Api(), stream_options={"include_obfuscation": False})


def test_an_unknown_model_is_404() -> None:
    assert refused(Api(), 404, model="gpt-9")["code"] == "model_not_found"


def test_too_long_an_input_says_so_in_the_words_that_clients_know() -> None:
    error = refused(Api(), input="x" * 300)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "input")
    assert error["message"].startswith("This model's maximum context length is 256 tokens.")
    assert "your input resulted in" in error["message"]


LONG = [
    {"role": "user", "content": "a" * 100},
    {"role": "assistant", "content": "b" * 100},
    {"role": "user", "content": "c" * 30},
    {"role": "assistant", "content": "d" * 30},
    {"role": "user", "content": "e" * 30},
]


@pytest.mark.parametrize(
    ("limit", "dropped", "kept"),
    [(None, "ab", "cde"), (60, "ab", "cde"), (160, "abcd", "e")],
)
def test_a_conversation_that_is_too_long_begins_later(limit: int | None, dropped: str, kept: str) -> None:
    api = Api(max_model_len=256)
    create(api, LONG, truncation="auto", instructions="zz", max_output_tokens=limit)
    seen = prompt(api)
    assert all(letter * 30 in seen for letter in kept)
    assert all(letter * 30 not in seen for letter in dropped)
    assert "zz" in seen
    assert limit is None or api.sent.params.max_tokens == limit


def test_what_fits_is_not_cut_and_a_last_message_that_does_not_fit_is_refused() -> None:
    api = Api(max_model_len=2000)
    create(api, LONG, truncation="auto")
    assert "a" * 100 in prompt(api)
    error = refused(Api(max_model_len=256), input=[*LONG, {"role": "user", "content": "f" * 300}], truncation="auto")
    assert error["code"] == "context_length_exceeded"


def test_input_tokens_are_those_of_the_prompt() -> None:
    api = Api()
    fields = {"input": "hi", "instructions": "Be nice."}
    create(api, fields["input"], instructions=fields["instructions"])
    answer = api.http.post(f"{RESPONSES}/input_tokens", json=fields).json()
    assert answer == {"object": "response.input_tokens", "input_tokens": len(api.sent.tokens)}
    long = api.http.post(f"{RESPONSES}/input_tokens", json={"input": "x" * 3000}).json()
    assert long["input_tokens"] > 3000
    assert len(api.dispatcher.generations) == 1
    assert api.error(f"{RESPONSES}/input_tokens", {"input": 5})["param"] == "input"
    assert api.error(f"{RESPONSES}/input_tokens", {"input": "x", "tools": [{"type": "x"}]})["param"] == "tools.0.type"
    assert api.error(f"{RESPONSES}/input_tokens", {"input": "x", "model": "gpt-9"}, 404)["param"] == "model"


def test_a_stored_response_can_be_read_until_it_is_deleted() -> None:
    api = Api()
    response = create(api)
    assert get(api, response["id"]) == response
    deleted = api.http.delete(f"{RESPONSES}/{response['id']}")
    assert deleted.json() == {"id": response["id"], "object": "response", "deleted": True}
    for path in (response["id"], f"{response['id']}/input_items"):
        assert get(api, path, 404)["code"] == "response_not_found"
    assert api.http.delete(f"{RESPONSES}/{response['id']}").status_code == 404
    assert api.http.post(f"{RESPONSES}/{response['id']}/cancel").status_code == 404


def test_what_is_not_to_be_stored_is_not() -> None:
    api = Api()
    response = create(api, store=False)
    assert response["store"] is False
    assert get(api, response["id"], 404)["code"] == "response_not_found"
    assert refused(api, 404, previous_response_id=response["id"])["code"] == "previous_response_not_found"


@pytest.mark.parametrize("id", ["resp_1", "x", "resp_" + "0" * 48, "resp_" + "0" * 47 + "*", "%2e%2e", "é" * 200])
def test_an_unknown_id_is_404(id: str) -> None:
    assert get(Api(), id, 404)["param"] == "response_id"
    assert refused(Api(), 404 if len(id) < 129 else 400, previous_response_id=id)["param"] == "previous_response_id"


def test_a_conversation_goes_on_from_a_response() -> None:
    api = Api("hello world")
    first = create(api, "one", instructions="Be nice.")
    second = create(api, "two", previous_response_id=first["id"])
    assert prompt(api) == "user\none\nassistant\nhello world\nuser\ntwo\nassistant\n"
    api.http.delete(f"{RESPONSES}/{first['id']}")
    third = create(api, "three", previous_response_id=second["id"], instructions="Be brief.")
    assert prompt(api).startswith("system\nBe brief.\nuser\none\nassistant\nhello world\nuser\ntwo\nassistant\nhello")
    assert third["previous_response_id"] == second["id"]
    assert create(api, None, previous_response_id=third["id"])["status"] == "completed"


def test_a_function_is_called_and_answered_over_two_responses() -> None:
    api = with_tools()
    (call,) = create(api, "Weather?", tools=[WEATHER])["output"]
    id = get(api, "resp_" + call["id"][3:51])["id"]
    output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
    create(api, [output], previous_response_id=id, tools=[WEATHER])
    assert "tool\nsunny" in prompt(api)
    assert "Oslo" in prompt(api)
    wrong = {**output, "call_id": "call_other"}
    assert refused(api, input=[wrong], previous_response_id=id)["param"] == "input.0.call_id"


def test_items_can_be_named_by_their_ids() -> None:
    api = Api("hello world")
    first = create(api, "one")
    (given,) = get(api, f"{first['id']}/input_items")["data"]
    names = [{"type": "item_reference", "id": given["id"]}, {"id": first["output"][0]["id"]}]
    create(api, [*names, {"role": "user", "content": "two"}])
    assert prompt(api) == "user\none\nassistant\nhello world\nuser\ntwo\nassistant\n"
    for id in ("msg_1", first["output"][0]["id"][:-1] + "f", "msg_" + "0" * 52):
        error = refused(api, 404, input=[{"type": "item_reference", "id": id}])
        assert (error["code"], error["param"]) == ("item_not_found", "input.0.id")
    many = [{"type": "item_reference", "id": f"msg_{i}"} for i in range(65)]
    assert refused(api, input=many)["param"] == "input"


def test_input_items_come_in_pages() -> None:
    api = Api("b")
    first = create(api, [{"role": "user", "content": "a"}])
    second = create(api, [{"role": "user", "content": "c"}], previous_response_id=first["id"])
    path = f"{second['id']}/input_items"

    def texts(page: Any) -> str:
        return "".join(item["content"][0]["text"] for item in page["data"])

    everything = get(api, path)
    for item in everything["data"]:
        ITEM.validate_python(item)
    assert (texts(everything), everything["has_more"], everything["object"]) == ("cba", False, "list")
    page = get(api, f"{path}?limit=2&order=asc")
    assert (texts(page), page["has_more"]) == ("ab", True)
    assert [page["first_id"], page["last_id"]] == [item["id"] for item in page["data"]]
    rest = get(api, f"{path}?limit=2&order=asc&after={page['last_id']}")
    assert (texts(rest), rest["has_more"]) == ("c", False)
    end = get(api, f"{path}?order=asc&after={rest['last_id']}")
    assert (end["data"], end["first_id"], end["has_more"]) == ([], None, False)


@pytest.mark.parametrize(
    ("path", "param"),
    [
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"),
        ("/input_items?limit=x", "limit"),
        ("/input_items?limit=٣", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=msg_1", "after"),
        ("?stream=maybe", "stream"),
        ("?stream=true", "stream"),
        ("?starting_after=1", "starting_after"),
        ("?stream=true&starting_after=-1", "starting_after"),
    ],
)
def test_a_wrong_query_is_named(path: str, param: str) -> None:
    api = Api()
    assert get(api, create(api)["id"] + path, 400)["param"] == param


def test_only_responses_in_the_background_can_be_cancelled() -> None:
    api = Api()
    assert api.error(f"{RESPONSES}/{create(api)['id']}/cancel", {})["param"] == "response_id"


def test_an_answer_whose_client_left_is_not_kept() -> None:
    async def test() -> None:
        api = Api(reply("abcdef", pauses={2: asyncio.Event()}))
        call = Call(api.app, RESPONSES, {"input": "hi", "stream": True})
        await call.next_write()
        call.disconnect()
        await asyncio.wait_for(call.task, 5)
        assert api.dispatcher.generations[-1].aborted
        id = json.loads(call.body.split(b"data: ")[1].split(b"\n")[0])["response"]["id"]
        assert get(api, id, 404)["code"] == "response_not_found"

    asyncio.run(test())


def test_a_response_is_kept_for_so_long() -> None:
    assert ProxySettings().response_ttl == 3600
