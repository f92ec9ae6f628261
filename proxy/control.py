"""The socket that workers dial: who is on which connection, what they say, when they are gone.

One ROUTER for all workers, read in batches from the event loop (an `await` per message would cost twenty
times as much). A connection's name is chosen by the other side and means nothing; a connection becomes a
worker by `Register`, and from then on every message on it must carry that worker's incarnation.

A worker's end is noticed in three ways: its process ends (watched by the kernel, for workers of this machine:
within a millisecond), it says goodbye, or its step loop is silent (`WorkerPool.overdue`).
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
from typing import Any, Protocol

import zmq

from mesh import wire
from mesh.curve import Authenticator, check_address, is_ipc, serve
from mesh.errors import EXIT_PORT, BadFrame, StartupError
from mesh.heartbeats import set_heartbeats
from mesh.keys import Keys
from mesh.messages import OtherVersions, ProxyBeat, Register, Welcome, WorkerInfo
from mesh.wire import CONTROL
from proxy.routing.place import Place

log = logging.getLogger(__name__)

LEASE_S = 10.0
"""A worker frees what it holds for a proxy it has not heard for so long: four beats may be lost."""
BEAT_S = 2.0
DRAIN_MESSAGES = 256
"""Read at one go; then the event loop's other tasks get their turn."""
QUEUED_PER_WORKER = 100_000
"""Messages for a worker that reads slowly; one that is this far behind is not reading at all."""
MAX_COMPLAINTS = 100
"""Kinds of frames in another version that are remembered, so that each is logged once."""
PEER_LIMIT = 8192
"""Connections remembered; workers that reconnect under new names push out the oldest."""

Socket = zmq.Socket[bytes]


class ControlHandler(Protocol):
    """Who acts on what workers say. Called from the event loop."""

    def registered(self, info: WorkerInfo, *, moved: bool) -> bool:
        """A worker introduces itself. `moved`: this incarnation was known on another connection, or has forgotten
        since what it was given. False: it is not taken."""

    def heard(self, worker: Place, message: Any) -> None:
        """Any other message of a registered worker."""

    def ended(self, worker: Place) -> None:
        """The worker's process is over."""


