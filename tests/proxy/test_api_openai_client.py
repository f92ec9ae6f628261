"""The official client against a real server on a loopback port."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import openai
import pydantic
import pytest

from mesh.errors import RequestError
from mesh.settings import ProxySettings
from tests.proxy.api_client import MODEL, Api, reply
from tests.proxy.fake_dispatcher import FakeGeneration
from tests.proxy.http_server import Server

HI: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
BUSY = RequestError(503, "Busy.", code="overloaded", retry_after=1)


@pytest.fixture
def api() -> Api:
    return Api("hello é😀", settings=ProxySettings(max_body_bytes=100_000))


@pytest.fixture
def client(api: Api) -> Iterator[openai.OpenAI]:
    with Server(api) as server, server.client() as client:
        yield client


def test_create(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, logprobs=True, top_logprobs=2, n=2)
    assert [c.message.content for c in answer.choices] == ["hello é😀"] * 2
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.content is not None
    assert answer.choices[0].logprobs.content[0].top_logprobs[1].logprob == -1.25
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


def test_stream(client: openai.OpenAI) -> None:
    options: openai.types.chat.ChatCompletionStreamOptionsParam = {"include_usage": True}
    chunks = list(client.chat.completions.create(model=MODEL, messages=HI, n=2, stream=True, stream_options=options))
    texts = ["", ""]
    for chunk in chunks:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["hello é😀"] * 2
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 16


def test_the_stream_helper_assembles_a_whole_answer(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=HI, logprobs=True) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "hello é😀"
    assert final.choices[0].finish_reason == "stop"


class Person(pydantic.BaseModel):
    name: str
    age: int | None
    friends: list[Person]


def test_parse_gives_the_model_that_was_asked_for() -> None:
    api = Api('{"name": "Ada", "age": null, "friends": [{"name": "Bob", "age": 3, "friends": []}]}')
    with Server(api) as server, server.client() as client:
        answer = client.chat.completions.parse(model=MODEL, messages=HI, response_format=Person)
        with client.chat.completions.stream(model=MODEL, messages=HI, response_format=Person) as stream:
            streamed = stream.get_final_completion()
    for completion in (answer, streamed):
        assert completion.choices[0].message.parsed == Person(
            name="Ada", age=None, friends=[Person(name="Bob", age=3, friends=[])]
        )
    assert api.sent.params.grammar is not None
    assert '"friends"' in api.sent.params.grammar


def test_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], echo=True, logprobs=1, max_tokens=2)
    assert [c.text for c in answer.choices] == ["ahello ", "bhello "]
    assert answer.choices[0].logprobs is not None
    assert answer.choices[0].logprobs.tokens == ["<s>", "a", "hello", " "]
    stream = client.completions.create(model=MODEL, prompt="a", stream=True)
    assert "".join(c.choices[0].text for c in stream) == "hello é😀"


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-9")


def test_errors_are_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=HI)
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    assert missing.value.request_id is not None
    with pytest.raises(openai.BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=HI, temperature=3)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model=MODEL, prompt="x" * 1000)
    assert too_long.value.code == "context_length_exceeded"


def test_a_body_over_the_limit_is_answered(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.completions.create(model=MODEL, prompt="x" * 5_000_000)
    assert (caught.value.status_code, caught.value.code) == (413, "request_too_large")


def test_the_client_waits_as_long_as_it_is_told_and_tries_again() -> None:
    api = Api("hello")
    api.dispatcher.refusals = [BUSY]
    with Server(api) as server, server.client(retries=1) as client:
        started = time.monotonic()
        answer = client.chat.completions.create(model=MODEL, messages=HI)
    assert answer.choices[0].message.content == "hello"
    assert 0.9 <= time.monotonic() - started < 5


def test_overload_is_an_internal_server_error_to_the_client() -> None:
    api = Api("hello")
    api.dispatcher.refusals = [BUSY]
    with (
        Server(api) as server,
        server.client() as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.chat.completions.create(model=MODEL, messages=HI)
    assert (caught.value.status_code, caught.value.code) == (503, "overloaded")


def test_a_failure_in_a_stream_is_raised() -> None:
    error = RequestError(503, "The worker was lost.", code="worker_lost")
    api = Api(reply("abcdef", fail_at=3, error=error))
    with Server(api) as server, server.client() as client:
        stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        texts = [next(stream).choices[0].delta.content or "" for _ in range(4)]
        with pytest.raises(openai.APIError) as caught:
            next(stream)
    assert "".join(texts) == "abc"
    assert caught.value.code == "worker_lost"


@pytest.mark.parametrize("stream", [True, False])
def test_closing_the_connection_aborts_the_generation(stream: bool) -> None:
    aborted = threading.Event()
    api = Api(lambda request: reply("abcdef", pauses={1 if stream else 0: asyncio.Event()}))
    submit = api.dispatcher.submit

    def watched(request: object) -> FakeGeneration:
        generation = submit(request)  # type: ignore[arg-type]
        generation.abort = lambda reason: aborted.set()  # type: ignore[method-assign]
        return generation

    api.dispatcher.submit = watched  # type: ignore[method-assign]
    with Server(api) as server, server.client() as client:
        if stream:
            answer = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
            next(iter(answer))
            answer.close()
        else:
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.2).chat.completions.create(model=MODEL, messages=HI)
        assert aborted.wait(0.5)


def test_many_streams_at_once_are_each_complete() -> None:
    api = Api("hello é😀 world")

    async def all_streams(port: int) -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:

            async def one() -> str:
                text, ends = "", []
                async for chunk in await client.chat.completions.create(model=MODEL, messages=HI, stream=True):
                    text += chunk.choices[0].delta.content or ""
                    ends.append(chunk.choices[0].finish_reason)
                return f"{text} {[e for e in ends if e]}"

            return await asyncio.gather(*(one() for _ in range(64)))

    with Server(api) as server:
        texts = asyncio.run(all_streams(server.port))
    assert texts == ["hello é😀 world ['stop']"] * 64
    assert not any(g.aborted for g in api.dispatcher.generations)
