"""Sends generated requests to the application, in this process, over the fake dispatcher."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Protocol
from urllib.parse import unquote

from fastapi import FastAPI
from openapi_spec_validator import validate

from mesh.errors import RequestError
from mesh.settings import ProxySettings
from proxy.api.door import Door
from proxy.app import create_app
from proxy.generation import GenerateRequest
from tests.fuzz.description import Answer, Description, keys_complaint
from tests.fuzz.generate import Generator, Request
from tests.proxy.api_client import CHAT, MODEL, reply
from tests.proxy.fake_dispatcher import FakeDispatcher, Script
from tests.proxy.test_api_tools import CALL, HERMES
from tests.proxy.tiny_tokenizer import byte_level

MAX_MODEL_LEN = 2000
MAX_BODY_BYTES = 60_000
LIMIT = 64
TURNS = 1000
"""Of the event loop, for what goes on after its answer; a handful are enough."""
RESPONSES = "/v1/responses"
STATES = ("no workers", "draining", "full", "workers die")
"""In which a server may well answer 503."""
EVERY = 15
"""So many requests apart are those that come in such a state."""
MODELS = (MODEL, MODEL, MODEL, MODEL, MODEL, "other")
SCRIPTS = (reply("hello é😀"), reply(f"Wait. {CALL}"), reply('{"a": [1]}', at_once=True), reply(""))
DYING = reply("abcdef", fail_at=2, error=RequestError(503, "The worker was lost.", code="worker_lost", retry_after=5))


@dataclass(slots=True)
class Report:
    statuses: Counter[int] = field(default_factory=Counter)
    served: Counter[str] = field(default_factory=Counter)
    """How often each path answered 200."""
    failures: list[str] = field(default_factory=list)


class Serves(Protocol):
    """What requests are sent to."""

    states: tuple[str, ...]
    """In which it can be put, beside `ready`."""
    limit: int
    """Requests in flight while it is full."""
    model: str

    def enter(self, state: str) -> None: ...

    async def settled(self, in_flight: int) -> bool:
        """Waits for what goes on after an answer, and whether just so many are in flight then."""

    async def send(self, request: Request) -> Answer: ...


class Target:
    """The application in a state that can be changed."""

    states: tuple[str, ...] = STATES
    limit: int = LIMIT
    model: str = MODEL

    def __init__(self) -> None:
        self.dispatcher = FakeDispatcher(self._script, max_model_len=MAX_MODEL_LEN)
        self.door = Door(LIMIT)
        self.app: FastAPI = create_app(
            self.dispatcher,
            byte_level(HERMES),
            ProxySettings(max_body_bytes=MAX_BODY_BYTES),
            MODEL,
            door=self.door,
        )
        self._dying = False
        self._facts = self.dispatcher.facts

    def _script(self, request: GenerateRequest) -> Script:
        if self._dying:
            return DYING
        return SCRIPTS[len(request.tokens) % len(SCRIPTS)]

    def enter(self, state: str) -> None:
        self.dispatcher.generations.clear()
        self.dispatcher.facts = None if state == "no workers" else self._facts
        self._dying = state == "workers die"
        self.door.draining = state == "draining"
        self.door.in_flight = LIMIT if state == "full" else 0

    async def settled(self, in_flight: int) -> bool:
        """Lets responses in the background end."""
        for _ in range(TURNS):
            if self.door.in_flight == in_flight:
                return True
            await asyncio.sleep(0)
        return False

    async def send(self, request: Request) -> Answer:
        """The whole answer; the client stays until it is there."""
        answer = Answer(0, {}, b"")
        asked = False
        parts: list[bytes] = []

        async def receive() -> dict[str, Any]:
            nonlocal asked
            if not asked:
                asked = True
                return {"type": "http.request", "body": request.body, "more_body": False}
            await asyncio.Event().wait()
            raise AssertionError

        async def send(message: Any) -> None:
            nonlocal answer
            if message["type"] == "http.response.start":
                headers = {name.decode(): value.decode() for name, value in message["headers"]}
                answer = Answer(message["status"], headers, b"")
            else:
                parts.append(message.get("body", b""))

        path, _, query = request.url.partition("?")
        headers = [(b"host", b"test"), *((name.encode(), value.encode()) for name, value in request.headers)]
        if request.media_type:
            headers.append((b"content-type", request.media_type.encode()))
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": request.method,
            "scheme": "http",
            "path": unquote(path),
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": headers,
        }
        async with asyncio.timeout(30):
            await self.app(scope, receive, send)
        return Answer(answer.status, answer.headers, b"".join(parts))


async def fuzz(requests: int, seed: int, target: Serves | None = None) -> Report:
    """Every failure is one line that names the request."""
    report = Report()
    if target is None:
        target = Target()
    document = json.loads((await target.send(Request("GET", "", "/openapi.json"))).body)
    validate(document)
    description = Description(document)
    generator = Generator(description, seed, (*[target.model] * 5, "other"))
    for number in range(requests):
        request = generator.request()
        states = target.states if number % EVERY == 0 else ()
        state = states[number // EVERY % len(states)] if states else "ready"
        target.enter(state)
        answer = await target.send(request)
        left = await target.settled(target.limit if state == "full" else 0)
        if request.path == RESPONSES and answer.status == 200:
            generator.response_ids += re.findall(rb"resp_[0-9a-f]+", answer.body)[0].decode().split()
        report.statuses[answer.status] += 1
        report.served[request.path] += answer.status == 200
        found = complaint(description, request, answer, state)
        if found is None and not left:
            found = "the request never left the door"
        if found is not None:
            sent = f"{request.method} {request.url} ({state}) {request.media_type!r} {request.body[:600]!r}"
            report.failures.append(f"{number}: {sent}: {found}")
    target.enter("ready")
    body = json.dumps({"model": target.model, "messages": [{"role": "user", "content": "hi"}]}).encode()
    if (await target.send(Request("POST", CHAT, CHAT, body))).status != 200:
        report.failures.append("the server serves no more")
    return report


def complaint(description: Description, request: Request, answer: Answer, state: str) -> str | None:
    """What is wrong with an answer; None if nothing is."""
    if answer.status >= 500 and (state == "ready" or answer.status not in (503, 529)):
        return f"{answer.status} {answer.body[:300]!r}"
    item = description.paths.get(request.path)
    if item is not None and request.method.lower() in item:
        return description.complaint(request.method, request.path, answer)
    expected = {404 if item is None or description.is_of_another(request.method, request.path) else 405, 413}
    if request.method == "POST" and state in ("draining", "full"):
        expected = {503, 529}
    if answer.status not in expected:
        return f"the status {answer.status} of a path or method that there is none"
    return keys_complaint(answer.status, request.path, json.loads(answer.body)) if answer.body else None
