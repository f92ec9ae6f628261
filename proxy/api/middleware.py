"""What surrounds every endpoint, outermost first: `Edge`, `Admission`, `BodyLimit`.

Plain ASGI: a middleware that wraps the response in a stream of its own would hide the client's disconnect.
"""

from __future__ import annotations

import logging
from time import perf_counter

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mesh.errors import RequestError, internal_error
from proxy.api import requestid
from proxy.api.answer import CLIENT_LEFT
from proxy.api.anthropic_errors import speaks_anthropic
from proxy.api.door import Door
from proxy.api.errors import error_response
from proxy.metrics import ProxyMetrics

logger = logging.getLogger(__name__)

CLIENT_CLOSED = 499


class Edge:
    """Gives every answer its `x-request-id`, counts it, and turns what nobody caught into a 500 without detail."""

    def __init__(self, app: ASGIApp, metrics: ProxyMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = perf_counter()
        requestid.begin(scope)
        id_headers = [requestid.HEADER, *(["request-id"] if speaks_anthropic(scope["path"]) else [])]
        status = 0

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name in id_headers:
                    headers[name] = scope[requestid.KEY]
            await send(message)

        try:
            await self._app(scope, receive, labelled)
        except ClientDisconnect:
            scope[CLIENT_LEFT] = True
        except Exception:
            logger.exception("%s %s (%s) failed", scope["method"], handler_of(scope), scope[requestid.KEY])
            if status:
                raise  # too late for a status: the server cuts the connection
            await error_response(internal_error(), scope)(scope, receive, labelled)
        finally:
            code = CLIENT_CLOSED if scope.get(CLIENT_LEFT) else status or 500
            self._metrics.observe_http(handler_of(scope), scope["method"], code, perf_counter() - started)


class Admission:
    """Lets requests that make work through the door, one by one."""

    def __init__(self, app: ASGIApp, door: Door, metrics: ProxyMetrics) -> None:
        self._app = app
        self._door = door
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        try:
            self._door.enter()
        except RequestError as error:
            self._metrics.count_rejection("draining" if error.code == "draining" else "max_num_queued_reqs")
            await error_response(error, scope)(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        finally:
            self._door.leave()


class BodyLimit:
    """Refuses a body over the limit with 413 and reads no more of it, whether its length is announced or not."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdigit() and int(announced[:20]) > self._limit:
            await error_response(self._too_large(), scope)(scope, receive, send)
            return
        received = 0

        async def limited() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise self._too_large()
            return message

        await self._app(scope, limited, send)

    def _too_large(self) -> RequestError:
        return RequestError(413, f"The request body is larger than {self._limit} bytes.", code="request_too_large")


def handler_of(scope: Scope) -> str:
    """The route's template, so that nothing a client writes becomes a label."""
    path = getattr(scope.get("route"), "path", None)
    return path if isinstance(path, str) else "none"
