"""The official client's `responses` against a real server on a loopback port."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from openai.types.responses import FunctionToolParam, Response, ResponseInputParam

from mesh.errors import RequestError
from proxy.api import responses_background
from proxy.api.door import Door
from proxy.generation import GenerateRequest
from tests.proxy.api_client import MODEL, Api, reply
from tests.proxy.fake_dispatcher import Script
from tests.proxy.http_server import Server
from tests.proxy.redis_server import until
from tests.proxy.response_events import checked
from tests.proxy.test_api_responses import CALL, CITY, HERMES
from tests.proxy.tiny_tokenizer import byte_level

WEATHER: FunctionToolParam = {"type": "function", "name": "weather", "parameters": CITY, "strict": True}
LOST = RequestError(503, "The worker was lost.", type="server_error", code="worker_lost")


class Gate:
    """Holds every answer before its token number `at` until the test opens it."""

    def __init__(self, text: str, at: int, **more: Any) -> None:
        self._text = text
        self._at = at
        self._more = more
        self._event = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, request: GenerateRequest) -> Script:
        self._loop = asyncio.get_running_loop()
        return reply(self._text, pauses={self._at: self._event}, **self._more)

    def open(self) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._event.set)


class Person(pydantic.BaseModel):
    name: str
    age: int | None


@pytest.fixture
def api() -> Api:
    return Api("hello é😀", max_model_len=1000)


@pytest.fixture
def client(api: Api) -> Iterator[openai.OpenAI]:
    with Server(api) as server, server.client() as client:
        yield client


def wait_for(client: openai.OpenAI, id: str, status: str) -> Response:
    until(lambda: client.responses.retrieve(id).status == status)
    return client.responses.retrieve(id)


def events_of(stream: Any) -> list[dict[str, Any]]:
    return [event.to_dict() for event in stream]


def first_events(stream: Any, count: int) -> list[dict[str, Any]]:
    return [next(stream).to_dict() for _ in range(count)]


def test_create_and_retrieve(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model=MODEL, input="hi", include=["message.output_text.logprobs"], top_logprobs=1, metadata={"a": "b"}
    )
    assert (response.output_text, response.status, response.metadata) == ("hello é😀", "completed", {"a": "b"})
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert client.responses.retrieve(response.id) == response


def test_a_stream_of_events(client: openai.OpenAI) -> None:
    response = checked(events_of(client.responses.create(model=MODEL, input="hi", stream=True)))
    assert response["output"][0]["content"][0]["text"] == "hello é😀"
    with client.responses.stream(model=MODEL, input="hi") as stream:
        assert stream.get_final_response().output_text == "hello é😀"


def test_parse_gives_the_model_that_was_asked_for() -> None:
    with Server(Api('{"name": "Ada", "age": null}')) as server, server.client() as client:
        response = client.responses.parse(model=MODEL, input="who?", text_format=Person)
        with client.responses.stream(model=MODEL, input="who?", text_format=Person) as stream:
            streamed = stream.get_final_response()
    assert response.output_parsed == streamed.output_parsed == Person(name="Ada", age=None)


@pytest.mark.parametrize("by_items", [True, False])
def test_the_client_goes_round_the_tool_loop(by_items: bool) -> None:
    def script(request: GenerateRequest) -> Script:
        return reply("It is sunny." if '"sunny"' in byte_level().decode(list(request.tokens)) else CALL)

    api = Api(script, tokenizer=byte_level(HERMES), max_model_len=4000)
    with Server(api) as server, server.client() as client:
        question: ResponseInputParam = [{"role": "user", "content": "What is the weather in Oslo?"}]
        with client.responses.stream(model=MODEL, input=question, tools=[WEATHER]) as stream:
            asked = stream.get_final_response()
        (call,) = asked.output
        assert call.type == "function_call"
        assert call.parsed_arguments == {"city": "Oslo"}
        result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": '{"weather": "sunny"}'}
        if by_items:
            given: Any = [*question, call.to_dict(), result]
            answer = client.responses.create(model=MODEL, input=given, tools=[WEATHER], store=False)
        else:
            answer = client.responses.create(
                model=MODEL, input=[result], tools=[WEATHER], previous_response_id=asked.id
            )
    assert answer.output_text == "It is sunny."


def test_an_output_is_an_input_for_the_next_turn(client: openai.OpenAI, api: Api) -> None:
    first = client.responses.create(model=MODEL, input="one")
    given: Any = [{"role": "user", "content": "one"}, *(item.to_dict() for item in first.output)]
    client.responses.create(model=MODEL, input=[*given, {"role": "user", "content": "two"}], store=False)
    seen = api.tokenizer.decode(list(api.sent.tokens))
    assert seen == "user\none\nassistant\nhello é😀\nuser\ntwo\nassistant\n"


def test_chains_pages_counts_and_deletion(client: openai.OpenAI) -> None:
    id: str | None = None
    for text in ("one", "two", "three"):
        id = client.responses.create(model=MODEL, input=text, previous_response_id=id).id
    assert id is not None
    items = list(client.responses.input_items.list(id, limit=2, order="asc"))
    assert [getattr(item, "role", None) for item in items] == ["user", "assistant", "user", "assistant", "user"]
    counted = client.responses.input_tokens.count(model=MODEL, input="one")
    assert counted.input_tokens > 3
    client.responses.delete(id)
    with pytest.raises(openai.NotFoundError) as caught:
        client.responses.retrieve(id)
    assert caught.value.code == "response_not_found"


def test_errors_are_the_clients_own_classes(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.responses.create(model="gpt-9", input="hi")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as unsupported:
        client.responses.create(model=MODEL, input="hi", tools=[{"type": "web_search"}])
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "tools.0.type")
    with pytest.raises(openai.NotFoundError) as previous:
        client.responses.create(model=MODEL, input="hi", previous_response_id="resp_1")
    assert previous.value.code == "previous_response_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.responses.create(model=MODEL, input="x" * 2000)
    assert long.value.code == "context_length_exceeded"


def test_a_broken_stream_is_no_success() -> None:
    with Server(Api(reply("abcdef", fail_at=3, error=LOST))) as server, server.client() as client:
        response = checked(events_of(client.responses.create(model=MODEL, input="hi", stream=True)))
        assert response["error"]["type"] == "worker_lost"
        with (
            client.responses.stream(model=MODEL, input="hi") as stream,
            pytest.raises(RuntimeError, match=r"response\.completed"),
        ):
            stream.get_final_response()


def test_the_async_client() -> None:
    async def test(server: Server) -> None:
        async with server.async_client() as client:
            first = await client.responses.create(model=MODEL, input="hi")
            assert first.output_text == "hello"
            async with client.responses.stream(model=MODEL, input="x", previous_response_id=first.id) as stream:
                events = [event async for event in stream]
            assert events[-1].type == "response.completed"
            assert (await client.responses.retrieve(first.id)).output_text == "hello"
            items = await client.responses.input_items.list(first.id)
            assert len(items.data) == 1
            later = await client.responses.create(model=MODEL, input="hi", background=True)
            cancelled = await client.responses.cancel(later.id)
            assert cancelled.status in ("cancelled", "completed")
            await client.responses.delete(first.id)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(first.id)

    with Server(Api("hello", max_model_len=1000)) as server:
        asyncio.run(asyncio.wait_for(test(server), 20))


def test_a_background_response_goes_through_its_states() -> None:
    begin, gate = Gate("hello", 0), Gate("hello world", 2)
    with Server(Api(begin)) as server, server.client() as client:
        queued = client.responses.create(model=MODEL, input="hi", background=True)
        assert (queued.status, queued.output, queued.background) == ("queued", [], True)
        assert client.responses.retrieve(queued.id) == queued
        with pytest.raises(openai.BadRequestError) as early:
            client.responses.create(model=MODEL, input="more", previous_response_id=queued.id)
        assert early.value.param == "previous_response_id"
        begin.open()
        assert wait_for(client, queued.id, "completed").output_text == "hello"
    with Server(Api(gate)) as server, server.client() as client:
        response = client.responses.create(model=MODEL, input="hi", background=True)
        assert wait_for(client, response.id, "in_progress").completed_at is None
        gate.open()
        done = wait_for(client, response.id, "completed")
        assert done.output_text == "hello world"
        assert done.usage is not None
        assert client.responses.create(model=MODEL, input="more", previous_response_id=done.id).status == "completed"


def test_the_limit_and_failures_end_a_background_response() -> None:
    with Server(Api("hello world")) as server, server.client() as client:
        cut = client.responses.create(model=MODEL, input="hi", background=True, max_output_tokens=2)
        assert wait_for(client, cut.id, "incomplete").incomplete_details is not None
    for fail_at in (0, 3):
        with Server(Api(reply("abcdef", fail_at=fail_at, error=LOST))) as server, server.client() as client:
            response = client.responses.create(model=MODEL, input="hi", background=True)
            failed = wait_for(client, response.id, "failed")
            assert failed.error is not None
            assert (failed.error.code, failed.error.message) == ("server_error", "The worker was lost.")
            assert failed.output_text == "abc"[:fail_at]
            with pytest.raises(openai.BadRequestError):
                client.responses.create(model=MODEL, input="more", previous_response_id=response.id)


def test_a_background_stream_can_be_taken_up_again() -> None:
    gate = Gate("hello world", 3)
    with Server(Api(gate)) as server, server.client() as client:
        stream = client.responses.create(model=MODEL, input="hi", background=True, stream=True)
        seen = first_events(stream, 5)
        id = seen[0]["response"]["id"]
        stream.close()
        gate.open()
        rest = events_of(client.responses.retrieve(id, stream=True, starting_after=4))
        response = checked(seen + rest, background=True)
        assert response["output"][0]["content"][0]["text"] == "hello world"
        assert client.responses.retrieve(id).to_dict() == response
        assert events_of(client.responses.retrieve(id, stream=True)) == seen + rest
        assert events_of(client.responses.retrieve(id, stream=True, starting_after=1000)) == []
        plain = client.responses.create(model=MODEL, input="hi", background=True)
        with pytest.raises(openai.BadRequestError) as caught:
            client.responses.retrieve(plain.id, stream=True)
        assert caught.value.param == "stream"


def test_events_in_the_background_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses_background, "MAX_EVENT_BYTES", 100)
    gate = Gate("hello", 1)
    with Server(Api(gate)) as server, server.client() as client:
        stream = client.responses.create(model=MODEL, input="hi", background=True, stream=True)
        seen = first_events(stream, 3)
        with pytest.raises(openai.InternalServerError) as full:
            client.responses.create(model=MODEL, input="hi", background=True, stream=True)
        assert full.value.code == "overloaded"
        assert client.responses.create(model=MODEL, input="hi", background=True).status == "queued"
        gate.open()
        checked(seen + events_of(stream), background=True)
        # one that has ended makes room
        again = events_of(client.responses.create(model=MODEL, input="hi", background=True, stream=True))
        assert checked(again, background=True)["status"] == "completed"
        with pytest.raises(openai.BadRequestError):
            client.responses.retrieve(seen[0]["response"]["id"], stream=True)


def test_a_cancel_aborts_at_the_workers() -> None:
    api = Api(Gate("hello world", 2))
    with Server(api) as server, server.client() as client:
        stream = client.responses.create(model=MODEL, input="hi", background=True, stream=True)
        seen = first_events(stream, 6)
        id = seen[0]["response"]["id"]
        cancelled = client.responses.cancel(id)
        assert (cancelled.status, cancelled.output_text) == ("cancelled", "hello w")
        assert api.dispatcher.generations[-1].aborted
        assert checked(seen + events_of(stream), background=True)["status"] == "cancelled"
        assert client.responses.cancel(id) == cancelled
        assert client.responses.retrieve(id) == cancelled


def test_a_response_that_was_not_begun_can_be_cancelled() -> None:
    api = Api(Gate("hello", 0))
    with Server(api) as server, server.client() as client:
        id = client.responses.create(model=MODEL, input="hi", background=True).id
        assert client.responses.cancel(id).status == "cancelled"
        assert api.dispatcher.generations[-1].aborted


def test_one_that_is_over_stays_as_it_is() -> None:
    with Server(Api("hello")) as server, server.client() as client:
        id = client.responses.create(model=MODEL, input="hi", background=True).id
        done = wait_for(client, id, "completed")
        assert client.responses.cancel(id) == done


def test_deleting_a_running_response_ends_it() -> None:
    door = Door(10)
    api = Api(Gate("hello", 1), door=door)
    with Server(api) as server, server.client() as client:
        id = client.responses.create(model=MODEL, input="hi", background=True).id
        client.responses.delete(id)
        until(lambda: door.in_flight == 0)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(id)
    assert api.dispatcher.generations[-1].aborted


def test_a_background_response_counts_until_its_end() -> None:
    door, gate = Door(2), Gate("hello", 1)
    with Server(Api(gate, door=door)) as server, server.client() as client:
        id = client.responses.create(model=MODEL, input="hi", background=True).id
        until(lambda: door.in_flight == 1)
        with pytest.raises(openai.InternalServerError) as full:
            # one place is taken, and a second one would be needed beside the request's own
            client.responses.create(model=MODEL, input="hi", background=True)
        assert full.value.code == "overloaded"
        assert door.in_flight == 1
        gate.open()
        wait_for(client, id, "completed")
        until(lambda: door.in_flight == 0)
        door.draining = True
        with pytest.raises(openai.InternalServerError) as draining:
            client.responses.create(model=MODEL, input="hi", background=True)
        assert draining.value.code == "draining"


def test_what_no_worker_takes_is_not_kept_waiting() -> None:
    door = Door(10)
    api = Api("hello", door=door)
    api.dispatcher.refusals = [RequestError(503, "Busy.", code="overloaded", retry_after=1)]
    with Server(api) as server, server.client() as client:
        with pytest.raises(openai.InternalServerError) as busy:
            client.responses.create(model=MODEL, input="hi", background=True)
        assert busy.value.code == "overloaded"
        until(lambda: door.in_flight == 0)


def test_events_go_out_as_they_come() -> None:
    gate = Gate("hello world", 2)
    with Server(Api(gate)) as server, server.client() as client:
        stream = client.responses.create(model=MODEL, input="hi", stream=True)
        first = [next(stream).type for _ in range(6)]
        assert first[-2:] == ["response.output_text.delta"] * 2
        gate.open()
        assert json.loads(list(stream)[-1].to_json())["type"] == "response.completed"
