"""Server-sent events as bytes: a frame is `data: ` + JSON + an empty line, built from prepared parts."""

from __future__ import annotations

import json
from json.encoder import encode_basestring
from time import perf_counter
from typing import Any

from starlette.types import Send

from mesh.errors import RequestError
from proxy.api.errors import error_object

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Reverse proxies that buffer answers would hold tokens back.
    (b"x-accel-buffering", b"no"),
)


def quoted(text: str) -> str:
    """`text` as a JSON string; the standard library's C encoder, without the detour of `dumps`."""
    return encode_basestring(text)


def compact(value: Any) -> str:
    """`value` as JSON without spaces; a NaN or an infinity is a fault, not an answer."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def error_frames(error: RequestError) -> bytes:
    """How a stream that cannot go on ends: clients take a plain end for success."""
    return b"data: " + error_object(error) + b"\n\n" + DONE


class Output:
    """The answer of one request as it is sent; the status goes out with the first byte of the body."""

    __slots__ = ("_send", "_writing", "last_write", "started")

    def __init__(self, send: Send) -> None:
        self._send = send
        self._writing = False
        self.started = False
        self.last_write = perf_counter()

    async def write(self, frames: bytes) -> None:
        """Sends `frames` of an event stream at once."""
        self.last_write = perf_counter()
        self._writing = True
        if not self.started:
            await self._start(200, HEADERS)
        await self._send({"type": "http.response.body", "body": frames, "more_body": True})
        self._writing = False

    async def end(self, frames: bytes) -> None:
        """Sends the last `frames` and ends the stream."""
        self.last_write = perf_counter()
        self._writing = True
        if not self.started:
            await self._start(200, HEADERS)
        await self._send({"type": "http.response.body", "body": frames, "more_body": False})

    async def keep_alive(self, frames: bytes) -> None:
        """Sends `frames`, unless the client has not even taken what is being sent: the stream's end may be in it."""
        if self._writing:
            self.last_write = perf_counter()
        else:
            await self.write(frames)

    async def document(self, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
        """Sends a whole JSON answer."""
        length = (b"content-length", str(len(body)).encode())
        await self._start(200, ((b"content-type", b"application/json"), length, *headers))
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def _start(self, status: int, headers: tuple[tuple[bytes, bytes], ...]) -> None:
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": list(headers)})