class ControlSocket:
    """See the module. `bind` first, then `start` inside the event loop."""

    def __init__(
        self,
        proxy_id: str,
        incarnation: int,
        host: str,
        handler: ControlHandler,
        keys: Keys | None = None,
        context: zmq.Context[Socket] | None = None,
    ) -> None:
        """With `keys`, workers that dial by `tcp` must have the fleet's worker key. `context`: opens the socket, and
        ends with it; a simulation's sockets are in memory."""
        self._proxy_id = proxy_id
        self._incarnation = incarnation
        self._host = host
        self._handler = handler
        self._keys = keys
        self._context: zmq.Context[Socket] = context or zmq.Context(1)
        self._authenticator = Authenticator(self._context, frozenset({keys.worker})) if keys is not None else None
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 200)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_FRAME_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, QUEUED_PER_WORKER)
        self._socket.setsockopt(zmq.RCVHWM, QUEUED_PER_WORKER)
        set_heartbeats(self._socket)
        self._places: dict[bytes, Place] = {}
        self._names: dict[Place, bytes] = {}
        self._forgotten: dict[Place, int] = {}
        """What each worker's last `Register` said."""
        self._versions: dict[Place, int] = {}
        """Of the protocol, in which each worker is told things."""
        self._complaints: set[str] = set()
        self._pids: dict[Place, int] = {}
        """Open process descriptors of this machine's workers."""
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._drain_due = False
        self.address = ""
        self.bad_frames = 0
        """Frames that were no message, or not of the worker that the connection belongs to."""

    def bind(self, address: str) -> None:
        """Raises `StartupError`. A `tcp` port of 0 or `*` is chosen; `self.address` is what workers dial."""
        try:
            check_address("--control", address, self._keys)
            if self._keys is not None and not is_ipc(address):
                serve(self._socket, self._keys)
            self._socket.bind(re.sub(r":0$", ":*", address))
        except zmq.ZMQError as error:
            self.close()
            raise StartupError(f"--control {address}: {error.strerror}", EXIT_PORT) from None
        except StartupError:
            self.close()
            raise
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._descriptor, self._drain)
        self._beat()

    @property
    def refused_keys(self) -> int:
        """Connections that were refused for their key."""
        return self._authenticator.refused if self._authenticator is not None else 0

    def close(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._descriptor)
        if self._timer is not None:
            self._timer.cancel()
        for place in list(self._pids):
            self._unwatch(place)
        self._socket.close()
        if self._authenticator is not None:
            self._authenticator.close()
        self._context.term()

    def send(self, worker: Place, message: Any) -> bool:
        """False: the worker has no connection, or has stopped reading."""
        name = self._names.get(worker)
        return name is not None and self._send(name, worker.incarnation, message, self._versions[worker])

    def forget(self, worker: Place) -> None:
        """The incarnation is over; its connection means nothing any more."""
        self._unwatch(worker)
        self._forgotten.pop(worker, None)
        self._versions.pop(worker, None)
        name = self._names.pop(worker, None)
        if name is not None:
            self._places.pop(name, None)

    def _send(self, name: bytes, receiver: int, message: Any, version: int) -> bool:
        frame = wire.encode(message, self._incarnation, receiver, version)
        try:
            self._socket.send_multipart((name, frame), zmq.NOBLOCK)
        except zmq.ZMQError:  # EHOSTUNREACH: not connected; EAGAIN: it does not read
            return False
        finally:
            self._recheck()
        return True

    def _recheck(self) -> None:
        """The descriptor only signals changes, and any call on the socket may have swallowed one."""
        if not self._drain_due and self._loop is not None:
            self._drain_due = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._drain_due = False
        if self._socket.closed:
            return
        for _ in range(DRAIN_MESSAGES):
            if not self._receive():
                return
        self._recheck()

    def _receive(self) -> bool:
        """Reads one message; False when none waits."""
        try:
            parts = self._socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return False
        name = parts[0]
        try:
            if len(parts) != 2:
                raise BadFrame(f"{len(parts) - 1} parts where one frame is expected")
            self._dispatch(name, wire.decode(parts[1]))
        except wire.OtherVersion as error:
            self.bad_frames += 1
            self._not_understood(name, str(error))
        except BadFrame as error:
            self.bad_frames += 1
            log.debug("bad frame: %s", error)
        except Exception:
            log.exception("a message could not be handled")  # nothing that one worker says stops the others
        return True

    def _dispatch(self, name: bytes, envelope: wire.Envelope) -> None:
        message = envelope.message
        if isinstance(message, Register):
            self._register(name, envelope, message)
            return
        place = self._places.get(name)
        if place is None:
            return  # forgotten here: it gets no beats, so its lease lapses and it registers again
        if envelope.sender != place.incarnation:
            raise BadFrame(f"incarnation {envelope.sender} on the connection of {place}")
        self._handler.heard(place, message)

    def _not_understood(self, name: bytes, what: str) -> None:
        """Whoever it is, is told what this proxy speaks; if there is no common version, both logs have the sentence."""
        if what not in self._complaints and len(self._complaints) < MAX_COMPLAINTS:
            self._complaints.add(what)
            log.warning("a worker said something in %s", what)
        self._send(name, 0, OtherVersions(CONTROL), CONTROL.highest)

    def _register(self, name: bytes, envelope: wire.Envelope, message: Register) -> None:
        info = message.worker
        place = Place(info.worker_id, info.incarnation)
        if envelope.sender != info.incarnation:
            raise BadFrame(f"{info.worker_id} introduces incarnation {info.incarnation} as {envelope.sender}")
        before = self._names.get(place)
        known = (before, self._forgotten.get(place))
        if not self._handler.registered(info, moved=before is not None and known != (name, message.forgotten)):
            return
        if before is not None:
            self._places.pop(before, None)
        owner = self._places.get(name)
        if owner is not None and owner != place:
            self._names.pop(owner, None)
        # One `Register` in a lower version may be on its way behind the one that was understood.
        version = max(info.control.common(CONTROL) or envelope.version, self._versions.get(place, 0))
        self._versions[place] = version
        self._places[name] = place
        self._names[place] = name
        self._forgotten[place] = message.forgotten
        self._bound()
        self._watch(place, info)
        self._send(name, info.incarnation, Welcome(self._proxy_id, LEASE_S), version)

    def _bound(self) -> None:
        while len(self._places) > PEER_LIMIT:
            place = self._places.pop(next(iter(self._places)))
            self._names.pop(place, None)
            self._forgotten.pop(place, None)
            self._versions.pop(place, None)

    def _watch(self, place: Place, info: WorkerInfo) -> None:
        """Has the kernel tell us when the worker's process ends."""
        if info.host != self._host or place in self._pids or self._loop is None:
            return
        try:
            descriptor = os.pidfd_open(info.pid)
        except OSError:
            return  # another pid namespace, or an old kernel: silence will tell
        self._pids[place] = descriptor
        self._loop.add_reader(descriptor, self._ended, place)

    def _unwatch(self, place: Place) -> None:
        descriptor = self._pids.pop(place, None)
        if descriptor is not None and self._loop is not None:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)

    def _ended(self, place: Place) -> None:
        self._unwatch(place)
        self._drain()  # what it said last still counts
        self._handler.ended(place)

    def _beat(self) -> None:
        assert self._loop is not None
        message = ProxyBeat(self._proxy_id)
        for place in list(self._names):
            self.send(place, message)
        self._timer = self._loop.call_later(BEAT_S, self._beat)
