"""The same requests to a real service: a proxy and workers as processes, over sockets."""

from __future__ import annotations

import asyncio
from urllib.parse import quote

from tests.e2e.processes import Deployment
from tests.fuzz.description import Answer
from tests.fuzz.generate import Request

FLAGS = ("--engine", "sim", "--sim-step-s", "0.0005", "--max-model-len", "512")
"""Of the workers: what is tried is what a client can do to them, not a model."""
PATIENCE_S = 60.0


class RemoteTarget:
    """See `tests.fuzz.run.Target`; nobody changes a real service's state."""

    states: tuple[str, ...] = ()
    limit = 0

    def __init__(self, service: Deployment) -> None:
        self._port = service.port
        self.model = service.model_name

    def enter(self, state: str) -> None:
        assert state == "ready"

    async def settled(self, in_flight: int) -> bool:
        return True

    async def send(self, request: Request) -> Answer:
        """The whole answer, on a connection of its own. What is no HTTP (an unknown method, a false length) is left
        out: that is refused before there is a path."""
        method = "PURGE" if request.method == "BREW" else request.method
        headers = [("host", "test"), ("connection", "close"), ("content-length", str(len(request.body)))]
        headers += [(name, value) for name, value in request.headers if name != "content-length"]
        if request.media_type:
            headers.append(("content-type", request.media_type))
        url = quote(request.url, safe="/?&=%")
        lines = [f"{method} {url} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            async with asyncio.timeout(PATIENCE_S):
                writer.write("\r\n".join(lines).encode() + request.body)
                return _answer(await reader.read(-1))
        except ConnectionError:
            return Answer(0, {}, b"")
        finally:
            writer.close()


def _answer(received: bytes) -> Answer:
    """The one response in these bytes; status 0 when the server hung up without a word."""
    head, _, body = received.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    if not first:
        return Answer(0, {}, b"")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if headers.get("transfer-encoding") == "chunked":
        body = _whole(body)
    return Answer(int(first.split()[1]), headers, body)


def _whole(chunks: bytes) -> bytes:
    body = b""
    while True:
        size, _, rest = chunks.partition(b"\r\n")
        length = int(size, 16)
        if not length:
            return body
        body, chunks = body + rest[:length], rest[length + 2 :]
