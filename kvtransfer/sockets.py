"""How the endpoint's sockets are opened; every option is set on purpose."""

from __future__ import annotations

import errno
import ipaddress
import os
from urllib.parse import urlsplit

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvtransfer.protocol import MAX_CONTROL_BYTES
from kvtransfer.transports.base import PARCEL_BYTES, Payload
from mesh.errors import EXIT_PORT, EXIT_USAGE, StartupError

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]

QUEUE_MESSAGES = 8192
"""Per connection and direction. Credit bounds what may wait far below it; what it drops, `Standing` finds."""
FRAME_SLACK = 1 << 16
HANDSHAKE_MS = 2000
"""A connection that does not speak ZMTP by then is closed."""
CONNECT_MS = 2000
RECONNECT_MS = 50
HEARTBEAT_MS = 1000
HEARTBEAT_TIMEOUT_MS = 5000
"""Finds half-open TCP connections; says nothing of the peer's engine, which has its own beat."""
FAILED_CONNECTS = 3
"""Refused so often (in 150 ms), a peer that registered and was reachable is dead."""
BACKLOG = 1024
COPY_BELOW = 1 << 16
"""Sending a frame without a copy costs more than copying it below this size."""
LOST = zmq.EVENT_DISCONNECTED
RETRIED = zmq.EVENT_CONNECT_RETRIED


def _configure(socket: Socket, block_bytes: int) -> None:
    socket.linger = 0  # what a closing worker has not sent yet, nobody needs
    socket.sndhwm = QUEUE_MESSAGES
    socket.rcvhwm = QUEUE_MESSAGES
    socket.maxmsgsize = max(block_bytes, PARCEL_BYTES, MAX_CONTROL_BYTES) + FRAME_SLACK
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


def require_local(address: str) -> None:
    """KV blocks are neither encrypted nor authenticated yet: ipc and loopback only. Raises `StartupError`."""
    parts = urlsplit(address)
    if parts.scheme == "ipc" and address != "ipc://":
        return
    if parts.scheme != "tcp":
        raise StartupError(f"{address!r} is neither ipc://PATH nor tcp://HOST:PORT", EXIT_USAGE)
    host = parts.hostname or ""
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = host == "localhost"
    if not loopback:
        raise StartupError(
            f"{address}: KV blocks would leave this machine unencrypted; bind ipc://PATH or 127.0.0.1",
            EXIT_USAGE,
        )


def open_router(context: Context, address: str, block_bytes: int) -> tuple[Socket, str]:
    """A bound socket for fetchers and the address it really has. Raises `StartupError`."""
    require_local(address)
    socket: Socket = context.socket(zmq.ROUTER)
    _configure(socket, block_bytes)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a fetcher that is gone must say so
    socket.setsockopt(zmq.BACKLOG, BACKLOG)
    try:
        socket.bind(address.replace("localhost", "127.0.0.1") if address.startswith("tcp:") else address)
    except zmq.ZMQError as error:
        socket.close()
        code = EXIT_PORT if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES) else EXIT_USAGE
        raise StartupError(f"cannot listen for KV fetches on {address}: {error.strerror}", code) from None
    bound = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    if bound.startswith("ipc://"):
        os.chmod(bound.removeprefix("ipc://"), 0o600)
    return socket, bound


def open_dealer(context: Context, address: str, block_bytes: int) -> Socket:
    """A connection to one holder. Raises `zmq.ZMQError` for an address that is none."""
    socket: Socket = context.socket(zmq.DEALER)
    _configure(socket, block_bytes)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    try:
        socket.connect(address)
    except zmq.ZMQError:
        socket.close()
        raise
    return socket


def monitor_of(socket: Socket, events: int) -> Socket:
    """The socket on which libzmq tells what happens to `socket`'s connections; close it first."""
    return socket.get_monitor_socket(events)


def close_monitored(socket: Socket, monitor: Socket) -> None:
    """In this order: a context waits for ever on an open monitor."""
    socket.disable_monitor()
    monitor.close(linger=0)
    socket.close(linger=0)


def read_monitor(monitor: Socket) -> int | None:
    """The next connection event, or None."""
    try:
        return int(parse_monitor_message(monitor.recv_multipart(zmq.NOBLOCK))["event"])
    except zmq.Again:
        return None


def send(socket: Socket, head: tuple[bytes, ...], payload: Payload | None) -> None:
    """All frames or none, without waiting. Raises `zmq.ZMQError` (`zmq.Again`: the queue is full)."""
    for i, frame in enumerate(head):
        more = zmq.SNDMORE if payload is not None or i + 1 < len(head) else 0
        socket.send(frame, zmq.NOBLOCK | more)
    if payload is not None:
        socket.send(payload, zmq.NOBLOCK, copy=len(payload) < COPY_BELOW)
