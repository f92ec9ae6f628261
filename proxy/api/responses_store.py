"""Where responses are kept, so that a conversation can go on from one: in memory, or in Redis for all proxies.

A kept response has everything that a next one needs: the whole input, that of the responses before it included, and
the output. So no chain is followed, and deleting a response takes nothing from those after it.
"""

from __future__ import annotations

import json
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mesh.errors import RequestError
from proxy.api.responses_items import Item
from proxy.api.sse import compact

RESPONSE_ID = re.compile(r"resp_[0-9a-f]{48}")
MAX_RECORD_BYTES = 4 << 20
"""Far more than a context of a million tokens."""
MAX_RECORDS = 10_000
MAX_MEMORY_BYTES = 256 << 20
ALIVE = ("queued", "in_progress")
LOST_GRACE_S = 60.0
"""After its deadline a response in the background has ended, or the proxy that ran it has."""
UNFINISHED = RequestError(500, "The server could not finish this response.", type="server_error", code="response_lost")


@dataclass(frozen=True, slots=True)
class Record:
    """One response as it is kept."""

    response: dict[str, Any]
    input: list[Item]
    """All that the model was given, without the instructions: these are not carried over."""
    deadline: float = 0.0
    """Unix time by which one in the background has ended."""
    tenant: str = ""
    """Whose it is."""

    @property
    def id(self) -> str:
        return str(self.response["id"])

    @property
    def alive(self) -> bool:
        return self.response["status"] in ALIVE

    @property
    def conversation(self) -> list[Item]:
        return [*self.input, *self.response["output"]]


class ResponseStore(Protocol):
    """Every call may raise `RequestError` 503 when the store does not answer."""

    shared: bool
    """Other proxies see what is in it."""

    async def put(self, record: Record, *, new: bool) -> None:
        """Not `new`: only if it is still there, for it may have been deleted. Raises `RequestError` 400 for one that
        is too large."""

    async def get(self, id: str) -> Record | None: ...

    async def delete(self, id: str) -> bool:
        """Whether it was there."""

    async def ask_cancel(self, id: str) -> None:
        """For the proxy that runs it."""

    async def cancels_asked(self, ids: Sequence[str]) -> list[str]:
        """Those that somebody wants cancelled."""

    async def close(self) -> None: ...


def new_response_id() -> str:
    """Not to be guessed: who knows it may read the response."""
    return f"resp_{secrets.token_hex(24)}"


def packed(record: Record) -> bytes:
    """Raises `RequestError` 400 for one that is too large."""
    fields = {"response": record.response, "input": record.input, "deadline": record.deadline, "tenant": record.tenant}
    data = compact(fields).encode()
    if len(data) > MAX_RECORD_BYTES:
        raise RequestError(
            400,
            f"The conversation has more than {MAX_RECORD_BYTES} bytes and cannot be stored; send store: false.",
            code="conversation_too_large",
            param="store",
        )
    return data


def unpacked(data: bytes) -> Record | None:
    """None for what is no record: others may write to the store as well."""
    try:
        fields = json.loads(data)
        record = Record(fields["response"], fields["input"], float(fields["deadline"]), str(fields.get("tenant", "")))
        whole = isinstance(record.input, list) and isinstance(record.response["output"], list)
        return record if whole and record.response["id"] and record.response["status"] else None
    except (ValueError, KeyError, TypeError):
        return None


class MemoryStore:
    """For one proxy: the latest responses, as many as fit."""

    shared = False

    def __init__(
        self,
        ttl_s: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        max_records: int = MAX_RECORDS,
        max_bytes: int = MAX_MEMORY_BYTES,
    ) -> None:
        self._ttl_s = ttl_s
        self._clock = clock
        self._max_records = max_records
        self._max_bytes = max_bytes
        self._records: OrderedDict[str, tuple[float, bytes]] = OrderedDict()
        """When each expires, and what it is; the oldest first."""
        self._bytes = 0

    async def put(self, record: Record, *, new: bool) -> None:
        data = packed(record)
        self._expire()
        if not new and record.id not in self._records:
            return
        self._drop(record.id)
        self._records[record.id] = (self._clock() + self._ttl_s, data)
        self._bytes += len(data)
        while len(self._records) > self._max_records or self._bytes > self._max_bytes:
            self._drop(next(iter(self._records)))

    async def get(self, id: str) -> Record | None:
        self._expire()
        found = self._records.get(id)
        return None if found is None else unpacked(found[1])

    async def delete(self, id: str) -> bool:
        self._expire()
        return self._drop(id)

    async def ask_cancel(self, id: str) -> None:
        """Whoever runs it is this proxy."""

    async def cancels_asked(self, ids: Sequence[str]) -> list[str]:
        return []

    async def close(self) -> None:
        self._records.clear()
        self._bytes = 0

    def _expire(self) -> None:
        now = self._clock()
        while self._records and next(iter(self._records.values()))[0] <= now:
            self._drop(next(iter(self._records)))

    def _drop(self, id: str) -> bool:
        found = self._records.pop(id, None)
        if found is not None:
            self._bytes -= len(found[1])
        return found is not None
