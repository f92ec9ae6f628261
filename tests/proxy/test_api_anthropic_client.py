"""Anthropic's official client against a real server on a loopback port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from typing import Any

import anthropic
import pydantic
import pytest

from mesh.errors import RequestError
from proxy.generation import GenerateRequest
from proxy.text.choice import ChoiceText, Piece
from tests.proxy.api_client import MODEL, Api, reply
from tests.proxy.fake_dispatcher import Script
from tests.proxy.http_server import Server
from tests.proxy.test_api_tools import CALL
from tests.proxy.test_api_tools import api as tool_api

HI: list[anthropic.types.MessageParam] = [{"role": "user", "content": "hi"}]
BUSY = RequestError(503, "Busy.", code="overloaded", retry_after=1)
WEATHER: anthropic.types.ToolParam = {
    "name": "weather",
    "description": "Of a city.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


def connected(server: Server, retries: int = 0) -> anthropic.Anthropic:
    return anthropic.Anthropic(
        base_url=f"http://127.0.0.1:{server.port}", api_key="none", max_retries=retries, timeout=10
    )


@pytest.fixture
def api() -> Api:
    return Api("hello é😀")


@pytest.fixture
def client(api: Api) -> Iterator[anthropic.Anthropic]:
    with Server(api) as server, connected(server) as client:
        yield client


def text_of(message: Any) -> str:
    assert [block.type for block in message.content] == ["text"]
    text: str = message.content[0].text
    return text


def test_create(client: anthropic.Anthropic, api: Api) -> None:
    message = client.messages.create(model=MODEL, max_tokens=50, messages=HI, system="S", stop_sequences=["😀"])
    assert text_of(message) == "hello é"
    assert (message.stop_reason, message.stop_sequence, message.role) == ("stop_sequence", "😀", "assistant")
    assert message._request_id is not None
    usage = message.usage
    assert usage.input_tokens + (usage.cache_read_input_tokens or 0) == len(api.sent.tokens)
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (3, 0)


def test_the_stream_helper_assembles_the_same_message(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(model=MODEL, max_tokens=50, messages=HI)
    with client.messages.stream(model=MODEL, max_tokens=50, messages=HI) as stream:
        assert "".join(stream.text_stream) == "hello é😀"
        final = stream.get_final_message()
    same = {"content", "stop_reason", "stop_sequence", "usage", "model", "role", "type"}
    assert final.model_dump(include=same) == whole.model_dump(include=same)


def test_a_plain_stream_of_events(client: anthropic.Anthropic) -> None:
    with client.messages.create(model=MODEL, max_tokens=50, messages=HI, stream=True) as stream:
        found = list(stream)
    assert (found[0].type, found[-2].type, found[-1].type) == ("message_start", "message_delta", "message_stop")
    assert all(isinstance(event, pydantic.BaseModel) for event in found)


def test_the_async_client() -> None:
    async def ask(port: int) -> tuple[str, str]:
        async with anthropic.AsyncAnthropic(
            base_url=f"http://127.0.0.1:{port}", api_key="none", max_retries=0, timeout=10
        ) as client:
            whole = await client.messages.create(model=MODEL, max_tokens=50, messages=HI)
            async with client.messages.stream(model=MODEL, max_tokens=50, messages=HI) as stream:
                texts = [text async for text in stream.text_stream]
            return text_of(whole), "".join(texts)

    with Server(Api("hello é😀")) as server:
        assert asyncio.run(ask(server.port)) == ("hello é😀", "hello é😀")


def test_a_tool_loop() -> None:
    def script(request: GenerateRequest) -> Script:
        return reply("It rains.") if b"tool\nrain" in bytes_of(request) else reply(f"Wait. {CALL}")

    api = tool_api(script)

    def bytes_of(request: GenerateRequest) -> bytes:
        return api.tokenizer.decode(request.tokens, skip_special_tokens=False).encode()

    with Server(api) as server, connected(server) as client:
        with client.messages.stream(model=MODEL, max_tokens=500, messages=HI, tools=[WEATHER]) as stream:
            first = stream.get_final_message()
        assert first.stop_reason == "tool_use"
        text, call = first.content
        assert (text.type, call.type) == ("text", "tool_use")
        assert isinstance(call, anthropic.types.ToolUseBlock)
        assert (call.name, call.input) == ("weather", {"city": "Oslo"})
        messages: Any = [
            *HI,
            {"role": "assistant", "content": first.content},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"}]},
        ]
        last = client.messages.create(model=MODEL, max_tokens=500, messages=messages, tools=[WEATHER])
    assert (text_of(last), last.stop_reason) == ("It rains.", "end_turn")


def test_parse_gives_the_model_that_was_asked_for() -> None:
    class Person(pydantic.BaseModel):
        name: str
        age: int

    api = Api('{"name": "Ada", "age": 3}')
    with Server(api) as server, connected(server) as client:
        message = client.messages.parse(model=MODEL, max_tokens=50, messages=HI, output_format=Person)
    assert message.parsed_output == Person(name="Ada", age=3)
    assert api.sent.params.grammar is not None
    assert '"age"' in api.sent.params.grammar


@pytest.fixture
def thinking(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first two tokens are a thought."""
    plain = ChoiceText.push

    def push(choice: ChoiceText, tokens: Sequence[int], finish: str | None) -> Piece:
        piece = plain(choice, tokens, finish)
        if choice.num_tokens > 2:
            return piece
        return Piece("", piece.num_tokens, piece.finish, piece.offsets, piece.calls, reasoning=piece.text)

    monkeypatch.setattr(ChoiceText, "push", push)


