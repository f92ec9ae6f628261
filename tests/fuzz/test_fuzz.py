"""A short run of the fuzzer, and that it notices what it is for."""

from __future__ import annotations

import asyncio
import json
from functools import cache
from typing import Any

import pytest

from tests.fuzz.__main__ import fuzzed_service
from tests.fuzz.description import Answer, Description
from tests.fuzz.generate import Generator, Request
from tests.fuzz.run import MODELS, Target, complaint, fuzz

REQUESTS = 750


@cache
def described() -> Description:
    answer = asyncio.run(Target().send(Request("GET", "", "/openapi.json")))
    return Description(json.loads(answer.body))


@pytest.mark.parametrize("seed", [1, 2])
def test_no_request_gets_an_answer_that_is_not_declared(seed: int) -> None:
    report = asyncio.run(fuzz(REQUESTS, seed))
    assert report.failures == []
    assert {200, 400, 404, 405, 413, 503} <= report.statuses.keys()
    bodies = {path for _, path, schema in described().operations() if schema}
    assert all(report.served[path] for path in bodies)


def test_the_same_seed_gives_the_same_requests() -> None:
    first, second = (Generator(described(), 7, MODELS) for _ in range(2))
    requests = [first.request() for _ in range(200)]
    assert requests == [second.request() for _ in range(200)]
    assert len({request.path for request in requests}) > 15
    assert {request.valid for request in requests} == {True, False}


def error(status: int, **fields: Any) -> Answer:
    document = {"error": {"message": "No.", "type": "server_error", "param": None, "code": None, **fields}}
    return Answer(status, {"content-type": "application/json"}, json.dumps(document).encode())


def stream(*data: str) -> Answer:
    body = "".join(f"data: {d}\n\n" for d in data).encode()
    return Answer(200, {"content-type": "text/event-stream; charset=utf-8"}, body)


@pytest.mark.parametrize(
    ("answer", "state", "found"),
    [
        (error(500), "ready", "500"),
        (error(503), "ready", "503"),
        (error(503), "draining", None),
        (error(422), "ready", "422 is not declared"),
        (error(400, extra=1), "ready", "keys"),
        (error(400, message=" "), "ready", "no message"),
        (error(400, param=3), "ready", "$.error.param"),
        (Answer(200, {"content-type": "text/html"}, b""), "ready", "media type"),
        (Answer(200, {"content-type": "application/json"}, b'{"id": "x"}'), "ready", "required property"),
        (stream('{"error": {"message": "m", "type": "t", "param": null, "code": null}}', "[DONE]"), "ready", None),
        (stream('{"choices": []}', "[DONE]"), "ready", "not valid"),
        (stream('{"choices": []}'), "ready", "[DONE]"),
    ],
)
def test_the_fuzzer_notices(answer: Answer, state: str, found: str | None) -> None:
    path = "/v1/chat/completions"
    noticed = complaint(described(), Request("POST", path, path), answer, state)
    assert noticed is None if found is None else found in (noticed or "")


def test_a_real_service_lives_through_it() -> None:
    report = fuzzed_service(250, 4)
    assert report.failures == []
    assert report.statuses[200] > 30
