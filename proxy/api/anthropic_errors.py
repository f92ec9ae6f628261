"""Failures in the form that Anthropic's clients know, for the paths under /v1/messages."""

from __future__ import annotations

import json

from mesh.errors import RequestError

PATH = "/v1/messages"
OVERLOADED = 529
"""Anthropic's own status for a server that has too much to do."""
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}
"""Of every other status: `api_error`."""


def speaks_anthropic(path: str) -> bool:
    return path == PATH or path.startswith(PATH + "/")


def anthropic_status(error: RequestError) -> int:
    return OVERLOADED if error.code == "overloaded" else error.status


def anthropic_error_object(error: RequestError, message: str, request_id: str) -> bytes:
    """`message`: the error's, bounded. A server that says when to come back is overloaded, whatever keeps it."""
    kind = TYPES.get(anthropic_status(error), "api_error")
    if error.status == 503 and error.retry_after is not None:
        kind = "overloaded_error"
    fields = {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
    return json.dumps(fields).encode()