@pytest.mark.usefixtures("thinking")
@pytest.mark.parametrize("display", ["summarized", "omitted"])
def test_thinking_is_a_block_before_the_answer(display: Any) -> None:
    shown = "ab" if display == "summarized" else ""
    config: Any = {"type": "enabled", "budget_tokens": 1024, "display": display}
    with Server(Api("abcd")) as server, connected(server) as client:
        whole = client.messages.create(model=MODEL, max_tokens=2000, messages=HI, thinking=config)
        with client.messages.stream(model=MODEL, max_tokens=2000, messages=HI, thinking=config) as stream:
            thoughts = [event.thinking for event in stream if event.type == "thinking"]
            streamed = stream.get_final_message()
        again: Any = [*HI, {"role": "assistant", "content": whole.content}, *HI]
        client.messages.create(model=MODEL, max_tokens=50, messages=again)
    assert "".join(thoughts) == shown
    for message in (whole, streamed):
        thought, text = message.content
        assert isinstance(thought, anthropic.types.ThinkingBlock)
        assert isinstance(text, anthropic.types.TextBlock)
        assert (thought.thinking, text.text) == (shown, "cd")
        assert thought.signature


def test_count_tokens(client: anthropic.Anthropic, api: Api) -> None:
    counted = client.messages.count_tokens(model=MODEL, messages=HI, system="S")
    client.messages.create(model=MODEL, max_tokens=5, messages=HI, system="S")
    assert counted.input_tokens == len(api.sent.tokens)


def test_errors_are_the_clients_own_classes(client: anthropic.Anthropic, api: Api) -> None:
    with pytest.raises(anthropic.NotFoundError) as missing:
        client.messages.create(model="claude", max_tokens=5, messages=HI)
    assert missing.value.type == "not_found_error"
    assert missing.value.request_id is not None
    with pytest.raises(anthropic.BadRequestError) as wrong:
        client.messages.create(model=MODEL, max_tokens=5, messages=HI, extra_body={"temperature": 1.5})
    assert "temperature" in (wrong.value.api_message or "")
    api.dispatcher.refusals = [BUSY]
    with pytest.raises(anthropic.InternalServerError) as busy:
        client.messages.create(model=MODEL, max_tokens=5, messages=HI)
    assert (busy.value.status_code, busy.value.type) == (529, "overloaded_error")


def test_the_client_waits_as_long_as_it_is_told_and_tries_again() -> None:
    api = Api("hello")
    api.dispatcher.refusals = [BUSY]
    with Server(api) as server, connected(server, retries=1) as client:
        started = time.monotonic()
        message = client.messages.create(model=MODEL, max_tokens=5, messages=HI)
    assert text_of(message) == "hello"
    assert 0.9 <= time.monotonic() - started < 5


def test_a_failure_in_a_stream_is_raised() -> None:
    lost = RequestError(503, "The worker was lost.", code="worker_lost")
    with Server(Api(reply("abcdef", fail_at=3, error=lost))) as server, connected(server) as client:
        texts: list[str] = []
        with (
            client.messages.stream(model=MODEL, max_tokens=50, messages=HI) as stream,
            pytest.raises(anthropic.APIStatusError) as caught,
        ):
            texts.extend(stream.text_stream)
    assert caught.value.type == "api_error"
    assert "The worker was lost." in str(caught.value)


def test_pings_pass_unseen_while_the_client_waits() -> None:
    api = Api(reply("ab", delay_s=0.03), keep_alive_s=0.01)
    with (
        Server(api) as server,
        connected(server) as client,
        client.messages.stream(model=MODEL, max_tokens=50, messages=HI) as stream,
    ):
        assert text_of(stream.get_final_message()) == "ab"
