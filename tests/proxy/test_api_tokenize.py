"""Tokens without an answer: /tokenize, /detokenize and the render endpoints."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.settings import ProxySettings
from tests.proxy.api_client import CHAT, COMPLETIONS, MODEL, Api
from tests.proxy.tiny_tokenizer import BOS, byte_level, token_of

MESSAGES = [{"role": "user", "content": "hello"}]


def post(api: Api, path: str, **body: Any) -> Any:
    response = api.http.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_a_text_there_and_back(prefix: str) -> None:
    api = Api()
    found = post(api, f"{prefix}/tokenize", model=MODEL, prompt="hello wé<|im_end|>")
    assert found["count"] == len(found["tokens"])
    assert (found["tokens"][0], found["max_model_len"], found["token_strs"]) == (BOS, 256, None)
    back = post(api, f"{prefix}/detokenize", model=MODEL, tokens=found["tokens"])
    assert back == {"prompt": "<s>hello wé<|im_end|>"}


def test_the_tokens_of_a_prompt_are_those_of_its_completion() -> None:
    api = Api()
    api.complete("hello")
    assert post(api, "/tokenize", prompt="hello")["tokens"] == list(api.sent.tokens)
    plain = post(api, "/tokenize", prompt="hello", add_special_tokens=False, return_token_strs=True)
    assert (plain["tokens"], plain["token_strs"]) == ([token_of(byte_level(), "hello")], ["hello"])


def test_the_tokens_of_messages_are_those_of_their_completion() -> None:
    api = Api()
    api.chat("hello")
    assert post(api, "/tokenize", messages=MESSAGES)["tokens"] == list(api.sent.tokens)
    shorter = post(api, "/tokenize", messages=MESSAGES, add_generation_prompt=False)["tokens"]
    assert shorter == list(api.sent.tokens[: len(shorter)])
    assert len(shorter) < len(api.sent.tokens)


def test_tools_and_template_variables_reach_the_template() -> None:
    api = Api(tokenizer=byte_level("{{ tools[0].name }}{{ mood }}"))
    found = post(api, "/tokenize", messages=MESSAGES, tools=[{"name": "hi"}], chat_template_kwargs={"mood": "low"})
    assert post(api, "/detokenize", tokens=found["tokens"])["prompt"] == "hilow"


def test_a_text_longer_than_the_context_is_counted() -> None:
    api = Api(max_model_len=8)
    assert post(api, "/tokenize", prompt="x" * 5000, add_special_tokens=False)["count"] == 5000
    assert post(api, "/tokenize", messages=[{"role": "user", "content": "x" * 5000}])["count"] > 5000


def test_nothing_is_no_token() -> None:
    api = Api()
    assert post(api, "/tokenize", prompt="", add_special_tokens=False)["tokens"] == []
    assert post(api, "/detokenize", tokens=[]) == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": "1"}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens.0"),
        ("/detokenize", {"tokens": [320]}, "tokens"),
    ],
)
def test_what_is_wrong_is_named(path: str, body: dict[str, Any], param: str) -> None:
    assert Api().error(path, body)["param"] == param


def test_an_unknown_model_and_a_large_body_are_refused() -> None:
    api = Api(settings=ProxySettings(max_body_bytes=200))
    assert api.error("/detokenize", {"model": "other", "tokens": []}, 404)["code"] == "model_not_found"
    assert api.error("/tokenize", {"prompt": "x" * 300}, 413)["code"] == "request_too_large"


def test_rendering_gives_the_prompt_and_generates_nothing() -> None:
    api = Api()
    chat = post(api, f"{CHAT}/render", model=MODEL, messages=MESSAGES)
    texts = post(api, f"{COMPLETIONS}/render", model=MODEL, prompt=["hello", "w"])
    assert not api.dispatcher.generations
    api.chat("hello")
    assert (chat["model"], chat["token_ids"]) == (MODEL, list(api.sent.tokens))
    assert chat["request_id"].startswith("chatcmpl-")
    api.complete("w")
    assert [len(t["token_ids"]) for t in texts] == [2, 2]
    assert texts[1]["token_ids"] == list(api.sent.tokens)


def test_rendering_refuses_what_generating_refuses() -> None:
    api = Api(max_model_len=16)
    long = {"messages": [{"role": "user", "content": "x" * 50}]}
    assert api.error(f"{CHAT}/render", long)["code"] == "context_length_exceeded"
    assert api.error(f"{COMPLETIONS}/render", {"prompt": "x", "n": 0})["param"] == "n"


def test_the_load_is_the_number_of_requests_inside() -> None:
    assert Api().http.get("/load").json() == {"server_load": 0}


def test_the_description_has_them_all() -> None:
    paths = Api().http.get("/openapi.json").json()["paths"]
    for path in ("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize", f"{CHAT}/render"):
        assert "requestBody" in paths[path]["post"]
    assert "get" in paths["/load"]
