"""Requests that are refused: each with its status, its param and its code, and none with a 500."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from mesh.settings import ProxySettings
from tests.proxy.api_client import CHAT, COMPLETIONS, Api, error_of
from tests.proxy.tiny_tokenizer import VOCAB_SIZE, byte_level

HI = [{"role": "user", "content": "hi"}]
JSON_TYPE = {"content-type": "application/json"}


def post(body: bytes, path: str = CHAT, content_type: str | None = "application/json") -> tuple[int, dict[str, Any]]:
    headers = {} if content_type is None else {"content-type": content_type}
    response = Api().http.post(path, content=body, headers=headers)
    return response.status_code, error_of(response.json())


def body_with(value: str) -> bytes:
    """A complete request with one more field, written as given."""
    return b'{"model":"tiny","messages":[{"role":"user","content":"hi"}],"metadata":' + value.encode() + b"}"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"hello",
        b"[]",
        b"1",
        b'"x"',
        b"null",
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
        body_with("NaN"),
        body_with("Infinity"),
        body_with("-Infinity"),
        body_with("1e999"),
        body_with("[-1e999]"),
        body_with("9" * 5000),
        body_with('"\\ud800"'),
        body_with('{"\\udfff": 1}'),
        body_with('"\x00"'),
        body_with("[" * 500 + "]" * 500),
        body_with("[" * 100_000 + "]" * 100_000),
        body_with('{"a":' * 500 + "1" + "}" * 500),
        body_with('{"a": 1, "a": 2}'),
        b'{"model":"tiny","model":"tiny","messages":[]}',
        body_with("1]"),
    ],
    ids=range(24),
)
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_a_body_that_is_no_strict_json_object_is_400(body: bytes, path: str) -> None:
    status, error = post(body, path)
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert "JSON" in error["message"]
    assert error["code"] is None


def test_a_nul_that_the_model_wrote_may_come_back() -> None:
    answer = Api("a\0b").chat()["choices"][0]["message"]["content"]
    assert answer == "a\0b"
    api = Api()
    api.chat(answer)
    assert "a\0b" in api.tokenizer.decode(api.sent.tokens)


def test_surrogate_pairs_and_ordinary_depth_are_accepted() -> None:
    body = body_with('["\\ud83d\\ude00", ' + "[" * 90 + "]" * 90 + "]")
    assert Api().http.post(CHAT, content=body, headers=JSON_TYPE).status_code == 200


@pytest.mark.parametrize(
    "content_type", ["text/plain", "application/x-www-form-urlencoded", None, "multipart/form-data"]
)
def test_another_content_type_is_400(content_type: str | None) -> None:
    status, error = post(b"{}", content_type=content_type)
    assert status == 400
    assert "content type" in error["message"]


@pytest.mark.parametrize("content_type", ["application/json; charset=utf-8", "Application/JSON"])
def test_json_content_types_are_accepted(content_type: str) -> None:
    response = Api().http.post(CHAT, content=body_with("1"), headers={"content-type": content_type})
    assert response.status_code == 200


BAD_SAMPLING: list[tuple[dict[str, Any], str]] = [
    ({"model": 1}, "model"),
    ({"model": None}, "model"),
    ({"temperature": 3}, "temperature"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": True}, "temperature"),
    ({"temperature": 10**300}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 1.5}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"presence_penalty": 2.1}, "presence_penalty"),
    ({"frequency_penalty": -3}, "frequency_penalty"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": "1"}, "n"),
    ({"n": True}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": 1.5}, "seed"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 10**30}, "max_tokens"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", ""]}, "stop"),
    ({"stop": ["a"] * 5}, "stop"),
    ({"stop": [1]}, "stop"),
    ({"stop": 1}, "stop"),
    ({"stop": {"a": 1}}, "stop"),
    ({"stop": "x" * 1001}, "stop"),
    ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids"),
    ({"stop_token_ids": [-1]}, "stop_token_ids.0"),
    ({"stop_token_ids": [1] * 1025}, "stop_token_ids"),
    ({"stop_token_ids": ["1"]}, "stop_token_ids.0"),
    ({"logit_bias": []}, "logit_bias"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"²": 1}}, "logit_bias"),
    ({"logit_bias": {str(VOCAB_SIZE): 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias"),
    ({"logit_bias": {"5": True}}, "logit_bias"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": []}, "stream_options"),
    ({"cache_salt": ""}, "cache_salt"),
    ({"cache_salt": "a/b"}, "cache_salt"),
    ({"cache_salt": "x" * 129}, "cache_salt"),
    ({"ignore_eos": 1}, "ignore_eos"),
]


@pytest.mark.parametrize(("fields", "param"), BAD_SAMPLING)
def test_chat_names_the_wrong_field(fields: dict[str, Any], param: str) -> None:
    error = Api().chat_error(400, **fields)
    assert (error["type"], error["param"]) == ("invalid_request_error", param)


@pytest.mark.parametrize(("fields", "param"), BAD_SAMPLING)
def test_completions_name_the_wrong_field(fields: dict[str, Any], param: str) -> None:
    assert Api().complete_error(400, **fields)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages.0"),
        ({"messages": [{}]}, "messages.0.role"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, "messages.0.role"),
        ({"messages": [*HI, {"role": "user"}]}, "messages.1.content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [5]}]}, "messages.0.content.0.type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content.0.text"),
        ({"messages": [{"role": "user", "content": "x", "name": 1}]}, "messages.0.name"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages.0.tool_calls.0.function"),
        ({"messages": [{"role": "assistant", "tool_calls": {"a": 1}}]}, "messages.0.tool_calls"),
        ({"logprobs": 5}, "logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"tools": [1]}, "tools.0"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs.messages"),
        ({"chat_template_kwargs": {"self": 1}}, "chat_template_kwargs.self"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs"),
    ],
)
def test_chat_checks_its_own_fields(fields: dict[str, Any], param: str) -> None:
    assert Api().chat_error(400, **fields)["param"] == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt.0"),
        ({"prompt": [True]}, "prompt.0"),
        ({"prompt": [1, True]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [[1.5]]}, "prompt.0"),
        ({"prompt": [VOCAB_SIZE]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"echo": "yes"}, "echo"),
    ],
)
def test_completions_check_their_own_fields(fields: dict[str, Any], param: str) -> None:
    if fields.get("prompt") == "":
        fields = {**fields, "add_special_tokens": False}
    assert Api().complete_error(400, **fields)["param"] == param


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
    ({"structured_outputs": {"json": {"x-guidance": {"lenient": True}}}}, "structured_outputs.json.x-guidance"),
    ({"suffix": "x"}, "suffix"),
    ({"detokenize": False}, "detokenize"),
    ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens"),
    ({"mm_processor_kwargs": {"a": 1}}, "mm_processor_kwargs"),
    ({"audio": {"voice": "alloy"}}, "audio"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"guided_json": {"type": "object"}}, "guided_json"),
    ({"guided_json": {}}, "guided_json"),
    ({"prompt_token_ids": [1]}, "prompt_token_ids"),
    ({"extra_key": "tenant"}, "extra_key"),
    ({"best_of": 2}, "best_of"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"function_call": "auto"}, "function_call"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"chat_template": "x"}, "chat_template"),
    ({"web_search_options": {"a": 1}}, "web_search_options"),
    ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
    ({"kv_transfer_params": {}}, "kv_transfer_params"),
    ({"bootstrap_host": "10.0.0.1"}, "bootstrap_host"),
    ({"bootstrap_room": 0}, "bootstrap_room"),
    ({"disaggregated_params": {"a": 1}}, "disaggregated_params"),
]


@pytest.mark.parametrize(("fields", "param"), UNSUPPORTED)
def test_chat_refuses_what_it_would_have_to_ignore(fields: dict[str, Any], param: str) -> None:
    error = Api().chat_error(400, **fields)
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)


@pytest.mark.parametrize(("fields", "param"), UNSUPPORTED)
def test_completions_refuse_what_they_would_have_to_ignore(fields: dict[str, Any], param: str) -> None:
    error = Api().complete_error(400, **fields)
    assert (error["code"], error["param"]) == ("unsupported_parameter", param)


def test_an_unknown_field_is_logged_once_by_name(caplog: pytest.LogCaptureFixture) -> None:
    api = Api()
    for _ in range(2):
        api.chat(temprature=0.5, user="me", suffix=None, echo=False)
    api.complete(**{f"x{i}" * 50: i for i in range(100)})
    lines = [r.message for r in caplog.records if "not known" in r.message]
    assert "'temprature'" in lines[0]
    assert (len(lines), len(set(lines)), max(map(len, lines)) < 200) == (64, 64, True)


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "file"])
def test_other_content_parts_are_refused(kind: str) -> None:
    error = Api().chat_error(400, messages=[{"role": "user", "content": [{"type": kind}]}])
    assert (error["code"], error["param"]) == ("unsupported_parameter", "messages.0.content.0.type")


@pytest.mark.parametrize("fields", [{"best_of": 2}, {"best_of": 3, "n": 2}])
def test_best_of_more_than_n_is_refused(fields: dict[str, Any]) -> None:
    assert Api().complete_error(400, **fields)["code"] == "unsupported_parameter"


@pytest.mark.parametrize("name", ["max_completion_tokens", "top_logprobs"])
def test_limits_of_chat_are_not_ignored_by_completions(name: str) -> None:
    assert Api().complete_error(400, **{name: 1})["param"] == name


def test_tools_are_no_parameter_of_completions() -> None:
    assert Api().complete_error(400, tools=[{"type": "function"}])["code"] == "unsupported_parameter"


def test_echo_is_no_parameter_of_chat() -> None:
    assert Api().chat_error(400, echo=True)["code"] == "unsupported_parameter"


def test_an_unknown_model_is_404() -> None:
    error = Api().chat_error(404, model="gpt-9")
    assert (error["code"], error["param"]) == ("model_not_found", "model")


def test_no_model_is_400() -> None:
    response = Api().http.post(CHAT, json={"messages": HI})
    assert (response.status_code, error_of(response.json())["param"]) == (400, "model")


@pytest.mark.parametrize(("path", "param"), [(CHAT, "messages"), (COMPLETIONS, "prompt")])
@pytest.mark.parametrize("length", [300, 400_000])
def test_a_prompt_over_the_context_is_400(path: str, param: str, length: int) -> None:
    text = "x" * length
    body = {"messages": [{"role": "user", "content": text}], "prompt": text}
    fields = {key: body[key] for key in ([param])}
    error = Api().error(path, fields)
    assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert error["message"].startswith("This model's maximum context length is 256 tokens. ")


def test_token_ids_over_the_context_are_400() -> None:
    assert Api().complete_error(prompt=[5] * 256)["code"] == "context_length_exceeded"


def test_a_prompt_that_leaves_room_for_one_token_is_served() -> None:
    assert Api("abc").complete([5] * 255)["choices"][0]["finish_reason"] == "length"


def test_a_model_without_a_chat_template_serves_completions_only() -> None:
    api = Api(tokenizer=byte_level(None))
    assert "chat template" in api.chat_error(400)["message"]
    assert api.complete()["choices"]


def test_a_template_that_refuses_the_messages_is_400() -> None:
    api = Api(tokenizer=byte_level("{{ raise_exception('roles must alternate') }}"))
    assert "roles must alternate" in api.chat_error(400)["message"]


def test_many_errors_are_told_briefly() -> None:
    error = Api().chat_error(400, stop_token_ids=["x" * 10_000] * 1000)
    assert len(error["message"]) <= 2000
    assert error["message"].count(";") == 10
    assert "990 more" in error["message"]


def test_an_error_never_repeats_a_long_input() -> None:
    for fields in ({"model": "m" * 100_000}, {"logit_bias": {"k" * 100_000: 1}}, {"tool_choice": "t" * 100_000}):
        response = Api().http.post(CHAT, json={"model": "tiny", "messages": HI, **fields})
        assert response.status_code in (400, 404)
        assert len(response.content) < 3000


def test_a_body_over_the_limit_is_413() -> None:
    api = Api(settings=ProxySettings(max_body_bytes=1000))
    response = api.http.post(CHAT, content=b"x" * 1001, headers=JSON_TYPE)
    assert response.status_code == 413
    assert error_of(response.json())["code"] == "request_too_large"
    assert response.headers["connection"] == "close"


def test_a_body_at_the_limit_is_read() -> None:
    body = json.dumps({"model": "tiny", "messages": HI}).encode()
    api = Api(settings=ProxySettings(max_body_bytes=len(body)))
    assert api.http.post(CHAT, content=body, headers=JSON_TYPE).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nope", 404), ("POST", "/v1/nope", 404), ("GET", CHAT, 405), ("PUT", COMPLETIONS, 405)],
)
def test_an_unknown_route_has_the_same_error_shape(method: str, path: str, status: int) -> None:
    response = Api().http.request(method, path)
    assert response.status_code == status
    assert error_of(response.json())["type"] == "invalid_request_error"
    assert response.headers["x-request-id"]


def hostile(choose: random.Random, depth: int = 0) -> Any:
    """Some JSON value."""
    scalars: list[Any] = [None, True, 0, -1, 2**63, 10**40, 0.5, -1e308, "", "x", "é" * 50, "\u202e"]
    kind = choose.randint(0, 4 if depth < 3 else 2)
    if kind <= 2:
        return choose.choice(scalars)
    size = choose.randint(0, 3)
    if kind == 3:
        return [hostile(choose, depth + 1) for _ in range(size)]
    keys = ("role", "content", "type", "text", "0", "function", "include_usage", "")
    return {choose.choice(keys): hostile(choose, depth + 1) for _ in range(size)}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_no_value_of_any_field_is_a_server_error(path: str) -> None:
    api = Api()
    choose = random.Random(7)
    schema = api.http.get("/openapi.json").json()["paths"][path]["post"]["requestBody"]["content"]
    names = [*schema["application/json"]["schema"]["properties"], "suffix", "kv_transfer_params"]
    for _ in range(600):
        body: dict[str, Any] = {"model": "tiny", "messages": HI, "prompt": "hi"}
        for name in choose.sample(names, choose.randint(1, 2)):
            body[name] = hostile(choose)
        response = api.http.post(path, json=body)
        assert response.status_code < 500, (body, response.text)
        if response.status_code >= 400:
            error_of(response.json())
