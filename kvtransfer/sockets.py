"""How the endpoint's sockets are opened; every option is set on purpose."""

from __future__ import annotations

import errno
import os
import re

import zmq
from zmq.utils.monitor import parse_monitor_message

from kvtransfer.protocol import MAX_CONTROL_BYTES
from kvtransfer.transports.base import PARCEL_BYTES, Payload
from mesh.curve import (
    HANDSHAKE_FAILED,
    check_address,
    dial,
    is_ipc,
    is_loopback,
    say_hello,
    serve,
    serve_hellos,
)
from mesh.errors import EXIT_PORT, EXIT_USAGE, KvmeshError, StartupError
from mesh.keys import Keys

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
MORE_FOLLOWS = zmq.NOBLOCK | zmq.SNDMORE
COPY_BELOW = 1 << 16
"""Sending a frame without a copy costs more than copying it below this size."""
HELLO_LIMIT = 128
"""The longest frame on a bulk connection is the handshake's, with a link and its hello."""
HELLO_QUEUE = 64
WILDCARDS = ("tcp://*:", "tcp://0.0.0.0:", "tcp://[::]:")
LOST = zmq.EVENT_DISCONNECTED
DENIED = HANDSHAKE_FAILED
RETRIED = zmq.EVENT_CONNECT_RETRIED
_SEALED = re.compile(r"(tcp://(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])):(\d{1,5})/(\d{1,5})")


class DialRefused(KvmeshError):
    """A holder that must not be dialled from here."""


def _configure(socket: Socket, block_bytes: int) -> None:
    socket.linger = 0  # what a closing worker has not sent yet, nobody needs
    socket.sndhwm = QUEUE_MESSAGES
    socket.rcvhwm = QUEUE_MESSAGES
    socket.maxmsgsize = max(block_bytes, PARCEL_BYTES, MAX_CONTROL_BYTES) + FRAME_SLACK
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)


def open_router(context: Context, address: str, block_bytes: int, keys: Keys | None) -> tuple[Socket, str]:
    """A bound socket for fetchers and the address it really has. Raises `StartupError`."""
    check_address("--kv-bind", address, keys)
    if address.startswith(WILDCARDS):
        raise StartupError(f"--kv-bind {address}: other workers cannot dial a wildcard; give one address", EXIT_USAGE)
    socket: Socket = context.socket(zmq.ROUTER)
    _configure(socket, block_bytes)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # sending to a fetcher that is gone must say so
    socket.setsockopt(zmq.BACKLOG, BACKLOG)
    if keys is not None and not is_ipc(address):
        serve(socket, keys)
    bound = _bind(socket, address)
    if is_ipc(bound):
        os.chmod(bound.removeprefix("ipc://"), 0o600)
    return socket, bound


def open_bulk_router(context: Context, given: str, control: str) -> tuple[Socket, str]:
    """Beside an encrypted `open_router`: takes hellos, sends what is sealed. Returns the address that names both.

    ZeroMQ bounds a frame and a queue of messages, but not the frames of a message. So nobody may send one who has not
    proved the fleet's key in the handshake.

    On the port after `given`'s, if that has one. Raises `StartupError`.
    """
    host, port = control.rsplit(":", 1)
    chosen = given.rsplit(":", 1)[1] in ("0", "*")
    socket: Socket = context.socket(zmq.ROUTER)
    _configure(socket, 0)
    socket.maxmsgsize = HELLO_LIMIT
    socket.rcvhwm = HELLO_QUEUE
    serve_hellos(socket)
    socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    socket.setsockopt(zmq.BACKLOG, BACKLOG)
    bound = _bind(socket, f"{host}:{'*' if chosen else int(port) + 1}")
    return socket, f"{control}/{bound.rsplit(':', 1)[1]}"


def _bind(socket: Socket, address: str) -> str:
    try:
        socket.bind(address.replace("localhost", "127.0.0.1") if address.startswith("tcp:") else address)
    except zmq.ZMQError as error:
        socket.close()
        code = EXIT_PORT if error.errno in (errno.EADDRINUSE, errno.EADDRNOTAVAIL, errno.EACCES) else EXIT_USAGE
        raise StartupError(f"cannot listen for KV fetches on {address}: {error.strerror}", code) from None
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")


def addresses(kv_address: str, keys: Keys | None) -> tuple[str, str]:
    """Where a holder hears fetches, and where it sends what is sealed (empty: on the same connection).

    Raises `DialRefused`: nothing is asked in plain text over a network, nor of a holder that this worker, which has
    keys, would have to trust without.
    """
    sealed = _SEALED.fullmatch(kv_address)
    if sealed is not None:
        if keys is None:
            raise DialRefused(f"{kv_address}: its blocks are encrypted and this worker has no --keys")
        return f"{sealed[1]}:{sealed[2]}", f"{sealed[1]}:{sealed[3]}"
    if is_ipc(kv_address):
        return kv_address, ""
    if keys is not None:
        raise DialRefused(f"{kv_address}: this worker has --keys and that one does not encrypt")
    if not is_loopback(kv_address):
        raise DialRefused(f"{kv_address}: not loopback, so KV blocks would leave this machine unencrypted")
    return kv_address, ""


def open_dealer(
    context: Context,
    address: str,
    block_bytes: int,
    *,
    keys: Keys | None = None,
    link: bytes = b"",
    hello: bytes = b"",
) -> Socket:
    """A connection to one holder: over CURVE with `keys`, to its bulk port with `hello`.

    Raises `zmq.ZMQError` for an address that is none.
    """
    socket: Socket = context.socket(zmq.DEALER)
    _configure(socket, block_bytes)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    if link:
        socket.setsockopt(zmq.ROUTING_ID, link)
    if keys is not None:
        dial(socket, keys, keys.worker)
    if hello:
        say_hello(socket, link, hello)
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
    for frame in head[:-1]:
        socket.send(frame, MORE_FOLLOWS)
    socket.send(head[-1], zmq.NOBLOCK if payload is None else MORE_FOLLOWS)
    if payload is not None:
        socket.send(payload, zmq.NOBLOCK, copy=len(payload) < COPY_BELOW)
