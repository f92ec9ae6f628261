"""Where responses are kept: bounds of the memory, and a real Redis that proxies share and that may fail."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from mesh.errors import RequestError, StartupError
from proxy.api import responses_background, responses_redis, responses_store
from proxy.api.responses_redis import RedisStore
from proxy.api.responses_store import MemoryStore, Record, new_response_id, packed, unpacked
from tests.proxy.api_client import MODEL, Api
from tests.proxy.http_server import Server
from tests.proxy.redis_server import RedisServer, until
from tests.proxy.test_responses_client import Gate, wait_for

TTL_S = 100
PROMPT_S = 4.0
"""A store that does not answer holds a request up for little more than its time-out."""


def record(id: str | None = None, size: int = 0, status: str = "completed", deadline: float = 0.0) -> Record:
    response = {"id": id or new_response_id(), "status": status, "output": [], "text": "x" * size}
    return Record(response, [{"id": "msg_1", "type": "message"}], deadline)


def run(work: Any) -> Any:
    return asyncio.run(work)


def test_ids_are_long_and_random() -> None:
    assert len({new_response_id() for _ in range(100)}) == 100
    assert responses_store.RESPONSE_ID.fullmatch(new_response_id())


def test_records_survive_their_bytes() -> None:
    one = record(deadline=5.0)
    assert unpacked(packed(one)) == one


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"{}", b"\xff", b'{"response": [], "input": [], "deadline": 0}', b'{"response": {}, "input": 5}'],
)
def test_what_is_no_record_is_none(data: bytes) -> None:
    assert unpacked(data) is None


def test_memory_forgets_in_time() -> None:
    now = 0.0
    store = MemoryStore(10, lambda: now)
    one = record()
    run(store.put(one, new=True))
    now = 9.9
    assert run(store.get(one.id)) == one
    now = 10.0
    assert run(store.get(one.id)) is None
    assert run(store.delete(one.id)) is False


def test_memory_keeps_the_latest() -> None:
    store = MemoryStore(10, max_records=2)
    records = [record() for _ in range(3)]
    for one in records:
        run(store.put(one, new=True))
    assert [run(store.get(one.id)) for one in records] == [None, *records[1:]]


def test_memory_is_bounded_in_bytes() -> None:
    store = MemoryStore(10, max_bytes=3000)
    records = [record(size=1000) for _ in range(3)]
    for one in records:
        run(store.put(one, new=True))
        run(store.put(one, new=False))
    assert [run(store.get(one.id)) is None for one in records] == [True, False, False]


def test_what_was_deleted_does_not_come_back() -> None:
    store = MemoryStore(10)
    one = record()
    run(store.put(one, new=True))
    assert run(store.delete(one.id)) is True
    run(store.put(one, new=False))
    assert run(store.get(one.id)) is None


def test_a_conversation_that_is_too_large_is_answered_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(responses_store, "MAX_RECORD_BYTES", 100)
    api = Api("hello")
    answer = api.http.post("/v1/responses", json={"model": MODEL, "input": "hi"})
    assert answer.status_code == 200
    assert "is not kept" in caplog.text
    assert api.http.get(f"/v1/responses/{answer.json()['id']}").status_code == 404
    error = api.error("/v1/responses", {"input": "hi", "background": True})
    assert (error["code"], error["param"]) == ("conversation_too_large", "store")


def test_a_run_whose_proxy_died_is_failed_in_the_end() -> None:
    store = MemoryStore(100)
    api = Api(responses=store)
    alive = record(status="in_progress", deadline=time.time() - 30)
    dead = record(status="in_progress", deadline=time.time() - 90)
    for one in (alive, dead):
        run(store.put(one, new=True))
    assert api.http.get(f"/v1/responses/{alive.id}").json()["status"] == "in_progress"
    found = api.http.get(f"/v1/responses/{dead.id}").json()
    assert (found["status"], found["error"]["type"]) == ("failed", "response_lost")


def test_a_url_that_means_nothing_is_refused() -> None:
    with pytest.raises(StartupError):
        RedisStore("nonsense", 5)


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@contextmanager
def proxy(redis_server: RedisServer, script: Any = "hello world") -> Iterator[tuple[Api, openai.OpenAI]]:
    """A proxy on that Redis, and a client of it."""
    store = RedisStore(redis_server.url, TTL_S)
    api = Api(script, responses=store, max_model_len=1000)
    with Server(api, store.close) as server, server.client() as client:
        yield api, client


def test_a_conversation_goes_on_at_another_proxy(redis_server: RedisServer) -> None:
    with proxy(redis_server) as (_, one), proxy(redis_server) as (api, other):
        first = one.responses.create(model=MODEL, input="one")
        assert other.responses.retrieve(first.id) == first
        second = other.responses.create(model=MODEL, input="two", previous_response_id=first.id)
        seen = api.tokenizer.decode(list(api.sent.tokens))
        assert seen == "user\none\nassistant\nhello world\nuser\ntwo\nassistant\n"
        with one.responses.stream(model=MODEL, input="three", previous_response_id=second.id) as stream:
            third = stream.get_final_response()
        assert len(list(other.responses.input_items.list(third.id))) == 5
        one.responses.delete(second.id)
        with pytest.raises(openai.NotFoundError):
            other.responses.create(model=MODEL, input="x", previous_response_id=second.id)


def test_keys_have_the_meshs_prefix_and_expire(redis_server: RedisServer) -> None:
    with proxy(redis_server) as (_, client):
        id = client.responses.create(model=MODEL, input="one").id
        client.responses.create(model=MODEL, input="one", store=False)
    (key,) = redis_server.client.keys("*")
    assert key == f"kvmesh:response:{id}".encode()
    assert TTL_S - 10 <= redis_server.client.ttl(key) <= TTL_S


def test_what_others_wrote_there_is_no_response(redis_server: RedisServer) -> None:
    id = new_response_id()
    redis_server.client.set(f"kvmesh:response:{id}", b"nonsense")
    with proxy(redis_server) as (_, client), pytest.raises(openai.NotFoundError):
        client.responses.retrieve(id)


def test_a_cancel_at_another_proxy_aborts_at_the_workers(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses_background, "CANCEL_POLL_S", 0.02)
    with proxy(redis_server, Gate("hello world", 2)) as (api, one), proxy(redis_server) as (_, other):
        id = one.responses.create(model=MODEL, input="hi", background=True).id
        wait_for(other, id, "in_progress")
        with pytest.raises(openai.BadRequestError) as elsewhere:
            other.responses.retrieve(id, stream=True)
        assert elsewhere.value.param == "stream"
        cancelled = other.responses.cancel(id)
        assert (cancelled.status, cancelled.output_text) == ("cancelled", "hello w")
        assert api.dispatcher.generations[-1].aborted
        assert one.responses.retrieve(id) == cancelled


def test_a_deletion_at_another_proxy_ends_the_run_and_stays(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses_background, "CANCEL_POLL_S", 0.02)
    with proxy(redis_server, Gate("hello world", 2)) as (api, one), proxy(redis_server) as (_, other):
        id = one.responses.create(model=MODEL, input="hi", background=True).id
        other.responses.delete(id)
        until(lambda: bool(api.dispatcher.generations[-1].aborted))
        with pytest.raises(openai.NotFoundError):
            one.responses.retrieve(id)


@pytest.mark.parametrize("hangs", [False, True])
def test_without_redis_answers_come_and_state_is_a_clear_refusal(
    redis_server: RedisServer, hangs: bool, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses_redis, "TIMEOUT_S", 0.2)
    with proxy(redis_server) as (_, client):
        kept = client.responses.create(model=MODEL, input="one")
        if hangs:
            redis_server.signal(signal.SIGSTOP)
        else:
            redis_server.kill()
        try:
            started = time.monotonic()
            assert client.responses.create(model=MODEL, input="x", store=False).output_text == "hello world"
            assert time.monotonic() - started < 1
            with caplog.at_level(logging.WARNING):
                answer = client.responses.create(model=MODEL, input="x")
            assert answer.output_text == "hello world"
            assert f"response {answer.id} is not kept" in caplog.text
            for ask in (
                lambda: client.responses.retrieve(kept.id),
                lambda: client.responses.create(model=MODEL, input="x", previous_response_id=kept.id),
                lambda: client.responses.create(model=MODEL, input="x", background=True),
                lambda: client.responses.delete(kept.id),
                lambda: client.responses.cancel(kept.id),
                lambda: client.responses.input_items.list(kept.id),
            ):
                started = time.monotonic()
                with pytest.raises(openai.InternalServerError) as away:
                    ask()
                assert (away.value.status_code, away.value.code) == (503, "store_unavailable")
                assert away.value.response.headers["retry-after"]
                assert time.monotonic() - started < PROMPT_S
        finally:
            if hangs:
                redis_server.signal(signal.SIGCONT)
            else:
                redis_server.start()
        if not hangs:  # else Redis may still carry out what it was sent
            with pytest.raises(openai.NotFoundError):
                client.responses.retrieve(answer.id)
        again = client.responses.create(model=MODEL, input="x")
        assert client.responses.retrieve(again.id) == again


def test_the_end_of_a_run_is_kept_when_redis_is_back(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(responses_background, "KEEP_PAUSES_S", (0.0, *[0.05] * 200))
    gate = Gate("hello world", 2)
    with proxy(redis_server, gate) as (_, client):
        id = client.responses.create(model=MODEL, input="hi", background=True).id
        wait_for(client, id, "in_progress")
        redis_server.signal(signal.SIGSTOP)
        gate.open()
        with pytest.raises(openai.InternalServerError):
            client.responses.retrieve(id)
        redis_server.signal(signal.SIGCONT)
        assert wait_for(client, id, "completed").output_text == "hello world"


def test_a_store_that_fails_says_so_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        store = RedisStore(f"unix://{tmp_path}/nobody", 5)
        for _ in range(3):
            with pytest.raises(RequestError):
                await store.get(new_response_id())
        await store.close()

    run(test())
    assert len(caplog.records) == 1
