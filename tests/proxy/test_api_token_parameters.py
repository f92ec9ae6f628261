"""Parameters that speak of tokens: which may be drawn, which are shown, how much of a prompt is kept."""

from __future__ import annotations

from typing import Any

import pytest

from mesh.settings import ProxySettings
from tests.proxy.api_client import Api, reply
from tests.proxy.fake_dispatcher import Script
from tests.proxy.tiny_tokenizer import BOS, IM_END, VOCAB_SIZE, byte_level, token_of

TOKENIZER = byte_level()
HELLO = token_of(TOKENIZER, "hello")


def ids(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False)


def test_token_ids_of_prompt_and_answer() -> None:
    api = Api("hello w")
    chat = api.chat(return_token_ids=True, n=2)
    assert chat["prompt_token_ids"] == list(api.sent.tokens)
    assert [c["token_ids"] for c in chat["choices"]] == [[*ids("hello w"), IM_END]] * 2
    done = api.complete(["a", "hello"], return_token_ids=True)
    assert [c["prompt_token_ids"] for c in done["choices"]] == [[BOS, *ids("a")], [BOS, HELLO]]
    assert "token_ids" not in api.chat()["choices"][0]


def test_streamed_token_ids_add_up_even_where_tokens_have_no_text() -> None:
    api = Api("wé w")
    events = api.chat_stream(return_token_ids=True)
    assert events[0]["prompt_token_ids"] == list(api.sent.tokens)
    assert all("prompt_token_ids" not in event for event in events[1:])
    assert [t for e in events for t in e["choices"][0].get("token_ids", [])] == [*ids("wé w"), IM_END]
    choices = [event["choices"][0] for event in api.complete_stream(return_token_ids=True)]
    assert choices[0]["prompt_token_ids"] == list(api.sent.tokens)
    assert all("prompt_token_ids" not in choice for choice in choices[1:])
    assert [t for c in choices for t in c.get("token_ids", [])] == [*ids("wé w"), IM_END]


def test_token_ids_end_where_a_stop_string_ended_the_answer() -> None:
    api = Api("abc")
    assert api.complete(stop="b", return_token_ids=True)["choices"][0]["token_ids"] == ids("ab")


def test_tokens_as_ids() -> None:
    name = f"token_id:{HELLO}"
    api = Api("hello")
    entry = api.chat(logprobs=True, top_logprobs=1, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    shown = entry["content"][0]
    assert (shown["token"], shown["top_logprobs"][0]["token"]) == (name, name)
    assert bytes(shown["bytes"]) == b"hello"
    lists = api.complete("w", logprobs=1, echo=True, return_tokens_as_token_ids=True)["choices"][0]["logprobs"]
    assert lists["tokens"] == [f"token_id:{t}" for t in (BOS, *ids("w"), HELLO, IM_END)]
    assert name in lists["top_logprobs"][2]


def test_prompt_logprobs_have_a_map_for_every_token_but_the_first() -> None:
    api = Api("a")
    in_chat = api.chat("hello", prompt_logprobs=2)["prompt_logprobs"]
    assert (len(in_chat), in_chat[0]) == (len(api.sent.tokens), None)
    found = api.complete("hello", prompt_logprobs=2)["choices"][0]["prompt_logprobs"]
    assert (len(found), found[0]) == (2, None)
    assert found[1] == {
        str(HELLO): {"logprob": -0.25, "rank": 1, "decoded_token": "hello"},
        str(HELLO + 1): {"logprob": -1.25, "rank": 2, "decoded_token": TOKENIZER.token_text(HELLO + 1)},
    }


def test_prompt_logprobs_beside_an_echo_with_fewer_alternatives() -> None:
    choice = Api("a").complete("hello", echo=True, logprobs=1, prompt_logprobs=3)["choices"][0]
    assert len(choice["logprobs"]["top_logprobs"][1]) == 1
    assert len(choice["prompt_logprobs"][1]) == 3


def test_missing_prompt_logprobs_are_an_error_not_an_answer() -> None:
    api = Api(reply("a", forget_prompt=True))
    api.chat_error(500, prompt_logprobs=0)
    api.complete_error(500, prompt_logprobs=0)


def test_more_prompt_logprobs_than_one_answer_should_hold_are_refused() -> None:
    fields: dict[str, Any] = {"prompt": [5] * 200, "prompt_logprobs": 20}
    assert Api().complete_error(n=128, **fields)["param"] == "prompt_logprobs"
    assert Api().complete(**fields)["choices"][0]["prompt_logprobs"]


def test_allowed_token_ids_and_bad_words_reach_the_sampler_as_tokens() -> None:
    api = Api()
    api.complete(allowed_token_ids=[9, 5, 9], bad_words=["hello", " w"])
    assert api.sent.params.allowed_token_ids == (9, 5)
    spaced = tuple(ids(" hello"))
    assert api.sent.params.bad_words == ((HELLO,), spaced, tuple(ids("w")), tuple(ids(" w")))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [VOCAB_SIZE]}, "allowed_token_ids"),
        ({"allowed_token_ids": [1] * 5000}, "allowed_token_ids"),
        ({"allowed_token_ids": [HELLO], "bad_words": ["hello"]}, "allowed_token_ids"),
        ({"allowed_token_ids": [IM_END], "min_tokens": 1}, "allowed_token_ids"),
        ({"bad_words": "hello"}, "bad_words"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": ["x"] * 257}, "bad_words"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 257}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": 1, "truncation_side": "middle"}, "truncation_side"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    assert Api().chat_error(**body)["param"] == param
    assert Api().complete_error(**body)["param"] == param


def test_a_priority_needs_a_server_that_has_any() -> None:
    assert Api().chat_error(priority=1)["param"] == Api().complete_error(priority=-1)["param"] == "priority"
    Api().chat(priority=0)
    api = Api(settings=ProxySettings(scheduling_policy="priority"))
    api.chat(priority=-3)
    assert api.sent.params.priority == -3


def test_a_prompt_is_truncated_on_the_side_asked_for() -> None:
    api = Api("b")
    api.complete([7, 8, 9], truncate_prompt_tokens=2)
    assert api.sent.tokens == (8, 9)
    api.complete([7, 8, 9], truncate_prompt_tokens=2, truncation_side="right")
    assert api.sent.tokens == (7, 8)
    answer = api.chat("hello", truncate_prompt_tokens=1)
    assert (len(api.sent.tokens), answer["usage"]["prompt_tokens"]) == (1, 1)


def test_the_echo_of_a_truncated_prompt_is_what_is_left() -> None:
    choice = Api("b").complete("awx", truncate_prompt_tokens=2, echo=True, logprobs=0)["choices"][0]
    assert choice["text"] == "wxb"
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]


@pytest.mark.parametrize(("asked", "kept"), [({}, 31), ({"max_tokens": 10}, 22), ({"max_tokens": 99}, 1)])
def test_minus_one_keeps_what_leaves_room_for_the_answer(asked: dict[str, int], kept: int) -> None:
    api = Api(Script([5] * 40), max_model_len=32)
    api.complete("x" * 5000, truncate_prompt_tokens=-1, **asked)
    assert len(api.sent.tokens) == kept
