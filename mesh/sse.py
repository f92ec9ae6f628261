"""A client for our own API with the standard library alone: JSON requests and streams of server-sent events."""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any
from urllib.parse import SplitResult, urlsplit

from mesh.errors import EXIT_REQUEST, EXIT_UNREACHABLE, EXIT_USAGE, StartupError

CONNECT_SECONDS = 5.0
ANSWER_SECONDS = 600.0
"""A prompt may wait and be computed for minutes before the first byte."""
MAX_EVENT_BYTES = 1 << 24
MAX_BODY_BYTES = 1 << 24


class ApiError(StartupError):
    """The server refused, or its answer broke off; `str()` is one line."""

    def __init__(self, message: str) -> None:
        super().__init__(message, EXIT_REQUEST)


def get(url: str, path: str, key: str = "") -> Any:
    """The JSON at `path`. Raises `StartupError`."""
    with closing(_connection(url)) as connection:
        response = _request(connection, url, "GET", path, None, _authorization(key))
        return _json(_bounded(response))


def stream(url: str, path: str, body: Mapping[str, Any], key: str = "") -> Generator[dict[str, Any], None, None]:
    """The events of a streamed request, one by one as they arrive; closing the iterator ends the request.

    Raises `StartupError` when the server refuses, sends an error event, or breaks off before `[DONE]`.
    """
    headers = {"Content-Type": "application/json", "Accept": "text/event-stream", "x-kvmesh-route": "1"}
    headers |= _authorization(key)
    with closing(_connection(url)) as connection:
        response = _request(connection, url, "POST", path, json.dumps(body).encode(), headers)
        try:
            yield from events(iter(lambda: response.readline(MAX_EVENT_BYTES), b""))
        except (OSError, http.client.HTTPException):
            raise ApiError("the server broke off in the middle of its answer") from None


def events(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """The JSON objects of `data:` lines up to `[DONE]`."""
    data: list[bytes] = []
    for line in lines:
        text = line.rstrip(b"\r\n")
        if text.startswith(b"data:"):
            data.append(text[5:].removeprefix(b" "))
        elif not text and data:
            payload = b"\n".join(data)
            data = []
            if payload == b"[DONE]":
                return
            event = _json(payload)
            if not isinstance(event, dict):
                raise ApiError("the server sent an event that is no object")
            if "error" in event:
                raise ApiError(_error_text(event, "the server ended the answer with an error"))
            yield event
    raise ApiError("the server ended its answer early")


def _authorization(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _connection(url: str) -> http.client.HTTPConnection:
    parts = _split(url)
    host = parts.hostname or ""
    if parts.scheme == "https":
        return http.client.HTTPSConnection(
            host, parts.port, timeout=CONNECT_SECONDS, context=ssl.create_default_context()
        )
    return http.client.HTTPConnection(host, parts.port, timeout=CONNECT_SECONDS)


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        complete = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        complete = False
    if not complete:
        raise StartupError(f"{url!r} is no server address; give http://HOST:PORT", EXIT_USAGE)
    return parts


def _request(
    connection: http.client.HTTPConnection,
    url: str,
    method: str,
    path: str,
    body: bytes | None,
    headers: Mapping[str, str],
) -> http.client.HTTPResponse:
    base = _split(url).path.rstrip("/").removesuffix("/v1")
    try:
        connection.connect()
        connection.sock.settimeout(ANSWER_SECONDS)
        connection.request(method, base + path, body, dict(headers))
        response = connection.getresponse()
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        hint = "start one with `kvmesh up`, or name another with --url"
        raise StartupError(f"no server answers at {url} ({reason}); {hint}", EXIT_UNREACHABLE) from None
    if response.status != 200:
        raise ApiError(_refusal(response))
    return response


def _refusal(response: http.client.HTTPResponse) -> str:
    usual = f"the server answered {response.status} {response.reason}"
    try:
        text = _error_text(_json(_bounded(response)), usual)
    except (ApiError, OSError, http.client.HTTPException):
        return usual
    wait = response.headers.get("Retry-After")
    return f"{text} (try again in {wait} s)" if wait else text


def _bounded(response: http.client.HTTPResponse) -> bytes:
    return response.read(MAX_BODY_BYTES)


def _json(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise ApiError("the server's answer is not what a kvmesh proxy sends") from None


def _error_text(body: Any, usual: str) -> str:
    """The sentence of an OpenAI error object, on one line."""
    match body:
        case {"error": {"message": str(message)}}:
            return " ".join(message.split())
        case _:
            return usual
