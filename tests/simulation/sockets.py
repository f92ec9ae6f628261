"""ZeroMQ as production's sockets use it, in memory: DEALER, ROUTER and their monitors."""

from __future__ import annotations

import errno
import struct
import zlib
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import zmq

from tests.simulation.host import Host

EVENT = struct.Struct("=hi")
MORE_FOLLOWS = (zmq.SNDMORE, zmq.SNDMORE | zmq.NOBLOCK)
"""Of a frame that is not its message's last; compared as a whole, since ZeroMQ's flags are slow to take apart."""


class TryAgain(zmq.Again):
    """Nothing waits, or nobody is there. Raised in every turn of every loop, so it asks ZeroMQ for no text."""

    errno = errno.EAGAIN

    def __init__(self) -> None:
        """The number is all that production looks at."""


class Frame:
    """A received frame that was not copied."""

    __slots__ = ("buffer",)

    def __init__(self, data: bytes) -> None:
        self.buffer = memoryview(data)


class VirtualMonitor:
    """Tells what happens to a socket's connections."""

    def __init__(self, events: int) -> None:
        self.events = events
        self.inbox: deque[list[bytes]] = deque()
        self.closed = False

    def tell(self, event: int) -> None:
        if event & self.events and not self.closed:
            self.inbox.append([EVENT.pack(event, 0), b""])

    def poll(self, timeout: int) -> int:
        return len(self.inbox)

    def recv_multipart(self, flags: int = 0) -> list[bytes]:
        if not self.inbox:
            raise TryAgain
        return self.inbox.popleft()

    def close(self, linger: int | None = None) -> None:
        self.closed = True
        self.inbox.clear()


class Carrier(Protocol):
    """What sockets ask of the network."""

    def open(self, host: Host, kind: int) -> VirtualSocket: ...

    def bind(self, socket: VirtualSocket) -> None: ...

    def dial(self, dealer: VirtualSocket) -> None: ...

    def unplug(self, socket: VirtualSocket) -> None: ...

    def carry(self, connection: Connection, lane: Lane, parts: list[bytes]) -> None: ...


@dataclass(slots=True, eq=False)
class Lane:
    """One direction of a connection."""

    key: str
    source: Host
    target: VirtualSocket
    salt: int = 0
    count: int = 0
    free_at: float = 0.0
    """Nothing sent later arrives earlier."""

    def __post_init__(self) -> None:
        self.salt = zlib.crc32(self.key.encode())


@dataclass(slots=True, eq=False)
class Connection:
    """A DEALER's connection to a ROUTER, from its handshake to its end."""

    kind: str
    """`kv` or `control`."""
    identity: bytes
    dealer: VirtualSocket
    router: VirtualSocket
    forth: Lane
    back: Lane
    open: bool = True
    ends_at: float | None = None

    def joins(self, one: str, other: str) -> bool:
        return {self.dealer.host.name, self.router.host.name} == {one, other}


class VirtualSocket:
    """A DEALER or a ROUTER of one process. Options that shape nothing here are taken and forgotten."""

    def __init__(self, network: Carrier, host: Host, kind: int) -> None:
        self.network = network
        self.host = host
        self.kind = kind
        self.closed = False
        self.address = ""
        self.inbox: deque[list[bytes]] = deque()
        self.monitor: VirtualMonitor | None = None
        self.connection: Connection | None = None
        """Of a DEALER."""
        self.peers: dict[bytes, Connection] = {}
        """Of a ROUTER, by routing id."""
        self._options: dict[int, Any] = {}
        self._parts: list[bytes] = []
        self._early: deque[list[bytes]] = deque()
        """Sent before the first connection is there."""

    def setsockopt(self, option: int, value: Any) -> None:
        self._options[option] = value

    def getsockopt(self, option: int) -> int:
        return -1

    def getsockopt_string(self, option: int) -> str:
        return self.address

    def bind(self, address: str) -> None:
        self.address = address
        self.network.bind(self)

    def connect(self, address: str) -> None:
        self.address = address
        self.network.dial(self)

    def get_monitor_socket(self, events: int) -> VirtualMonitor:
        self.monitor = VirtualMonitor(events)
        return self.monitor

    def disable_monitor(self) -> None:
        """Its monitor is closed right after this."""

    def close(self, linger: int | None = None) -> None:
        if not self.closed:
            self.closed = True
            self.inbox.clear()
            self.network.unplug(self)

    def send(self, frame: Any, flags: int = 0, copy: bool = True) -> None:
        data = bytes(frame)
        if not self._parts:
            self._check(data)
        self._parts.append(data)
        if flags not in MORE_FOLLOWS:
            parts, self._parts = self._parts, []
            self._send(parts)

    def send_multipart(self, parts: Any, flags: int = 0) -> None:
        data = [bytes(part) for part in parts]
        self._check(data[0])
        self._send(data)

    def _check(self, first: bytes) -> None:
        if self.kind == zmq.ROUTER:
            if first not in self.peers:
                raise zmq.ZMQError(errno.EHOSTUNREACH)
        elif self.connection is None and self._options.get(zmq.IMMEDIATE):
            raise TryAgain

    def _send(self, parts: list[bytes]) -> None:
        if self.kind == zmq.ROUTER:
            connection = self.peers.get(parts[0])
            if connection is not None:
                self.network.carry(connection, connection.back, parts[1:])
        elif self.connection is not None:
            self.network.carry(self.connection, self.connection.forth, parts)
        else:
            self._early.append(parts)

    def connected(self, connection: Connection) -> None:
        """A DEALER's connection is there."""
        self.connection = connection
        self.tell(zmq.EVENT_HANDSHAKE_SUCCEEDED)
        while self._early:
            self._send(self._early.popleft())

    def tell(self, event: int) -> None:
        if self.monitor is not None:
            self.monitor.tell(event)
        self.host.wake()

    def recv(self, flags: int = 0) -> bytes:
        parts: list[bytes] = self.recv_multipart(flags)
        return parts[-1]

    def recv_multipart(self, flags: int = 0, copy: bool = True) -> Any:
        if not self.inbox:
            raise TryAgain
        parts = self.inbox.popleft()
        return parts if copy else [Frame(p) for p in parts]


class VirtualContext:
    """Opens the sockets of one process."""

    def __init__(self, network: Carrier, host: Host) -> None:
        self._network = network
        self._host = host

    def socket(self, kind: int) -> VirtualSocket:
        return self._network.open(self._host, kind)

    def term(self) -> None:
        """Nothing is left open."""


class VirtualPoller:
    """Says at once what can be read: the simulation runs the loop when something can, or when it is due."""

    def __init__(self) -> None:
        self._sockets: dict[Any, None] = {}

    def register(self, socket: Any, flags: int = zmq.POLLIN) -> None:
        self._sockets[socket] = None

    def unregister(self, socket: Any) -> None:
        self._sockets.pop(socket, None)

    def poll(self, timeout: int = 0) -> list[tuple[Any, int]]:
        return [(s, zmq.POLLIN) for s in self._sockets if s.inbox]
