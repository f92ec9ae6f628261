"""/openapi.json: valid, complete, and true of the fullest answers."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi.routing import APIRoute
from openapi_spec_validator import validate

from mesh.settings import ProxySettings
from tests.fuzz.description import Answer, Description
from tests.proxy.api_client import CHAT, COMPLETIONS, MODEL, Api
from tests.proxy.test_api_tools import CALL, HERMES, WEATHER
from tests.proxy.tiny_tokenizer import byte_level

ALWAYS = {"200", "401", "405", "413", "500"}
READS = {"400", "403", "404", "408", "503"}
STATUSES = {
    ("post", "/v1/chat/completions"): READS | {"429", "504"},
    ("post", "/v1/chat/completions/render"): READS,
    ("post", "/v1/completions"): READS | {"429", "504"},
    ("post", "/v1/completions/render"): READS,
    ("post", "/v1/messages"): READS | {"429", "504", "529"},
    ("post", "/v1/messages/count_tokens"): READS | {"529"},
    ("post", "/tokenize"): READS,
    ("post", "/v1/tokenize"): READS,
    ("post", "/detokenize"): READS,
    ("post", "/v1/detokenize"): READS,
    ("post", "/v1/responses"): READS | {"429", "504"},
    ("post", "/v1/responses/input_tokens"): READS,
    ("get", "/v1/responses/{response_id}"): {"400", "404", "503"},
    ("delete", "/v1/responses/{response_id}"): {"404", "503"},
    ("post", "/v1/responses/{response_id}/cancel"): {"400", "404", "503"},
    ("get", "/v1/responses/{response_id}/input_items"): {"400", "404", "503"},
    ("get", "/v1/models"): set(),
    ("get", "/v1/models/{model_id}"): {"403", "404"},
    ("get", "/health"): set(),
    ("get", "/ready"): {"503"},
    ("get", "/version"): set(),
    ("get", "/load"): set(),
    ("get", "/openapi.json"): set(),
    ("get", "/metrics"): set(),
}
MESSAGES: Any = [{"role": "user", "content": "hi"}]


def document() -> Any:
    return Api().http.get("/openapi.json").json()


def full_api(text: str) -> Api:
    return Api(text, tokenizer=byte_level(HERMES), max_model_len=4000)


def check(api: Api, method: str, path: str, **request: Any) -> Answer:
    """The answer; fails unless it is as declared."""
    response = api.http.request(method, path, **request)
    answer = Answer(response.status_code, dict(response.headers), response.content)
    assert Description(api.http.get("/openapi.json").json()).complaint(method, path, answer) is None
    return answer


def test_it_is_valid_openapi() -> None:
    found = document()
    assert found["openapi"] == "3.1.0"
    validate(found)


def test_every_route_is_in_it_with_every_status_it_can_answer() -> None:
    operations = {(m, p): set(o["responses"]) for p, item in document()["paths"].items() for m, o in item.items()}
    assert operations == {key: ALWAYS | more for key, more in STATUSES.items()}
    routes = {r.path_format for r in Api().app.routes if isinstance(r, APIRoute)}
    assert routes <= {path for _, path in operations}


def test_nothing_is_said_without_a_schema() -> None:
    for path, item in document()["paths"].items():
        for operation in item.values():
            for status, response in operation["responses"].items():
                assert all(content["schema"] for content in response["content"].values()), (path, status)


def test_only_what_streams_has_events() -> None:
    paths = {
        path: content["x-itemSchema"]
        for path, item in document()["paths"].items()
        for operation in item.values()
        for kind, content in operation["responses"]["200"]["content"].items()
        if kind == "text/event-stream"
    }
    streams = {CHAT, COMPLETIONS, "/v1/messages", "/v1/responses", "/v1/responses/{response_id}"}
    assert paths.keys() == streams


@pytest.mark.parametrize("stream", [False, True])
def test_the_fullest_chat_is_as_declared(stream: bool) -> None:
    body: dict[str, Any] = {
        "model": MODEL,
        "messages": MESSAGES,
        "tools": [WEATHER],
        "n": 2,
        "logprobs": True,
        "top_logprobs": 2,
        "return_token_ids": True,
    }
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {"prompt_logprobs": 1}
    headers = {"x-kvmesh-route": "1"}
    answer = check(full_api(f"Wait. {CALL}"), "POST", CHAT, json=body | more, headers=headers)
    assert b'"tool_calls"' in answer.body
    assert b'"prompt_token_ids"' in answer.body


@pytest.mark.parametrize("stream", [False, True])
def test_the_fullest_completion_is_as_declared(stream: bool) -> None:
    body: dict[str, Any] = {"model": MODEL, "prompt": ["a", "b"], "n": 2, "logprobs": 2, "return_token_ids": True}
    more = {"stream": True, "stream_options": {"include_usage": True}} if stream else {"prompt_logprobs": 1}
    answer = check(Api("hello é"), "POST", COMPLETIONS, json={**body, "echo": True, **more})
    assert b'"text_offset"' in answer.body


@pytest.mark.parametrize("stream", [False, True])
def test_a_message_with_a_call_is_as_declared(stream: bool) -> None:
    tool = {"name": "weather", "input_schema": {"type": "object"}}
    body = {"model": MODEL, "max_tokens": 500, "messages": MESSAGES, "tools": [tool], "stream": stream}
    assert b'"tool_use"' in check(full_api(f"Wait. {CALL}"), "POST", "/v1/messages", json=body).body


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text"])
def test_metrics_are_of_a_declared_media_type(accept: str) -> None:
    check(Api(), "GET", "/metrics", headers={"accept": accept})


def test_readiness_is_declared_either_way() -> None:
    api = Api()
    assert check(api, "GET", "/ready").status == 200
    api.dispatcher.facts = None
    assert check(api, "GET", "/ready").status == 503


def test_a_body_over_the_limit_is_declared_where_no_body_is_expected() -> None:
    api = Api(settings=ProxySettings(max_body_bytes=100))
    assert check(api, "GET", "/health", content=b"x" * 200).status == 413
    assert check(api, "POST", "/tokenize", json={"prompt": "x" * 200}).status == 413
