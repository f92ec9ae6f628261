"""Failures, disconnects, silence and shutdown: a client always learns how its request ended, and so do the workers."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine
from typing import Any

import pytest
from starlette.types import Message

from mesh.errors import RequestError
from mesh.settings import ProxySettings
from proxy.api.door import Door
from proxy.api.sse import KEEP_ALIVE, Output
from tests.proxy.api_client import CHAT, COMPLETIONS, MODEL, Api, Call, chat_texts, error_of, events, finishes, reply
from tests.proxy.fake_dispatcher import Script

HI = [{"role": "user", "content": "hi"}]
CHAT_STREAM = {"messages": HI, "stream": True}
LOST = RequestError(503, "The worker was lost.", type="server_error", code="worker_lost")
ABORT_WITHIN_S = 0.1


def run(test: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(10):
            await test

    asyncio.run(limited())


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(("path", "body"), [(CHAT, {"messages": HI}), (COMPLETIONS, {"prompt": "hi"})])
def test_a_failure_before_the_first_token_is_a_status(path: str, body: dict[str, Any], stream: bool) -> None:
    api = Api(reply("abc", fail_at=0, error=LOST))
    error = api.error(path, {**body, "stream": stream}, 503)
    assert (error["code"], error["message"], error["type"]) == ("worker_lost", "The worker was lost.", "server_error")


def test_a_failure_in_a_stream_is_an_error_event() -> None:
    api = Api(reply("abcdef", fail_at=3, error=LOST))
    stream = api.chat_stream()
    assert error_of(stream[-1])["code"] == "worker_lost"
    assert chat_texts(stream[:-1]) == ["abc"]
    assert finishes(stream[:-1]) == []


def test_a_generation_that_just_ends_is_an_error_event() -> None:
    api = Api(reply("abcdef", fail_at=3))
    assert error_of(api.chat_stream()[-1])["type"] == "server_error"


def test_a_failure_of_a_whole_answer_is_a_status() -> None:
    assert Api(reply("abcdef", fail_at=3, error=LOST)).chat_error(503)["code"] == "worker_lost"


@pytest.mark.parametrize("fail_at", [0, 3])
def test_an_unexpected_exception_says_nothing_of_itself(fail_at: int, caplog: pytest.LogCaptureFixture) -> None:
    api = Api(reply("abcdef", fail_at=fail_at, error=ValueError("secret")))
    response = api.http.post(CHAT, json={"model": MODEL, **CHAT_STREAM})
    assert "secret" not in response.text
    assert response.status_code == (500 if fail_at == 0 else 200)
    assert "secret" in caplog.text


def test_a_fault_outside_the_generation_is_500_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    api = Api()

    def broken(request: object) -> Any:
        raise KeyError("secret")

    api.dispatcher.submit = broken  # type: ignore[method-assign]
    error = api.chat_error(500)
    assert (error["message"], error["type"]) == (
        "The server had an error while processing your request.",
        "server_error",
    )
    assert [r.levelno for r in caplog.records if r.name.startswith("proxy")] == [logging.ERROR]


def test_a_token_out_of_place_is_a_fault() -> None:
    api = Api(reply("abc", gap_at=1))
    stream = api.chat_stream()
    assert "error" in stream[-1]
    assert chat_texts(stream[:-1]) == ["a"]


@pytest.mark.parametrize(("code", "retry_after"), [("no_workers", 2), ("overloaded", 7)])
def test_a_refusal_of_the_dispatcher_carries_retry_after(code: str, retry_after: int) -> None:
    api = Api()
    api.dispatcher.refusals = [RequestError(503, "Not now.", code=code, retry_after=retry_after)]
    response = api.http.post(CHAT, json={"model": MODEL, "messages": HI})
    assert (response.status_code, response.headers["retry-after"]) == (503, str(retry_after))
    assert (error_of(response.json())["code"], response.json()["error"]["type"]) == (code, "server_error")


def test_a_refused_prompt_aborts_those_already_submitted() -> None:
    api = Api()
    api.dispatcher.refusals = [None, RequestError(503, "Not now.", code="overloaded", retry_after=1)]
    api.complete_error(503, prompt=["a", "b"])
    assert [g.aborted for g in api.dispatcher.generations] == [["failed"]]


def test_tokens_after_a_stop_string_are_dropped_even_when_they_are_already_there() -> None:
    stream = Api(reply("abcdef", at_once=True)).chat_stream(n=2, stop="c", logprobs=True)
    assert chat_texts(stream, 2) == ["ab", "ab"]
    assert finishes(stream) == [(0, "stop"), (1, "stop")]


def test_without_workers_it_is_503() -> None:
    api = Api()
    api.dispatcher.facts = None
    response = api.http.post(CHAT, json={"model": MODEL, "messages": HI})
    assert response.status_code == 503
    assert error_of(response.json())["code"] == "no_workers"
    assert 1 <= int(response.headers["retry-after"]) <= 30


def test_a_draining_server_refuses_and_closes() -> None:
    door = Door(8)
    api = Api(door=door)
    door.draining = True
    response = api.http.post(CHAT, json={"model": MODEL, "messages": HI})
    assert response.status_code == 503
    assert error_of(response.json())["code"] == "draining"
    assert response.headers["connection"] == "close"
    assert int(response.headers["retry-after"]) >= 1
    assert api.http.get("/health").status_code == 200


def test_a_full_server_is_overloaded_and_recovers() -> None:
    async def test() -> None:
        hold = asyncio.Event()
        api = Api(reply("abc", pauses={0: hold}), settings=ProxySettings(max_concurrent_requests=1))
        first = Call(api.app, CHAT, CHAT_STREAM)
        while not api.dispatcher.generations:
            await asyncio.sleep(0)
        second = Call(api.app, CHAT, CHAT_STREAM)
        await second.task
        assert second.status == 503
        assert json.loads(second.body)["error"]["code"] == "overloaded"
        hold.set()
        await first.task
        third = Call(api.app, CHAT, CHAT_STREAM)
        await third.task
        assert (first.status, third.status) == (200, 200)

    run(test())


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_is_aborted_at_once(stream: bool, at: int) -> None:
    async def test() -> None:
        api = Api(reply("abcdef", pauses={at: asyncio.Event()}))
        call = Call(api.app, CHAT, {"messages": HI, "stream": stream})
        while not api.dispatcher.generations or api.dispatcher.generations[0].chunks_taken < at:
            await asyncio.sleep(0)
        call.disconnect()
        await asyncio.wait_for(api.dispatcher.generations[0].abort_event.wait(), ABORT_WITHIN_S)
        await asyncio.wait_for(call.task, ABORT_WITHIN_S)
        assert api.dispatcher.generations[0].aborted == ["client_disconnected"]
        assert not call.closed

    run(test())


def test_a_client_that_leaves_aborts_every_prompt() -> None:
    async def test() -> None:
        api = Api(reply("abc", pauses={1: asyncio.Event()}))
        call = Call(api.app, COMPLETIONS, {"prompt": ["a", "b"], "stream": True})
        await call.next_write()
        call.disconnect()
        await call.task
        assert [g.aborted for g in api.dispatcher.generations] == [["client_disconnected"]] * 2
        assert len(asyncio.all_tasks()) == 1

    run(test())


def test_a_complete_answer_aborts_nothing() -> None:
    api = Api("abc")
    api.chat_stream(n=2)
    assert api.dispatcher.generations[0].aborted == []


def test_tokens_that_arrive_together_are_written_together() -> None:
    async def test() -> None:
        api = Api(reply("abcdef", together=True))
        writes = 0
        call = Call(api.app, CHAT, {**CHAT_STREAM, "n": 4})
        while not call.closed:
            await call.next_write()
            writes += 1
        await call.task
        assert writes <= 8
        assert chat_texts(events(call.body), 4) == ["abcdef"] * 4

    run(test())


def test_a_silent_stream_is_kept_alive_until_it_speaks() -> None:
    async def test() -> None:
        hold = asyncio.Event()
        api = Api(reply("abc", pauses={0: hold}), keep_alive_s=0.02)
        call = Call(api.app, CHAT, CHAT_STREAM)
        await call.next_write()
        await call.next_write()
        assert call.body.replace(b": keep-alive\n\n", b"") == b""
        hold.set()
        await call.task
        assert chat_texts(events(call.body)) == ["abc"]

    run(test())


def test_a_failure_after_a_comment_is_an_error_event() -> None:
    async def test() -> None:
        hold = asyncio.Event()
        api = Api(reply("abc", pauses={0: hold}, fail_at=0, error=LOST), keep_alive_s=0.02)
        call = Call(api.app, CHAT, CHAT_STREAM)
        await call.next_write()
        hold.set()
        await call.task
        assert (call.status, error_of(events(call.body)[-1])["code"]) == (200, "worker_lost")

    run(test())


def test_a_whole_answer_is_not_started_by_a_comment() -> None:
    async def test() -> None:
        api = Api(reply("abc", delay_s=0.03), keep_alive_s=0.01)
        call = Call(api.app, CHAT, {"messages": HI})
        await call.task
        assert json.loads(call.body)["choices"][0]["message"]["content"] == "abc"

    run(test())


def test_an_announced_body_over_the_limit_is_not_read_at_all() -> None:
    assert _parts_read(announced=True) == 0


def test_a_body_over_the_limit_is_read_no_further() -> None:
    assert _parts_read(announced=False) == 11


def _parts_read(*, announced: bool) -> int:
    """Parts of 100 bytes that a server with a limit of 1000 takes of an endless body."""
    api = Api(settings=ProxySettings(max_body_bytes=1000))
    parts, status = 0, []

    async def receive() -> dict[str, Any]:
        nonlocal parts
        parts += 1
        return {"type": "http.request", "body": b"x" * 100, "more_body": True}

    async def send(message: Any) -> None:
        status.append(message.get("status"))

    headers = [(b"content-type", b"application/json")]
    if announced:
        headers.append((b"content-length", b"1000000"))
    scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": headers}
    asyncio.run(api.app(scope, receive, send))
    assert status[0] == 413
    return parts


def test_a_client_that_leaves_within_its_body_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    api = Api()

    async def receive() -> dict[str, Any]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        raise AssertionError("nobody is there to read it")

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": CHAT, "query_string": b"", "headers": headers}
    asyncio.run(api.app(scope, receive, send))
    assert not [r for r in caplog.records if r.name.startswith("proxy")]
    assert 'status="499"' in api.http.get("/metrics").text


def test_the_door_counts_who_is_inside() -> None:
    async def test() -> None:
        door, hold = Door(8), asyncio.Event()
        api = Api(reply("abc", pauses={0: hold}), door=door)
        calls = [Call(api.app, CHAT, CHAT_STREAM) for _ in range(3)]
        while len(api.dispatcher.generations) < 3:
            await asyncio.sleep(0)
        assert door.in_flight == 3
        door.draining = True
        hold.set()
        await asyncio.gather(*(call.task for call in calls))
        assert door.in_flight == 0
        assert all(finishes(events(call.body)) == [(0, "stop")] for call in calls)

    run(test())


def test_a_single_token_script_is_complete() -> None:
    assert finishes(Api(Script([5], finish="length")).chat_stream()) == [(0, "length")]


def test_no_comment_follows_an_end_that_the_client_has_not_taken() -> None:
    async def test() -> None:
        sent: list[Message] = []
        taken = asyncio.Event()

        async def send(message: Message) -> None:
            await taken.wait()
            sent.append(message)

        output = Output(send)
        end = asyncio.create_task(output.end(b"end"))
        await asyncio.sleep(0)
        await output.keep_alive(KEEP_ALIVE)
        taken.set()
        await end
        assert [m.get("body") for m in sent] == [None, b"end"]

    run(test())
