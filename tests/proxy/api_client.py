"""Ways to call the application in tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.testclient import TestClient

from mesh.settings import ProxySettings
from mesh.tokenizer import Tokenizer
from proxy.app import create_app
from proxy.generation import GenerateRequest
from tests.proxy.fake_dispatcher import FakeDispatcher, Script
from tests.proxy.tiny_tokenizer import IM_END, byte_level

MODEL = "tiny"
CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"


def reply(text: str, **more: Any) -> Script:
    """A script that generates `text` and the end of the turn."""
    return Script([*byte_level().encode(text, add_special_tokens=False), IM_END], **more)


class Api:
    """The application over a fake dispatcher, called without a server."""

    def __init__(
        self,
        script: Script | Callable[[GenerateRequest], Script] | str = "hello world",
        *,
        max_model_len: int = 256,
        tokenizer: Tokenizer | None = None,
        settings: ProxySettings | None = None,
        **more: Any,
    ) -> None:
        self.dispatcher = FakeDispatcher(
            reply(script) if isinstance(script, str) else script, max_model_len=max_model_len
        )
        self.tokenizer = tokenizer or byte_level()
        self.app: FastAPI = create_app(self.dispatcher, self.tokenizer, settings or ProxySettings(), MODEL, **more)
        self.http = TestClient(self.app, raise_server_exceptions=False)

    @property
    def sent(self) -> GenerateRequest:
        """What the dispatcher got last."""
        return self.dispatcher.generations[-1].request

    def chat(self, content: Any = "hi", **fields: Any) -> Any:
        """The JSON answer of a chat of one message; fails unless it is 200."""
        return self._ok(CHAT, {"messages": [{"role": "user", "content": content}], **fields})

    def complete(self, prompt: Any = "hi", **fields: Any) -> Any:
        return self._ok(COMPLETIONS, {"prompt": prompt, **fields})

    def chat_stream(self, **fields: Any) -> list[Any]:
        body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, **fields}
        return self.stream(CHAT, body)

    def complete_stream(self, prompt: Any = "hi", **fields: Any) -> list[Any]:
        return self.stream(COMPLETIONS, {"prompt": prompt, "stream": True, **fields})

    def stream(self, path: str, body: dict[str, Any], **headers: str) -> list[Any]:
        response = self.http.post(path, json={"model": MODEL, **body}, headers=headers)
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        return events(response.content)

    def error(self, path: str, body: dict[str, Any], status: int = 400) -> dict[str, Any]:
        """The error object; fails unless the status is as given."""
        response = self.http.post(path, json={"model": MODEL, **body})
        assert response.status_code == status, response.text
        return error_of(response.json())

    def chat_error(self, status: int = 400, **fields: Any) -> dict[str, Any]:
        return self.error(CHAT, {"messages": [{"role": "user", "content": "hi"}], **fields}, status)

    def complete_error(self, status: int = 400, **fields: Any) -> dict[str, Any]:
        return self.error(COMPLETIONS, {"prompt": "hi", **fields}, status)

    def _ok(self, path: str, body: dict[str, Any]) -> Any:
        response = self.http.post(path, json={"model": MODEL, **body})
        assert response.status_code == 200, response.text
        return response.json()


def error_of(document: Any) -> dict[str, Any]:
    """The error object of an answer; fails unless it has exactly OpenAI's four keys."""
    error: dict[str, Any] = document["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["type"]
    return error


def events(body: bytes) -> list[Any]:
    """The JSON of each data frame; fails unless the stream ends with [DONE] and consists of whole frames."""
    assert body.endswith(b"data: [DONE]\n\n")
    frames = body.decode().split("\n\n")[:-2]
    data = [frame for frame in frames if not frame.startswith(":")]
    assert all(frame.startswith("data: ") for frame in data)
    return [json.loads(frame.removeprefix("data: ")) for frame in data]


def chat_texts(stream: list[Any], n: int = 1) -> list[str]:
    """Each choice's text."""
    texts = [""] * n
    for event in stream:
        for choice in event["choices"]:
            texts[choice["index"]] += choice["delta"].get("content") or ""
    return texts


def finishes(stream: list[Any]) -> list[tuple[int, str]]:
    """Every finish reason in order, with its choice."""
    choices = [choice for event in stream for choice in event["choices"]]
    return [(c["index"], c["finish_reason"]) for c in choices if c["finish_reason"] is not None]


class Call:
    """One request driven by hand at the ASGI level, so that a test decides when the client goes away."""

    def __init__(self, app: FastAPI, path: str, body: dict[str, Any], **headers: str) -> None:
        self.status: int | None = None
        self.body = b""
        self.closed = False
        self.wrote = asyncio.Event()
        """Set with every part of the answer's body."""
        self._gone = asyncio.Event()
        self._request = json.dumps({"model": MODEL, **body}).encode()
        self._asked = False
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [
                (b"content-type", b"application/json"),
                (b"host", b"test"),
                *((name.encode(), value.encode()) for name, value in headers.items()),
            ],
        }
        self.task: asyncio.Task[None] = asyncio.create_task(app(scope, self._receive, self._send))

    def disconnect(self) -> None:
        self._gone.set()

    async def next_write(self) -> None:
        """Waits for something new in `body`."""
        await asyncio.wait_for(self.wrote.wait(), 5)
        self.wrote.clear()

    async def _receive(self) -> dict[str, Any]:
        if not self._asked:
            self._asked = True
            return {"type": "http.request", "body": self._request, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        else:
            self.body += message.get("body", b"")
            self.closed = not message.get("more_body", False)
            self.wrote.set()
