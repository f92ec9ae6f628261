"""What a model thinks before it answers: the splitter, and the split over the HTTP API."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from mesh.errors import StartupError
from mesh.params import Thinking
from mesh.settings import ProxySettings
from mesh.tokenizer import Tokenizer
from proxy.text.reasoning import FORMATS, MAX_BLANKS, Delivery, ReasoningFormat, ReasoningParser, reasoning_format
from tests.proxy.api_client import Api, finishes
from tests.proxy.fake_dispatcher import Script
from tests.proxy.http_server import Server
from tests.proxy.test_api_tools import CALL, WEATHER
from tests.proxy.tiny_tokenizer import IM_END, TEMPLATE, byte_level, byte_level_backend, token_of

THINK = FORMATS[0]
CASES = [
    ("<think>\nabc\n\nd\n</think>\n\nhello", False, "abc\n\nd", "hello"),
    ("  \n<think>a</think>b", False, "a", "b"),
    ("<think></think>b", False, "", "b"),
    ("<think>\n\n</think>\n\nb", False, "", "b"),
    ("<think>a</think> b", False, "a", " b"),
    ("<think>ä</think>ö</think>ü", False, "ä", "ö</think>ü"),
    ("<think>a<think>b</think>c", False, "a<think>b", "c"),
    ("<think>a < b </ c </thin k</think>d", False, "a < b </ c </thin k", "d"),
    ("<think>cut\n</thin", False, "cut\n</thin", ""),
    ("<think>cut\n\n", False, "cut", ""),
    ("<think>", False, "", ""),
    ("a\n</think>\nb\n", True, "a", "b\n"),
    ("</think>b", True, "", "b"),
    ("\n\nnever ends", True, "never ends", ""),
    ("", True, "", ""),
    ("", False, "", ""),
    ("no <think>a</think>", False, "", "no <think>a</think>"),
    ("<thi", False, "", "<thi"),
    ("<thin air", False, "", "<thin air"),
    ("\n\n", False, "", "\n\n"),
    ("\n" * (MAX_BLANKS + 1) + "<think>a", False, "", "\n" * (MAX_BLANKS + 1) + "<think>a"),
    ("<think>a" + "\n" * 100 + "b" + "\n" * 100 + "</think>c", False, "a" + "\n" * 100 + "b" + "\n" * 36, "c"),
]


def split(parser: ReasoningParser, pieces: list[str]) -> tuple[str, str]:
    both = [*map(parser.push, pieces), parser.flush()]
    return "".join(thought for thought, _ in both), "".join(text for _, text in both)


def cuts(text: str) -> list[list[str]]:
    rng = random.Random(text)
    cut = [[text], list(text)]
    for _ in range(4):
        places = sorted(rng.randint(0, len(text)) for _ in range(rng.randint(1, 5)))
        cut.append([text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)])
    return cut


@pytest.mark.parametrize(("text", "opened", "thought", "answer"), CASES)
def test_a_split_does_not_depend_on_the_pieces(text: str, opened: bool, thought: str, answer: str) -> None:
    for pieces in cuts(text):
        assert split(ReasoningParser(THINK, opened=opened), pieces) == (thought, answer)
        assert split(ReasoningParser(THINK, opened=opened, delivery=Delivery.WHOLE), pieces) == (thought, answer)
        assert split(ReasoningParser(THINK, opened=opened, delivery=Delivery.HIDDEN), pieces) == ("", answer)


def test_thinking_comes_as_it_is_written_or_whole() -> None:
    streamed = ReasoningParser(THINK)
    assert [streamed.push(t)[0] for t in ("<think>", "a", "b</", "think>", "c")] == ["", "a", "b", "", ""]
    whole = ReasoningParser(THINK, delivery=Delivery.WHOLE)
    assert [whole.push(t)[0] for t in ("<think>", "a", "b</", "think>", "c")] == ["", "", "", "ab", ""]


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
def test_every_format_is_found_by_its_template_and_its_names(format: ReasoningFormat) -> None:
    tokenizer = byte_level(TEMPLATE + f"{{# {format.close} #}}")
    for name in ("auto", format.name, *format.aliases):
        assert reasoning_format(name, tokenizer) is format
    assert reasoning_format("none", tokenizer) is None
    assert reasoning_format("auto", byte_level()) is None
    text = f"{format.open}thought{format.close}said"
    assert split(ReasoningParser(format), list(text)) == ("thought", "said")


def test_an_unknown_name_ends_the_start_and_lists_the_names() -> None:
    with pytest.raises(StartupError, match=r"nonsense is not known; give auto, none or one of think, .*mistral"):
        Api(settings=ProxySettings(reasoning_parser="nonsense"))


MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
PREFILLED = TEMPLATE.replace("assistant\n{% endif", "assistant\n{{ '<think>\n' }}{% endif")
CLOSED = TEMPLATE.replace(
    "assistant\n{% endif",
    "assistant\n{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{# <think> #}{% endif",
)


def thinker(template: str = TEMPLATE + "{# <think> <tool_call> #}", *, special: bool = False) -> Tokenizer:
    """The marks of thinking are one token each."""
    backend = byte_level_backend()
    if special:
        backend.add_special_tokens(list(MARKS))
    else:
        backend.add_tokens(list(MARKS))
    return Tokenizer(backend, eos_token_ids=(IM_END,), templates={"default": template}, vocab_size=320)


def api(text: str, tokenizer: Tokenizer | None = None, **more: Any) -> Api:
    tokenizer = tokenizer or thinker()
    tokens = [*tokenizer.encode(text, add_special_tokens=False), IM_END]
    return Api(Script(tokens), tokenizer=tokenizer, max_model_len=4000, **more)


@pytest.mark.parametrize("special", [False, True])
def test_thinking_and_answer_are_two_fields(special: bool) -> None:
    answer = api("<think>\nhello w\n</think>\n\nhello", thinker(special=special)).chat()
    message = answer["choices"][0]["message"]
    assert (message["content"], message["reasoning"], message["reasoning_content"]) == ("hello", "hello w", "hello w")
    # the marks, `hello`, ` w` and two line breaks
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 6}


def test_a_stream_has_both_names_and_concatenates_to_the_whole() -> None:
    stream = api("<think>\nhello w\n</think>\n\nhello").chat_stream(stream_options={"include_usage": True})
    deltas = [c["delta"] for event in stream for c in event["choices"]]
    for name in ("reasoning", "reasoning_content"):
        assert "".join(delta.get(name) or "" for delta in deltas) == "hello w"
    assert "".join(delta.get("content") or "" for delta in deltas) == "hello"
    assert finishes(stream) == [(0, "stop")]
    assert stream[-1]["usage"]["completion_tokens_details"] == {"reasoning_tokens": 6}


def test_a_prompt_may_have_begun_the_thinking() -> None:
    message = api("hello\n</think>\nw", thinker(PREFILLED)).chat()["choices"][0]["message"]
    assert (message["content"], message["reasoning"]) == ("w", "hello")


def test_an_answer_cut_while_it_thinks_has_no_content() -> None:
    choice = api("<think>hello w</think>hello").chat(max_tokens=3)["choices"][0]
    assert (choice["message"]["content"], choice["message"]["reasoning"]) == (None, "hello w")
    assert choice["finish_reason"] == "length"


def test_what_a_model_without_thinking_writes_is_text() -> None:
    answer = Api("<think>a</think>b").chat()
    assert answer["choices"][0]["message"]["content"] == "<think>a</think>b"
    assert "completion_tokens_details" not in answer["usage"]


def test_a_client_may_do_without_it_or_without_the_split() -> None:
    served = api("<think>hello</think>w")
    hidden = served.chat(include_reasoning=False)
    assert "reasoning" not in hidden["choices"][0]["message"]
    assert hidden["choices"][0]["message"]["content"] == "w"
    assert hidden["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}
    assert served.chat(separate_reasoning=False)["choices"][0]["message"]["content"] == "<think>hello</think>w"
    # what is not split is not counted either, rather than as nothing
    assert "completion_tokens_details" not in served.chat(separate_reasoning=False, thinking_token_budget=9)["usage"]
    stream = served.chat_stream(stream_reasoning=False)
    thoughts = [c["delta"]["reasoning"] for event in stream for c in event["choices"] if "reasoning" in c["delta"]]
    assert thoughts == ["hello"]


def test_calls_come_after_the_thinking_and_not_out_of_it() -> None:
    choice = api(f"<think>{CALL}</think>{CALL}").chat(tools=[WEATHER])["choices"][0]
    assert len(choice["message"]["tool_calls"]) == 1
    assert choice["message"]["reasoning"] == CALL
    assert choice["finish_reason"] == "tool_calls"


def test_a_grammar_begins_after_the_thinking() -> None:
    tokenizer = thinker()
    open_id, close_id = (token_of(tokenizer, mark) for mark in MARKS[:2])
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    served = api('<think>hello</think>{"a": 1}')
    message = served.chat(response_format=schema)["choices"][0]["message"]
    assert (json.loads(message["content"]), message["reasoning"]) == ({"a": 1}, "hello")
    assert served.sent.params.thinking == Thinking(close_id, open=open_id)
    served.chat(tools=[WEATHER], tool_choice="required")
    assert served.sent.params.thinking == Thinking(close_id, open=open_id)
    served.chat()
    assert served.sent.params.thinking is None
    prefilled = api("", thinker(PREFILLED))
    prefilled.chat(response_format=schema)
    assert prefilled.sent.params.thinking == Thinking(close_id)
    closed = api("", thinker(CLOSED))
    closed.chat(response_format=schema, chat_template_kwargs={"enable_thinking": False})
    assert closed.sent.params.thinking is None
    closed.chat(response_format=schema, reasoning_effort="none")
    assert closed.sent.params.thinking is None
    closed.chat(response_format=schema)
    assert closed.sent.params.thinking == Thinking(close_id, open=open_id)


def test_marks_of_several_tokens_leave_no_room_for_thinking_before_a_grammar() -> None:
    served = Api('{"a": 1}', tokenizer=byte_level(PREFILLED), max_model_len=4000)
    message = served.chat(response_format={"type": "json_object"})["choices"][0]["message"]
    assert json.loads(message["content"]) == {"a": 1}
    assert served.sent.params.thinking is None
    error = served.chat_error(thinking_token_budget=3)
    assert (error["code"], error["param"]) == ("unsupported_parameter", "thinking_token_budget")


def test_a_budget_reaches_the_workers() -> None:
    served = api("<think>hello</think>w")
    served.chat(thinking_token_budget=7)
    thinking = served.sent.params.thinking
    assert thinking is not None
    assert thinking.budget == 7
    error = Api("hello").chat_error(thinking_token_budget=7)
    assert (error["code"], error["param"]) == ("unsupported_parameter", "thinking_token_budget")
    assert served.chat_error(thinking_token_budget=-1)["param"] == "thinking_token_budget"
    assert Api("hello").complete_error(thinking_token_budget=7)["code"] == "unsupported_parameter"


def test_templates_read_earlier_thinking_under_either_name() -> None:
    both = TEMPLATE.replace("{{ m.content }}", "[{{ m.reasoning }}|{{ m.reasoning_content }}]{{ m.content }}")
    served = api("hello", thinker(both))
    for name in ("reasoning", "reasoning_content"):
        messages = [{"role": "assistant", "content": "b", name: "a"}, {"role": "user", "content": "c"}]
        assert served.http.post("/v1/chat/completions", json={"model": "tiny", "messages": messages}).status_code == 200
        assert "[a|a]b" in served.tokenizer.decode(served.sent.tokens)


def test_the_official_client_reads_it() -> None:
    served = api("<think>hello</think>w")
    with Server(served) as server, server.client() as client:
        answer = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "hi"}])
    message, usage = answer.choices[0].message, answer.usage
    assert message.model_extra is not None
    assert message.model_extra["reasoning_content"] == "hello"
    assert usage is not None
    assert usage.completion_tokens_details is not None
    assert usage.completion_tokens_details.reasoning_tokens == 3


def test_a_response_has_the_thinking_as_an_item_of_its_own() -> None:
    served = api("<think>hello</think>w")
    body = {"model": "tiny", "input": "hi", "thinking_token_budget": 7}
    answer = served.http.post("/v1/responses", json=body).json()
    thought, message = answer["output"]
    assert (thought["type"], thought["content"][0]["text"]) == ("reasoning", "hello")
    assert message["content"][0]["text"] == "w"
    assert answer["usage"]["output_tokens_details"]["reasoning_tokens"] == 3
    thinking = served.sent.params.thinking
    assert thinking is not None
    assert thinking.budget == 7
