"""One HTTP connection at the socket: uvicorn's protocols, with what a public door needs beside them.

    first bytes ──▶ httptools ──asks for another protocol (h2c), or speaks HTTP/1.0──▶ h11, for the connection's life

httptools is the fast one, but gives up a request's body as soon as the client offers to upgrade, which every Java
client does with every request; and it frames an answer to HTTP/1.0 in chunks, which that version does not know. h11
reads both as they are meant: an offer that nobody takes up changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from typing import Any
from weakref import WeakKeyDictionary

import h11
import httptools
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from mesh.errors import RequestError
from proxy.api.answer import PIPE
from proxy.api.errors import error_object

logger = logging.getLogger(__name__)

HEAD_TIMEOUT_S = 60.0
"""A connection that asks for nothing holds a place that others need; as long as a body may take."""
MAX_HEAD_BYTES = 64 << 10
"""Of an unfinished request line and headers; h11's own limit."""
STALLED_S = 60.0
"""A client that reads nothing for so long, with an answer waiting, is gone."""


class Guarded(asyncio.Protocol, ABC):
    """What uvicorn's protocols have in common here: bounds in time and size, and errors as everywhere else."""

    transport: asyncio.Transport
    loop: asyncio.AbstractEventLoop
    cycle: Any
    """The last request of the connection, or None."""
    _head_timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_here()
        self._client_reads()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self.in_head or self.transport.get_protocol() is not self or self.transport.is_closing():
            self._head_is_here()
            return
        self._await_head()
        self._head_bytes += len(data)
        if self._head_bytes > MAX_HEAD_BYTES:
            self.send_400_response("The request's head is too large.")

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._client_reads()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP request, in uvicorn's place."""
        if not (self._under_way and self.cycle.response_started):  # not into the middle of another answer
            body = error_object(RequestError(400, msg))
            head = b"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        self.transport.close()

    @property
    @abstractmethod
    def in_head(self) -> bool:
        """The client has sent something, but no complete head of a request."""

    @property
    def _under_way(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self._under_way:  # the head of a request that follows the one being answered
            self._await_head()
        else:
            self.transport.close()

    def _head_is_here(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _client_reads(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def _watch(self, unread: int) -> None:
        self._stall_timer = self.loop.call_later(STALLED_S, self._stalled, unread)

    def _stalled(self, unread: int) -> None:
        """`unread`: bytes that waited for the client the last time; nobody adds to them meanwhile."""
        now = self.transport.get_write_buffer_size()
        if now < unread:
            self._watch(now)
            return
        logger.info("a client has read nothing for %.0f s", STALLED_S)
        self.transport.abort()


class PatientConnection(Guarded, H11Protocol):
    """For clients that httptools does not serve well."""

    @property
    def in_head(self) -> bool:
        return self.conn.their_state is h11.IDLE

    def _unsupported_upgrade_warning(self) -> None:
        """An offer that is not taken up is no event."""


class Outbox:
    """What one turn of the event loop writes, to all clients, one write right after the other: between tokens a client
    would fall asleep again, and every write would pay for waking it."""

    def __init__(self) -> None:
        self._parts: list[tuple[asyncio.Transport, bytes]] = []

    def put(self, transport: asyncio.Transport, part: bytes) -> None:
        """Written before any task runs that what happens from now on wakes."""
        if not self._parts:
            asyncio.get_running_loop().call_soon(self._flush)
        self._parts.append((transport, part))

    def _flush(self) -> None:
        parts, self._parts = self._parts, []
        for transport, part in parts:
            if not transport.is_closing():
                transport.write(part)


OUTBOXES: WeakKeyDictionary[asyncio.AbstractEventLoop, Outbox] = WeakKeyDictionary()
"""Of each event loop."""


class Pipe:
    """Writes parts of one answer beside the coroutine `send`, which costs as much as all else of a token."""

    __slots__ = ("_cycle", "_outbox")

    def __init__(self, cycle: RequestResponseCycle, outbox: Outbox) -> None:
        self._cycle = cycle
        self._outbox = outbox

    @property
    def ready(self) -> bool:
        """The answer has begun, its client is there and reads."""
        cycle = self._cycle
        return bool(cycle.chunked_encoding) and not (cycle.flow.write_paused or cycle.disconnected)

    def write(self, part: bytes) -> None:
        """While `ready`; the last part goes by `send`."""
        self._outbox.put(self._cycle.transport, b"%x\r\n%b\r\n" % (len(part), part))


class FastProtocol(HttpToolsProtocol):
    """httptools, until a request comes that h11 has to read."""

    _begun = False
    _deaf = False
    _in_head = True
    _outbox: Outbox

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._outbox = OUTBOXES.setdefault(self.loop, Outbox())
        super().connection_made(transport)

    def on_message_begin(self) -> None:
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()
        if self.cycle is not None:
            scope: dict[str, Any] = self.cycle.scope  # type: ignore[assignment]
            scope[PIPE] = Pipe(self.cycle, self._outbox)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        begun, self._begun = self._begun, True
        if not begun and data.partition(b"\r\n")[0].endswith(b" HTTP/1.0"):
            self._hand_over(data)
            return
        self._unset_keepalive_if_required()
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            self._hand_over(self._head() + data[offer.args[0] :])
        except httptools.HttpParserError:
            self.send_400_response("The request is not valid HTTP.")

    def _should_upgrade(self) -> bool:
        """True keeps uvicorn from serving the request without its body."""
        return True

    def _head(self) -> bytes:
        """The request's head, as it was parsed."""
        line = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        return line + b"".join([b"%s: %s\r\n" % header for header in self.headers]) + b"\r\n"

    def _hand_over(self, data: bytes) -> None:
        """Lets h11 serve the connection from `data` on."""
        if self.cycle is not None and not self.cycle.response_complete:
            # Sent before the last answer was there: the connection ends with that answer, and the client asks again.
            self.cycle.keep_alive = False
            self._deaf = True
            return
        self.connections.discard(self)
        heir = PatientConnection(
            config=self.config, server_state=self.server_state, app_state=self.app_state, _loop=self.loop
        )
        self.transport.set_protocol(heir)
        heir.connection_made(self.transport)
        heir.data_received(data)


class HttpConnection(Guarded, FastProtocol):
    """What uvicorn serves the API with."""

    @property
    def in_head(self) -> bool:
        return self._in_head
