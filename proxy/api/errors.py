"""Every failure as the error object that OpenAI's clients know: four keys, always all of them. Paths that other clients
call have theirs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence

from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import Scope

from mesh.errors import SERVER_ERROR, RequestError
from proxy.api import requestid
from proxy.api.anthropic_errors import anthropic_error_object, anthropic_status, speaks_anthropic

MAX_MESSAGE_CHARS = 2000
"""An error never costs more to send than to provoke."""
MAX_ERRORS = 10
MAX_PARAM_CHARS = 200


def unsupported(param: str, detail: str = "") -> RequestError:
    """A parameter that would change the output and is not served."""
    message = f"The parameter {param} is not supported by this server{': ' + detail if detail else ''}."
    return RequestError(400, message, code="unsupported_parameter", param=param)


def error_object(error: RequestError) -> bytes:
    """`{"error": {message, type, param, code}}`."""
    kind = error.type
    if error.status >= 500 and kind == "invalid_request_error":
        kind = SERVER_ERROR
    param = None if error.param is None else error.param[:MAX_PARAM_CHARS]
    fields = {"message": bounded(error.message), "type": kind, "param": param, "code": error.code}
    return json.dumps({"error": fields}).encode()


def bounded(message: str) -> str:
    return message if len(message) <= MAX_MESSAGE_CHARS else message[: MAX_MESSAGE_CHARS - 1] + "…"


def error_headers(error: RequestError) -> dict[str, str]:
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
        headers["retry-after-ms"] = str(math.ceil(error.retry_after * 1000))
    if error.code in ("draining", "request_too_large") or error.status == 408:
        # Draining: the next request belongs to another proxy. Else: the rest of the body is not read.
        headers["connection"] = "close"
    return headers


def error_response(error: RequestError, scope: Scope, headers: Mapping[str, str] | None = None) -> Response:
    """In the form of the path that was asked for."""
    content = error_object(error)
    status = error.status
    if speaks_anthropic(scope["path"]):
        content = anthropic_error_object(error, bounded(error.message), scope[requestid.KEY])
        status = anthropic_status(error)
    return Response(
        content,
        status_code=status,
        headers={**error_headers(error), **(headers or {})},
        media_type="application/json",
    )


def validation_error(error: ValidationError) -> RequestError:
    """400 that names the first wrong field in `param` and up to `MAX_ERRORS` in the message."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [f"{dotted(e['loc'])}: {e['msg'][:200]}" for e in found[:MAX_ERRORS]]
    if len(found) > MAX_ERRORS:
        lines.append(f"and {len(found) - MAX_ERRORS} more")
    return RequestError(400, "; ".join(lines), param=dotted(found[0]["loc"]) or None)


def dotted(path: Sequence[int | str]) -> str:
    """`messages.0.content`, bounded: keys may be the client's."""
    return ".".join(str(part)[:80] for part in path)[:MAX_PARAM_CHARS]


def install_error_handlers(app: FastAPI) -> None:
    """Every refusal leaves `app` as an error object; unexpected exceptions are the outer middleware's."""

    async def on_request_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        return error_response(error, request.scope)

    async def on_http_exception(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        path = request.url.path[:100]
        sentences = {
            404: f"Unknown request URL: {request.method} {path}.",
            405: f"Method {request.method} is not allowed for {path}.",
        }
        message = sentences.get(error.status_code, "The request was refused.")
        return error_response(RequestError(error.status_code, message), request.scope, error.headers)

    app.add_exception_handler(RequestError, on_request_error)
    app.add_exception_handler(HTTPException, on_http_exception)
