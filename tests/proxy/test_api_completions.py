"""POST /v1/completions: prompt forms, echo, logprobs."""

from __future__ import annotations

from typing import Any

import pytest

from proxy.generation import GenerateRequest
from tests.proxy.api_client import Api, finishes, reply
from tests.proxy.fake_dispatcher import Script
from tests.proxy.tiny_tokenizer import BOS, byte_level


def texts(stream: list[Any], n: int = 1) -> list[str]:
    out = [""] * n
    for event in stream:
        for choice in event["choices"]:
            out[choice["index"]] += choice["text"]
    return out


def by_prompt(request: GenerateRequest) -> Script:
    """Generates the prompt's own text in capitals, so that mixed-up prompts are seen."""
    return reply(byte_level().decode(request.tokens).upper())


def test_an_answer_has_every_field_of_openais() -> None:
    answer = Api("hello").complete()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": "hello", "logprobs": None, "finish_reason": "stop"}]
    assert answer["usage"]["total_tokens"] == 3 + 2


def test_a_text_prompt_gets_special_tokens() -> None:
    api = Api()
    api.complete("hi")
    assert api.sent.tokens == (BOS, *api.tokenizer.encode("hi", add_special_tokens=False))
    api.complete("hi", add_special_tokens=False)
    assert BOS not in api.sent.tokens


def test_token_ids_are_taken_as_they_are() -> None:
    api = Api()
    api.complete([5, 6, 7])
    assert api.sent.tokens == (5, 6, 7)


def test_several_prompts_are_several_generations() -> None:
    api = Api(by_prompt)
    answer = api.complete(["ab", "cd"], n=2)
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "AB"), (1, "AB"), (2, "CD"), (3, "CD")]
    assert [g.request.n for g in api.dispatcher.generations] == [2, 2]
    assert len({g.request.request_id for g in api.dispatcher.generations}) == 2
    assert answer["usage"]["prompt_tokens"] == 6
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 6


def test_several_prompts_of_token_ids() -> None:
    api = Api(by_prompt)
    ids = [api.tokenizer.encode(t, add_special_tokens=False) for t in ("ab", "cd")]
    assert [c["text"] for c in api.complete(ids)["choices"]] == ["AB", "CD"]


def test_several_prompts_streamed() -> None:
    stream = Api(by_prompt).complete_stream(["ab", "cd", "ef"], n=2, stream_options={"include_usage": True})
    assert texts(stream, 6) == ["AB", "AB", "CD", "CD", "EF", "EF"]
    assert sorted(finishes(stream)) == [(i, "stop") for i in range(6)]
    assert stream[-1]["usage"]["completion_tokens"] == 18


def test_a_failing_prompt_aborts_the_others() -> None:
    def script(request: GenerateRequest) -> Script:
        return reply("x") if request.request_id.endswith("-0") else reply("x", fail_at=0)

    api = Api(script)
    api.complete_error(500, prompt=["a", "b"])
    assert [g.aborted for g in api.dispatcher.generations] == [["failed"], ["failed"]]


def test_max_tokens_are_the_room_left_unless_given() -> None:
    api = Api(max_model_len=50)
    api.complete("hi")
    assert api.sent.params.max_tokens == 47
    api.complete("hi", max_tokens=1000)
    assert api.sent.params.max_tokens == 47
    api.complete("hi", max_tokens=4)
    assert api.sent.params.max_tokens == 4


def test_budgets_are_each_prompts_own() -> None:
    api = Api(max_model_len=20)
    api.complete([[5] * 4, [5] * 10], max_tokens=15, min_tokens=12)
    assert [g.request.params.max_tokens for g in api.dispatcher.generations] == [15, 10]
    assert [g.request.params.min_tokens for g in api.dispatcher.generations] == [12, 10]


def test_echo_puts_the_prompt_before_the_text() -> None:
    assert Api("!").complete("hello é", echo=True)["choices"][0]["text"] == "hello é!"


