"""API keys: who may use the proxy, where the operator has given any."""

from __future__ import annotations

import hmac
from collections.abc import Sequence
from hashlib import sha256

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from mesh.errors import RequestError
from proxy.api.errors import error_response

OPEN_PATHS = frozenset({"/health", "/ready"})
"""What load balancers ask, who have no key."""
HEADERS = ("x-api-key", "api-key")
"""Of Anthropic's clients and Azure's; OpenAI's send `Authorization: Bearer`."""


class Keys:
    """A middleware that lets only requests with one of `keys` through; without keys, all."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._digests = tuple(_digest(key) for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        closed = self._digests and scope["type"] == "http" and scope["path"] not in OPEN_PATHS
        if closed and not self._accepts(Headers(scope=scope)):
            error = RequestError(401, "A valid API key is needed.", code="invalid_api_key")
            await error_response(error, scope, {"www-authenticate": "Bearer"})(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _accepts(self, headers: Headers) -> bool:
        """Every digest is compared whatever the others say, in time that does not depend on where they differ."""
        given = _digest(_given(headers))
        return any([hmac.compare_digest(given, digest) for digest in self._digests])


def _given(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return next((headers[name] for name in HEADERS if name in headers), "")


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
