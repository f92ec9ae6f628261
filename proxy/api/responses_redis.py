"""Responses in Redis: any proxy goes on from what another one answered.

    kvmesh:response:<id>          the record as JSON; expires
    kvmesh:response:<id>:cancel   somebody wants it cancelled; expires

No call waits for long, and none is tried twice: a Redis that is away is a clear 503 where the state is needed.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Sequence
from typing import Any, TypeVar

import redis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from mesh.errors import EXIT_STORE, RequestError, StartupError
from mesh.logs import redact
from proxy.api.responses_store import Record, packed, unpacked

log = logging.getLogger(__name__)

TIMEOUT_S = 1.0
"""A Redis that is well answers in a millisecond; a client is waiting."""
CONNECTIONS = 32
"""Each is one call at a time; more than these wait for a place, within the time-out."""
RETRY_AFTER_S = 2

T = TypeVar("T")


class RedisStore:
    """`ResponseStore` for proxies that share a Redis."""

    shared = True

    def __init__(self, url: str, ttl_s: int) -> None:
        """Raises `StartupError` for a URL that means nothing; connects with the first call."""
        self._ttl_s = ttl_s
        self._healthy = True
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=CONNECTIONS,
                timeout=TIMEOUT_S,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                retry=Retry(NoBackoff(), 0),
                retry_on_error=[],
                protocol=2,
            )
        except ValueError as error:
            raise StartupError(f"{redact(url)!r} is no Redis URL: {error}", EXIT_STORE) from None
        self._client: Any = Redis.from_pool(pool)

    async def put(self, record: Record, *, new: bool) -> None:
        data = packed(record)
        await self._done(self._client.set(_key(record.id), data, ex=self._ttl_s, xx=not new))

    async def get(self, id: str) -> Record | None:
        data: bytes | None = await self._done(self._client.get(_key(id)))
        return None if data is None else unpacked(data)

    async def delete(self, id: str) -> bool:
        count: int = await self._done(self._client.delete(_key(id)))
        return count > 0

    async def ask_cancel(self, id: str) -> None:
        await self._done(self._client.set(_cancel_key(id), b"1", ex=self._ttl_s))

    async def cancels_asked(self, ids: Sequence[str]) -> list[str]:
        found: list[bytes | None] = await self._done(self._client.mget([_cancel_key(id) for id in ids]))
        return [id for id, note in zip(ids, found, strict=True) if note is not None]

    async def close(self) -> None:
        await self._client.aclose()

    async def _done(self, call: Awaitable[T]) -> T:
        try:
            result = await call
        except (redis.RedisError, OSError, TimeoutError) as error:
            if self._healthy:
                log.warning("the store of responses does not answer: %s", redact(str(error)))
            self._healthy = False
            raise RequestError(
                503,
                "The store of responses does not answer. Please try again shortly.",
                type="server_error",
                code="store_unavailable",
                retry_after=RETRY_AFTER_S,
            ) from None
        self._healthy = True
        return result


def _key(id: str) -> str:
    return f"kvmesh:response:{id}"


def _cancel_key(id: str) -> str:
    return f"kvmesh:response:{id}:cancel"
