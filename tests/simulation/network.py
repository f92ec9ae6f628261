"""Connections between simulated processes, and all that goes wrong on them.

A connection keeps order and loses nothing while it lives, as TCP does; what is under way when it breaks is lost. The KV
protocol claims more (frames lost, repeated, overtaken, damaged), so on its connections that happens too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import zmq

from kvtransfer.integrity import unseal
from mesh import wire
from mesh.errors import BadFrame
from mesh.messages import Peer, Register, TokenBatch
from tests.simulation.faults import Fate, Faults
from tests.simulation.host import Host
from tests.simulation.oracle import Violation
from tests.simulation.sockets import Connection, Lane, VirtualSocket
from tests.simulation.timeline import Timeline

LATENCY_S = 0.001
RETRY_S = 0.05
SILENT_END_S = 5.0
"""A peer that ends without a word is found by ZeroMQ's heartbeat, on connections that have one."""


@dataclass(slots=True, eq=False)
class Network:
    """All sockets, all connections."""

    timeline: Timeline
    faults: Faults
    bound: dict[str, VirtualSocket] = field(default_factory=dict)
    connections: list[Connection] = field(default_factory=list)
    history: list[str] | None = None
    blocked: dict[tuple[str, str], float] = field(default_factory=dict)
    """(from, to): until when nothing arrives."""
    damaged: set[bytes] = field(default_factory=set)
    """Frames that nobody may believe."""
    _dials: dict[str, int] = field(default_factory=dict)

    def open(self, host: Host, kind: int) -> VirtualSocket:
        return VirtualSocket(self, host, kind)

    def bind(self, socket: VirtualSocket) -> None:
        self.bound[socket.address] = socket

    def dial(self, dealer: VirtualSocket) -> None:
        """Connects as soon as somebody listens, again and again."""

        def attempt() -> None:
            if dealer.closed or not dealer.host.alive or dealer.connection is not None:
                return
            router = self.bound.get(dealer.address)
            if router is None or self._is_blocked(dealer.host, router.host):
                dealer.tell(zmq.EVENT_CONNECT_RETRIED)
                self.timeline.after(RETRY_S, attempt)
            else:
                self._join(dealer, router)

        self.timeline.after(LATENCY_S, attempt)

    def _join(self, dealer: VirtualSocket, router: VirtualSocket) -> None:
        kind = "control" if router.host.name.startswith("proxy") else "kv"
        pair = f"{dealer.host.name}-{router.host.name}/{kind}"
        number = self._dials[pair] = self._dials.get(pair, 0) + 1
        forth = Lane(f"{pair}.{number}>", dealer.host, router)
        back = Lane(f"{pair}.{number}<", router.host, dealer)
        connection = Connection(kind, f"{pair}.{number}".encode(), dealer, router, forth, back)
        self.connections.append(connection)
        router.peers[connection.identity] = connection
        dealer.connected(connection)

    def _is_blocked(self, one: Host, other: Host) -> bool:
        now = self.timeline.now
        return any(self.blocked.get(pair, 0.0) > now for pair in ((one.name, other.name), (other.name, one.name)))

    def carry(self, connection: Connection, lane: Lane, parts: list[bytes]) -> None:
        """One message on its way."""
        if connection.ends_at is not None:
            return
        if connection.kind == "control" and lane is connection.forth and not lane.count:
            self._must_introduce(lane, parts)
        fate = self.faults.fate(connection.kind, lane.key, lane.salt, lane.count)
        if self.history is not None:
            self._note(lane, parts, fate)
        lane.count += 1
        arrives = self.timeline.now + LATENCY_S + lane.source.slow_s + lane.target.host.slow_s
        if fate is not None and fate.kind == "delay":
            arrives += fate.seconds
        arrives = max(arrives, self.blocked.get((lane.source.name, lane.target.host.name), 0.0), lane.free_at)
        if fate is None:
            lane.free_at = arrives
            self.timeline.at(arrives, lambda: self._arrive(connection, lane, parts))
            return
        if fate.kind == "cut":
            self.end(connection, delay=0.0, lossy=True)
            return
        if fate.kind == "lose":
            return
        if fate.kind in ("flip", "truncate"):
            whole, parts = parts, _damaged(parts, fate)
            self.damaged.update(parts[:1] if parts[0] != whole[0] else ())
        if fate.kind != "overtake":
            lane.free_at = arrives
        for copy in range(2 if fate.kind == "repeat" else 1):
            when = arrives + (fate.seconds if fate.kind == "overtake" or copy else 0.0)
            self.timeline.at(when, lambda: self._arrive(connection, lane, parts))

    def _must_introduce(self, lane: Lane, parts: list[bytes]) -> None:
        """A proxy does not know whose new connection this is, and loses all that comes before it does."""
        message = wire.decode(parts[0]).message
        if not isinstance(message, Register):
            raise Violation(f"{lane.source.name} begins a connection with {type(message).__name__}")

    def _note(self, lane: Lane, parts: list[bytes], fate: Fate | None) -> None:
        assert self.history is not None
        what = describe(parts[0])
        if fate is not None or not what.startswith(("Beat", "ProxyBeat", "Renew", "Standing", "BlockEvents")):
            fate_text = f"   !! {fate.kind} {fate.seconds:.3f}" if fate is not None else ""
            self.history.append(f"{self.timeline.now:9.4f}  {lane.key}{lane.count} {what}{fate_text}")

    def _arrive(self, connection: Connection, lane: Lane, parts: list[bytes]) -> None:
        target = lane.target
        if not connection.open or target.closed or not target.host.alive:
            return
        target.inbox.append([connection.identity, *parts] if lane is connection.forth else parts)
        target.host.wake()

    def unplug(self, socket: VirtualSocket) -> None:
        """A socket is closed by its process: what it has sent still arrives, then the peer hears of the end."""
        if self.bound.get(socket.address) is socket:
            del self.bound[socket.address]
        for connection in self.connections[:]:
            if socket in (connection.dealer, connection.router):
                self.end(connection, delay=LATENCY_S, lossy=False)

    def crash(self, host: Host, *, silent: bool) -> None:
        """A process is gone. `silent`: with its machine, so that nobody is told."""
        for address, socket in list(self.bound.items()):
            if socket.host is host:
                del self.bound[address]
        for connection in self.connections[:]:
            if host in (connection.dealer.host, connection.router.host):
                self.end(connection, delay=SILENT_END_S if silent else LATENCY_S, lossy=silent)

    def cut(self, one: str, other: str, kind: str = "") -> None:
        for connection in self.connections[:]:
            if connection.joins(one, other) and kind in ("", connection.kind):
                self.end(connection, delay=0.0, lossy=True)

    def end(self, connection: Connection, *, delay: float, lossy: bool) -> None:
        """The connection breaks. `lossy`: what is under way is lost."""
        if connection.ends_at is not None:
            return
        if lossy:
            connection.open = False
        last = self.timeline.now if lossy else max(connection.forth.free_at, connection.back.free_at)
        connection.ends_at = max(self.timeline.now, last) + delay
        self.timeline.at(connection.ends_at, lambda: self._ended(connection))

    def _ended(self, connection: Connection) -> None:
        connection.open = False
        self.connections.remove(connection)
        router, dealer = connection.router, connection.dealer
        if router.peers.pop(connection.identity, None) is not None and not router.closed:
            router.tell(zmq.EVENT_DISCONNECTED)
        if dealer.connection is connection:
            dealer.connection = None
            if not dealer.closed and dealer.host.alive:
                dealer.tell(zmq.EVENT_DISCONNECTED)
                self.dial(dealer)


def _damaged(parts: list[bytes], fate: Fate) -> list[bytes]:
    """The message with the bytes that its fate leaves it."""
    which = fate.number % len(parts)
    data = bytearray(parts[which])
    if not data:
        return parts
    at = (fate.number >> 8) % len(data)
    if fate.kind == "flip":
        data[at] ^= 1 << (fate.number % 8)
    else:
        del data[at:]
    return [*parts[:which], bytes(data), *parts[which + 1 :]]


def describe(frame: bytes) -> str:
    """A message in short, for a history."""
    try:
        envelope = wire.decode(frame)
    except BadFrame:
        try:
            envelope = unseal(frame)
        except BadFrame:
            return f"{len(frame)} bytes"
    message = envelope.message
    text = type(message).__name__
    if isinstance(message, TokenBatch):
        return text + "".join(f" {d.request_id}#{d.attempt}[{d.index}]={d.finish or d.tokens}" for d in message.deltas)
    for name in ("request_id", "stream", "attempt", "code", "reason", "source"):
        value = getattr(message, name, None)
        if isinstance(value, (str, int)):
            text += f" {value}"
        elif isinstance(value, Peer):
            text += f" from {value.worker_id}"
    return text