def test_echo_of_token_ids_is_their_text() -> None:
    api = Api("!")
    ids = api.tokenizer.encode("hello é")
    assert api.complete(ids, echo=True)["choices"][0]["text"] == "hello é!"


def test_echo_streams_the_prompt_first() -> None:
    stream = Api("xyz").complete_stream("hello", echo=True, n=2)
    assert texts(stream, 2) == ["helloxyz"] * 2


def test_logprobs_are_four_lists() -> None:
    logprobs = Api("é a").complete(logprobs=2)["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["é", " ", "a", "<|im_end|>"]
    assert logprobs["token_logprobs"] == [-0.25] * 4
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert logprobs["top_logprobs"][2] == {"a": -0.25, "b": -1.25}


def test_logprobs_0_show_the_token_drawn() -> None:
    logprobs = Api("a").complete(logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["top_logprobs"][0] == {"a": -0.25}


def test_a_token_within_a_character_is_named_by_its_bytes() -> None:
    logprobs = Api("😀").complete(logprobs=0)["choices"][0]["logprobs"]
    assert logprobs["tokens"][:2] == ["bytes:\\xf0", "bytes:\\x9f"]
    assert logprobs["text_offset"] == [0, 0, 0, 0, 1]


def test_echo_with_logprobs_covers_the_prompt() -> None:
    api = Api("xy")
    choice = api.complete("hello é", echo=True, logprobs=1)["choices"][0]
    logprobs = choice["logprobs"]
    assert api.sent.params.prompt_logprobs == 1
    assert logprobs["tokens"] == ["<s>", "hello", " ", "é", "x", "y", "<|im_end|>"]
    assert logprobs["token_logprobs"] == [None, *[-0.25] * 6]
    assert logprobs["top_logprobs"][:2] == [None, {"hello": -0.25}]
    assert logprobs["text_offset"] == [0, 0, 5, 6, 7, 8, 9]
    assert choice["text"] == "hello éxy"


def test_echo_with_logprobs_streamed_equals_the_whole() -> None:
    whole = Api("xyé").complete("hello", echo=True, logprobs=1)["choices"][0]
    stream = Api("xyé").complete_stream("hello", echo=True, logprobs=1)
    lists: dict[str, list[Any]] = {name: [] for name in whole["logprobs"]}
    for event in stream:
        for choice in event["choices"]:
            for name, values in (choice["logprobs"] or {}).items():
                lists[name].extend(values)
    assert lists == whole["logprobs"]
    assert texts(stream) == [whole["text"]]


def test_scoring_a_prompt_generates_nothing() -> None:
    api = Api("xy")
    answer = api.complete("hello", echo=True, logprobs=1, max_tokens=0)
    choice = answer["choices"][0]
    assert api.sent.params.max_tokens == 1
    assert (choice["text"], choice["finish_reason"]) == ("hello", "length")
    assert choice["logprobs"]["tokens"] == ["<s>", "hello"]
    assert answer["usage"]["completion_tokens"] == 0


def test_scoring_a_prompt_streamed() -> None:
    stream = Api("xy").complete_stream("hello", echo=True, logprobs=0, max_tokens=0)
    assert texts(stream) == ["hello"]
    assert finishes(stream) == [(0, "length")]


def test_missing_prompt_logprobs_are_a_fault_and_no_wrong_numbers() -> None:
    Api(reply("x", forget_prompt=True)).complete_error(500, echo=True, logprobs=1)


@pytest.mark.parametrize("best_of", [1, 2])
def test_best_of_n_of_n_is_n(best_of: int) -> None:
    assert len(Api().complete(n=2, best_of=best_of)["choices"]) == 2


def test_a_stop_string_is_not_looked_for_in_the_echo() -> None:
    choice = Api("abc stop").complete("stop it", echo=True, stop="stop")["choices"][0]
    assert choice["text"] == "stop itabc "
