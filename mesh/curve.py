"""ZeroMQ CURVE on sockets that may leave the machine, and the thread that says who is let in.

libzmq lets every client key in when nobody answers its question (ZAP, RFC 27). So each server socket enforces a domain:
without an answer, or when the thread below is dead, a connection is refused.
"""

from __future__ import annotations

import ipaddress
import re
import threading
from collections.abc import Callable

import zmq
from zmq.utils import z85

from mesh.errors import EXIT_USAGE, StartupError
from mesh.keys import Keys

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"kvmesh"
HELLO_DOMAIN = b"kvmesh-hello"
TCP = re.compile(r"tcp://(\*|[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5}|\*)")
"""One host and one port. ZeroMQ also knows `tcp://FROM;TO`, of which only FROM might be loopback."""
HANDSHAKE_MS = 2000
"""A connection that has not proved its key by then is closed."""
HANDSHAKE_FAILED = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)

Context = zmq.Context[zmq.Socket[bytes]]
Socket = zmq.Socket[bytes]


def is_ipc(address: str) -> bool:
    return address.startswith("ipc://") and len(address) > len("ipc://")


def is_loopback(address: str) -> bool:
    found = TCP.fullmatch(address)
    host = found[1].strip("[]") if found is not None else ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_address(flag: str, address: str, keys: Keys | None) -> None:
    """`ipc`, `tcp` on loopback, or with keys any `tcp`. Raises `StartupError` with the flag's name."""
    if is_ipc(address):
        return
    if TCP.fullmatch(address) is None:
        raise StartupError(f"{flag} {address}: neither ipc://PATH nor tcp://HOST:PORT", EXIT_USAGE)
    if keys is None and not is_loopback(address):
        raise StartupError(
            f"{flag} {address}: without --keys only ipc://PATH and a loopback tcp://127.0.0.1:PORT are accepted, "
            "because the connection is not encrypted",
            EXIT_USAGE,
        )


def serve(socket: Socket, keys: Keys) -> None:
    """Before `bind`: only clients with a key that the context's `Authenticator` knows get in."""
    socket.setsockopt(zmq.CURVE_SERVER, 1)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt(zmq.ZAP_DOMAIN, DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


def serve_hellos(socket: Socket) -> None:
    """Before `bind`: only clients whose hello the context's `Authenticator` accepts get in; nothing is encrypted."""
    socket.setsockopt(zmq.PLAIN_SERVER, 1)
    socket.setsockopt(zmq.ZAP_DOMAIN, HELLO_DOMAIN)
    socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


def say_hello(socket: Socket, name: bytes, hello: bytes) -> None:
    """Before `connect`, to a socket of `serve_hellos`."""
    socket.setsockopt(zmq.PLAIN_USERNAME, name)
    socket.setsockopt(zmq.PLAIN_PASSWORD, hello)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


def dial(socket: Socket, keys: Keys, server: bytes) -> None:
    """Before `connect`: the other end must prove that it has the secret of `server`."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, server)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


class Authenticator:
    """Answers libzmq's questions for one context. Close it after the server sockets, before the context."""

    def __init__(
        self,
        context: Context,
        known: frozenset[bytes],
        is_hello: Callable[[bytes, bytes], bool] = lambda name, hello: False,
    ) -> None:
        """`known`: public keys of clients, in Z85. `is_hello`: whether a client of `serve_hellos` is let in."""
        self._known = frozenset(z85.decode(key) for key in known)
        self._is_hello = is_hello
        self.refused = 0
        """Connections with a key that is not known."""
        self.refused_hellos = 0
        self._socket = context.socket(zmq.REP)
        self._socket.linger = 0
        self._socket.bind(ZAP_ENDPOINT)
        self._stop = context.socket(zmq.PAIR)
        stop_address = f"inproc://kvmesh-zap-{id(self)}"
        self._stop.bind(stop_address)
        self._stopped = context.socket(zmq.PAIR)
        self._stopped.connect(stop_address)
        self._thread = threading.Thread(target=self._run, name="zap", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            poller = zmq.Poller()
            poller.register(self._socket, zmq.POLLIN)
            poller.register(self._stopped, zmq.POLLIN)
            while self._stopped not in {socket for socket, _ in poller.poll()}:
                self._socket.send_multipart(self._answer(self._socket.recv_multipart()))
        finally:  # however it ended: from now on every connection is refused, and the context can be closed
            self._socket.close()
            self._stopped.close(linger=0)

    def _answer(self, request: list[bytes]) -> list[bytes]:
        """One request of RFC 27: version, id, domain, address, identity, mechanism, credentials."""
        domain, mechanism, credentials = request[2:3], request[5:6], request[6:]
        if domain == [HELLO_DOMAIN]:
            known = mechanism == [b"PLAIN"] and len(credentials) == 2 and self._is_hello(*credentials)
            self.refused_hellos += not known
        else:
            known = (
                domain == [DOMAIN]
                and mechanism == [b"CURVE"]
                and len(credentials) == 1
                and credentials[0] in self._known
            )
            self.refused += not known
        status = (b"200", b"OK") if known else (b"400", b"unknown key")
        return [b"1.0", request[1] if len(request) > 1 else b"", *status, b"", b""]

    def close(self) -> None:
        if self._thread.is_alive():
            self._stop.send(b"")
            self._thread.join()
        self._stop.close(linger=0)
