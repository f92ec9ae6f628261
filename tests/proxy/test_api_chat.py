"""POST /v1/chat/completions: what reaches the workers and what the client gets."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.generation import GenerateRequest
from tests.proxy.api_client import CHAT, Api, chat_texts, finishes, reply
from tests.proxy.fake_dispatcher import Script
from tests.proxy.tiny_tokenizer import EOS, IM_END, byte_level

HI = [{"role": "user", "content": "hi"}]


def prompt_text(api: Api) -> str:
    return api.tokenizer.decode(api.sent.tokens, skip_special_tokens=False)


def test_an_answer_has_every_field_of_openais() -> None:
    api = Api("hello é")
    answer = api.chat()
    assert answer["object"] == "chat.completion"
    assert answer["id"].startswith("chatcmpl-")
    assert answer["model"] == "tiny"
    assert isinstance(answer["created"], int)
    message = {"role": "assistant", "content": "hello é", "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]


def test_usage_counts_every_token_and_what_was_cached() -> None:
    api = Api("abc")
    assert api.chat()["usage"] == {
        "prompt_tokens": len(api.sent.tokens),
        "completion_tokens": 4,
        "total_tokens": len(api.sent.tokens) + 4,
        "prompt_tokens_details": {"cached_tokens": 3},
    }


def test_the_prompt_is_the_rendered_template() -> None:
    api = Api()
    api.chat("hello")
    assert prompt_text(api) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"


def test_text_parts_become_lines() -> None:
    api = Api()
    api.chat([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
    assert "user\na\nb<" in prompt_text(api)


def test_a_long_prompt_is_encoded_beside_the_event_loop_alike() -> None:
    api = Api(max_model_len=20_000)
    api.chat("hello world " * 1000)
    assert len(api.sent.tokens) == len(api.tokenizer.apply_chat_template([{**HI[0], "content": "hello world " * 1000}]))


def test_a_developer_is_a_system_to_a_template_that_knows_no_developer() -> None:
    api = Api()
    api.http.post(CHAT, json={"model": "tiny", "messages": [{"role": "developer", "content": "x"}, *HI]})
    assert prompt_text(api).startswith("<|im_start|>system\nx")


def test_a_developer_stays_one_where_the_template_knows_it() -> None:
    api = Api(tokenizer=byte_level("{% if messages[0].role == 'developer' %}dev{% endif %}x"))
    api.http.post(CHAT, json={"model": "tiny", "messages": [{"role": "developer", "content": "x"}]})
    assert prompt_text(api) == "devx"


def test_template_variables_reach_the_template() -> None:
    api = Api(tokenizer=byte_level("{{ enable_thinking }} {{ reasoning_effort }}"))
    api.chat(chat_template_kwargs={"enable_thinking": False}, reasoning_effort="low")
    assert prompt_text(api) == "False low"


def test_tools_with_tool_choice_none_are_shown_to_the_model() -> None:
    api = Api(tokenizer=byte_level("{{ tools[0].function.name }}"))
    tool = {"type": "function", "function": {"name": "look"}}
    api.chat(tools=[tool], tool_choice="none")
    assert prompt_text(api) == "look"


def test_earlier_tool_calls_reach_the_template_as_objects() -> None:
    api = Api(tokenizer=byte_level("{{ messages[1].tool_calls[0].function.arguments.x }}{{ messages[2].content }}"))
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 7}'}}
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "ok"},
    ]
    assert api.http.post(CHAT, json={"model": "tiny", "messages": messages}).status_code == 200
    assert prompt_text(api) == "7ok"


def test_the_final_message_can_be_continued() -> None:
    api = Api()
    messages = [*HI, {"role": "assistant", "content": "well"}]
    body = {"model": "tiny", "messages": messages, "continue_final_message": True}
    assert api.http.post(CHAT, json=body).status_code == 200
    assert prompt_text(api).endswith("assistant\nwell")


def test_no_generation_prompt() -> None:
    api = Api()
    api.chat(add_generation_prompt=False)
    assert prompt_text(api).endswith("<|im_end|>\n")


def test_defaults_of_sampling() -> None:
    api = Api(max_model_len=100)
    api.chat()
    params = api.sent.params
    assert params.max_tokens == 100 - len(api.sent.tokens)
    assert (params.temperature, params.top_k, params.top_p, params.min_p) == (1.0, 0, 1.0, 0.0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (params.logit_bias, params.logprobs, params.prompt_logprobs, params.min_tokens) == ((), None, None, 0)
    assert params.stop_token_ids == (IM_END, EOS)
    assert api.sent.n == 1
    assert api.sent.deadline_s == 600.0


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"temperature": 0}, "temperature", 0.0),
        ({"temperature": 1e-9}, "temperature", 0.0),
        ({"temperature": 2}, "temperature", 2.0),
        ({"top_p": 0.5}, "top_p", 0.5),
        ({"top_k": 7}, "top_k", 7),
        ({"top_k": -1}, "top_k", 0),
        ({"min_p": 0.1}, "min_p", 0.1),
        ({"repetition_penalty": 1.5}, "repetition_penalty", 1.5),
        ({"presence_penalty": -2}, "presence_penalty", -2),
        ({"frequency_penalty": 1}, "frequency_penalty", 1),
        ({"logit_bias": {"9": -100, "5": 2}}, "logit_bias", ((5, 2.0), (9, -100.0))),
        ({"seed": 7}, "seed", 7),
        ({"seed": -1}, "seed", 2**64 - 1),
        ({"max_tokens": 5}, "max_tokens", 5),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens", 6),
        ({"max_tokens": 10**9}, "max_tokens", 256 - 21),
        ({"min_tokens": 3}, "min_tokens", 3),
        ({"ignore_eos": True}, "stop_token_ids", ()),
        ({"ignore_eos": True, "stop_token_ids": [9]}, "stop_token_ids", (9,)),
        ({"stop_token_ids": [9]}, "stop_token_ids", (9, IM_END, EOS)),
        ({"logprobs": True}, "logprobs", 0),
        ({"logprobs": True, "top_logprobs": 20}, "logprobs", 20),
    ],
)
def test_a_field_reaches_the_workers(fields: dict[str, Any], name: str, value: Any) -> None:
    api = Api()
    api.chat(**fields)
    assert getattr(api.sent.params, name) == value


def test_seeds_differ_when_none_is_given() -> None:
    api = Api()
    api.chat()
    first = api.sent.params.seed
    api.chat()
    assert 0 <= first < 2**64
    assert first != api.sent.params.seed


def test_the_cache_salt_reaches_the_dispatcher() -> None:
    api = Api()
    api.chat(cache_salt="tenant-1")
    assert api.sent.cache_salt == "tenant-1"


def test_request_ids_are_the_proxys_own() -> None:
    api = Api()
    answer = api.http.post(CHAT, json={"model": "tiny", "messages": HI}, headers={"x-request-id": "mine"})
    assert answer.headers["x-request-id"] == "mine"
    assert api.sent.request_id == answer.json()["id"]


def test_a_bodys_request_id_is_the_label_unless_a_header_is() -> None:
    api = Api()
    body = {"model": "tiny", "messages": HI, "request_id": "mine"}
    assert api.http.post(CHAT, json=body).headers["x-request-id"] == "mine"
    assert api.http.post(CHAT, json=body, headers={"x-request-id": "yours"}).headers["x-request-id"] == "yours"
    for strange in ("a b", 7, None, "x" * 200):
        label = api.http.post(CHAT, json={**body, "request_id": strange}).headers["x-request-id"]
        assert label.startswith("req-")


@pytest.mark.parametrize("given", ["a b", "é", "x" * 200, ""])
def test_a_strange_request_id_is_replaced(given: str) -> None:
    api = Api()
    headers = {b"x-request-id": given.encode()}
    answer = api.http.post(CHAT, json={"model": "tiny", "messages": HI}, headers=headers)
    assert answer.headers["x-request-id"].startswith("req-")


def test_the_route_is_in_the_headers() -> None:
    answer = Api().http.post(CHAT, json={"model": "tiny", "messages": HI})
    names = ("x-kvmesh-prefill", "x-kvmesh-decode", "x-kvmesh-attempts")
    assert [answer.headers[name] for name in names] == ["prefill-0", "decode-0", "1"]


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "s"},
        {"tools": [], "response_format": {"type": "text"}, "modalities": ["text"], "functions": []},
        {"structured_outputs": None, "suffix": None, "audio": None, "logit_bias": None, "stop": None, "n": None},
        {"parallel_tool_calls": True, "prediction": None, "verbosity": "low", "prompt_cache_key": "k"},
        {"tool_choice": "auto"},
        {"stop": []},
    ],
)
def test_fields_that_change_nothing_are_accepted(fields: dict[str, Any]) -> None:
    assert Api().chat(**fields)["choices"][0]["message"]["content"] == "hello world"


def test_n_choices() -> None:
    api = Api("hello")
    answer = api.chat(n=3)
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert {c["message"]["content"] for c in answer["choices"]} == {"hello"}
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["prompt_tokens"] == len(api.sent.tokens)


def test_length_is_the_finish_when_max_tokens_end_it() -> None:
    choice = Api("abcdef").chat(max_tokens=3)["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("abc", "length")


@pytest.mark.parametrize("per_chunk", [1, 2, 5])
def test_a_stop_string_ends_the_choice_and_the_work(per_chunk: int) -> None:
    api = Api(reply("abc def ghi", per_chunk=per_chunk))
    answer = api.chat(stop=["f g", "zz"])
    assert answer["choices"][0]["message"]["content"] == "abc de"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 9
    assert api.dispatcher.generations[0].stopped == [0]


def test_a_stop_string_can_be_included() -> None:
    answer = Api("abc def").chat(stop="c d", include_stop_str_in_output=True)
    assert answer["choices"][0]["message"]["content"] == "abc d"


def test_special_tokens_can_be_shown() -> None:
    api = Api(Script([EOS, *byte_level().encode("a", add_special_tokens=False)], finish="length"))
    assert api.chat(skip_special_tokens=False)["choices"][0]["message"]["content"] == "</s>a"


def test_logprobs_have_one_entry_per_token() -> None:
    choice = Api("é a").chat(logprobs=True, top_logprobs=2)["choices"][0]
    entries = choice["logprobs"]["content"]
    assert [e["token"] for e in entries] == ["é", " ", "a", "<|im_end|>"]
    assert entries[0]["bytes"] == list("é".encode())
    assert entries[0]["logprob"] == -0.25
    assert [t["logprob"] for t in entries[0]["top_logprobs"]] == [-0.25, -1.25]


def test_logprobs_without_top_logprobs() -> None:
    entry = Api("a").chat(logprobs=True)["choices"][0]["logprobs"]["content"][0]
    assert entry["top_logprobs"] == []


def test_logprobs_stop_where_a_stop_string_stops() -> None:
    choice = Api(reply("abcdef", per_chunk=6)).chat(logprobs=True, stop="c")["choices"][0]
    assert [e["token"] for e in choice["logprobs"]["content"]] == ["a", "b", "c"]


def test_a_stream_gives_role_text_finish_and_usage() -> None:
    stream = Api("héllo").chat_stream(stream_options={"include_usage": True})
    assert stream[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chat_texts(stream) == ["héllo"]
    assert finishes(stream) == [(0, "stop")]
    assert all(event["object"] == "chat.completion.chunk" for event in stream)
    assert len({event["id"] for event in stream}) == 1
    assert [event["usage"] for event in stream[:-1]] == [None] * (len(stream) - 1)
    assert stream[-1]["choices"] == []
    assert stream[-1]["usage"]["completion_tokens"] == 5
    assert stream[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 3}


def test_a_stream_without_options_says_nothing_of_usage() -> None:
    assert not any("usage" in event or "kvmesh" in event for event in Api().chat_stream())


def test_continuous_usage_grows_with_every_frame() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    stream = Api("abc").chat_stream(stream_options=options)
    counts = [event["usage"]["completion_tokens"] for event in stream]
    assert counts == sorted(counts)
    assert counts[-1] == 4
    assert all(event["usage"]["total_tokens"] > 0 for event in stream)


@pytest.mark.parametrize("together", [True, False])
def test_a_stream_of_n_choices(together: bool) -> None:
    stream = Api(reply("abc", together=together)).chat_stream(n=3)
    assert chat_texts(stream, 3) == ["abc"] * 3
    assert sorted(finishes(stream)) == [(0, "stop"), (1, "stop"), (2, "stop")]
    roles = [c["index"] for e in stream for c in e["choices"] if c["delta"].get("role") == "assistant"]
    assert sorted(roles) == [0, 1, 2]


def test_a_streamed_character_comes_whole() -> None:
    stream = Api("a😀b").chat_stream()
    deltas = [c["delta"].get("content") for e in stream for c in e["choices"]]
    assert [d for d in deltas if d] == ["a", "😀", "b"]


def test_streamed_logprobs_are_complete() -> None:
    stream = Api("a😀").chat_stream(logprobs=True, top_logprobs=1)
    entries = [
        entry
        for event in stream
        for choice in event["choices"]
        for entry in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert bytes(b for e in entries for b in e["bytes"]).decode() == "a😀<|im_end|>"


def test_a_stop_string_is_never_streamed() -> None:
    stream = Api("one two three").chat_stream(stop="two")
    assert chat_texts(stream) == ["one "]
    assert finishes(stream) == [(0, "stop")]


def test_the_route_is_streamed_when_asked_for() -> None:
    body = {"messages": HI, "stream": True, "stream_options": {"include_usage": True}}
    last = Api().stream(CHAT, body, **{"x-kvmesh-route": "1"})[-1]
    assert last["kvmesh"] == {"prefill": "prefill-0", "decode": "decode-0", "attempts": 1, "cached_tokens": 3}


def test_n_choices_may_end_at_different_times() -> None:
    def script(request: GenerateRequest) -> Script:
        return reply("abcdef", together=True)

    api = Api(script)
    stream = api.chat_stream(n=2, stop="d")
    assert chat_texts(stream, 2) == ["abc", "abc"]
    assert api.dispatcher.generations[0].stopped == [0, 1]
    assert api.dispatcher.generations[0].aborted == []
