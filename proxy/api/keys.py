"""API keys: who may use the proxy, where the operator has given any, and for which tenant a request is served."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from time import monotonic

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mesh.errors import RequestError
from proxy.api import tenants
from proxy.api.errors import error_response
from proxy.api.tenants import Tenant

OPEN_PATHS = frozenset({"/health", "/ready"})
"""What load balancers ask, who have no key."""
HEADERS = ("x-api-key", "api-key")
"""Of Anthropic's clients and Azure's; OpenAI's send `Authorization: Bearer`."""


class Keys:
    """A middleware that lets only requests with a key of one of `known` through; without tenants, all."""

    def __init__(self, app: ASGIApp, known: Sequence[Tenant]) -> None:
        self._app = app
        # found by their digests, for which nobody can guess his way to a key from how long it takes
        self._tenants = {_digest(key): tenant for tenant in known for key in tenant.keys}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._tenants or scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        tenant = self._tenants.get(_digest(_given(Headers(scope=scope))))
        if tenant is None:
            error = RequestError(401, "A valid API key is needed.", code="invalid_api_key")
            await error_response(error, scope, {"www-authenticate": "Bearer"})(scope, receive, send)
            return

        async def with_quota(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in tenant.quota.headers(monotonic()):
                    headers[name] = value
            await send(message)

        outer = tenants.current.set(tenant)
        try:
            await self._app(scope, receive, with_quota)
        finally:
            tenants.current.reset(outer)


def _given(headers: Headers) -> str:
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return token.strip()
    return next((headers[name] for name in HEADERS if name in headers), "")


def _digest(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogateescape")).digest()
