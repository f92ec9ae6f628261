"""The connections to the proxies: register, stay registered, deliver tokens in order, notice a silent proxy.

A link's life:

    dialled ──connected──▶ Register sent ──Welcome──▶ registered ──lease lapsed / another proxy answers──▶ lost
       ▲                        ▲ (repeated until Welcome)                                                  │
       └────────────────────────┴───────────────────────────────────────────────────────────────────────────┘

ZeroMQ dials again where a connection ended, but not where it got something that is no ZMTP or does not decrypt: such a
socket stays deaf for ever, and some still send. So a link that has no connection for a while opens another socket, and
one that cannot read what comes does at once.

Each `Register` without an answer is followed by one in the version of the protocol before, and after the lowest by the
highest again: an older proxy cannot say that it did not understand.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from mesh import wire
from mesh.curve import HANDSHAKE_FAILED, check_address, dial, is_ipc
from mesh.errors import BadFrame
from mesh.heartbeats import set_heartbeats
from mesh.keys import Keys
from mesh.messages import OtherVersions, ProxyBeat, Register, Welcome, WorkerInfo
from mesh.wire import CONTROL, Versions

log = logging.getLogger(__name__)

REGISTER_EVERY_S = 0.5
"""Until a `Welcome` comes; a proxy that starts later than its workers is found within this."""
RECONNECT_MS = 50
RECONNECT_MAX_MS = 1000
REDIAL_S = 2.5
"""Without a connection, before another socket is opened: more than a handshake may take."""
SEND_QUEUE = 10_000
"""Messages libzmq holds for a proxy that reads slowly; the link's own outbox takes over above it."""
WATCHED = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_SUCCEEDED | HANDSHAKE_FAILED
OUTBOX_LIMIT = 100_000
"""Messages kept for a stalled proxy before the link counts as lost; each is one step's tokens."""


class ProxyLink:
    """One proxy as this worker sees it; used by the I/O thread only. Its `socket` and `monitor` change."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        address: str,
        info: WorkerInfo,
        keys: Keys | None = None,
    ) -> None:
        """Raises `StartupError` for an address that would leave this machine without `keys`."""
        check_address("--proxy", address, keys)
        self.address = address
        self.proxy_id = ""
        self._context = context
        self._keys = keys
        self._info = info
        self._forgotten = 0
        self._lease_s = 0.0
        self._heard = 0.0
        self._next_register = 0.0
        self._version = CONTROL.highest
        """That this proxy answered in."""
        self._tried = CONTROL.highest
        """For the next `Register`."""
        self._warned = False
        self._outbox: deque[bytes] = deque()
        self._connected = False
        self._complained = False
        """Of a proxy that ends every handshake, once."""
        self._redial_at = math.inf
        self.socket, self.monitor = self._dial()

    def _dial(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        """A socket that connects to the proxy, and its monitor."""
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.LINGER, 200)
        socket.setsockopt(zmq.SNDHWM, SEND_QUEUE)
        socket.setsockopt(zmq.IMMEDIATE, 1)
        socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
        set_heartbeats(socket)
        if self._keys is not None and not is_ipc(self.address):
            dial(socket, self._keys, self._keys.proxy)
        monitor = socket.get_monitor_socket(WATCHED)
        socket.connect(self.address)
        return socket, monitor

    @property
    def registered(self) -> bool:
        return self.proxy_id != ""

    def close(self) -> None:
        self._hang_up()

    def _hang_up(self) -> None:
        self.socket.disable_monitor()
        self.monitor.close(0)
        self.socket.close()

    def send(self, message: Any) -> None:
        """Queues a message; `flush` hands it on. Nothing is ever dropped while the link is registered."""
        self._outbox.append(wire.encode(message, self._info.incarnation, version=self._version))

    def flush(self) -> None:
        while self._outbox:
            try:
                self.socket.send(self._outbox[0], zmq.NOBLOCK)
            except zmq.Again:
                return
            self._outbox.popleft()

    def receive(self) -> Iterator[wire.Envelope]:
        """All messages that wait, the link's own (`Welcome`, `ProxyBeat`) included, without blocking."""
        while True:
            try:
                frame = self.socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                envelope = wire.decode(frame)
            except BadFrame as error:
                log.warning("proxy %s sent a bad frame: %s", self.address, error)
                continue
            if isinstance(envelope.message, OtherVersions):
                self._not_understood(envelope.message.control)
                continue
            if isinstance(envelope.message, Welcome):
                self._version = self._tried = envelope.version
            yield envelope

    def _not_understood(self, spoken: Versions) -> None:
        """The proxy speaks other versions than that of the last `Register`."""
        common = CONTROL.common(spoken)
        if common is not None:
            self._tried = common
        elif not self._warned:
            self._warned = True
            log.error("proxy %s speaks control protocol %s and this worker %s", self.address, spoken, CONTROL)

    def heard(self, message: Welcome | ProxyBeat, now: float) -> bool:
        """Notes a sign of life. True: this is a proxy process that the link did not know before."""
        if isinstance(message, Welcome):
            new = message.proxy_id != self.proxy_id
            self.proxy_id = message.proxy_id
            self._lease_s = message.lease_s
            self._heard = now
            return new
        if message.proxy_id == self.proxy_id:
            self._heard = now
        elif self.registered:  # another process answers at this address and does not know us
            self.proxy_id = ""
            self._outbox.clear()
            self._next_register = now
        return False

    def reconnected(self, now: float) -> None:
        """Reads the socket monitor: on a new connection the worker introduces itself again."""
        while self.monitor.poll(0):
            event = recv_monitor_message(self.monitor)["event"]
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected = True
                self._complained = False
                self._redial_at = math.inf
                self._tried = CONTROL.highest
                self._register(now)
            elif self._connected and event & HANDSHAKE_FAILED:
                log.warning("what proxy %s sends cannot be read; dialling again", self.address)
                self._connected = False
                self._redial_at = now
            else:
                if event & HANDSHAKE_FAILED and not self._complained:
                    self._complained = True
                    log.warning("proxy %s and this worker do not know each other's keys", self.address)
                self._connected = False
                self._redial_at = min(self._redial_at, now + REDIAL_S)

    def tick(self, now: float) -> bool:
        """Dials again where that is due, and repeats `Register` while unknown. True: the proxy's lease just lapsed and
        the link is lost."""
        if now >= self._redial_at:
            self._redial_at = now + REDIAL_S
            self._hang_up()
            self.socket, self.monitor = self._dial()
        if not self.registered:
            if now >= self._next_register:
                self._register(now)
            return False
        if now - self._heard <= self._lease_s and len(self._outbox) <= OUTBOX_LIMIT:
            return False
        log.warning("proxy %s is silent; freeing what it asked for", self.address)
        self.proxy_id = ""
        self._forgotten += 1
        self._outbox.clear()
        return True

    def _register(self, now: float) -> None:
        self._next_register = now + REGISTER_EVERY_S
        register = Register(self._info, self._forgotten)
        try:
            self.socket.send(wire.encode(register, self._info.incarnation, version=self._tried), zmq.NOBLOCK)
        except zmq.Again:
            return
        self._tried = self._tried - 1 if self._tried > CONTROL.lowest else CONTROL.highest
