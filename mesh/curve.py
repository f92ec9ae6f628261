"""ZeroMQ CURVE on sockets that may leave the machine, and the thread that says which client keys are known.

libzmq lets every client key in when nobody answers its question (ZAP, RFC 27). So each server socket enforces a domain:
without an answer, or when the thread below is dead, a connection is refused.
"""

from __future__ import annotations

import ipaddress
import re
import threading

import zmq
from zmq.utils import z85

from mesh.errors import EXIT_USAGE, StartupError
from mesh.keys import Keys

ZAP_ENDPOINT = "inproc://zeromq.zap.01"
DOMAIN = b"kvmesh"
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


def dial(socket: Socket, keys: Keys, server: bytes) -> None:
    """Before `connect`: the other end must prove that it has the secret of `server`."""
    socket.setsockopt(zmq.CURVE_SERVERKEY, server)
    socket.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
    socket.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_MS)


class Authenticator:
    """Answers libzmq's questions for one context. Close it after the server sockets, before the context."""

    def __init__(self, context: Context, known: frozenset[bytes]) -> None:
        """`known`: public keys of clients, in Z85."""
        self._known = frozenset(z85.decode(key) for key in known)
        self.refused = 0
        """Connections with a key that is not known."""
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
        known = len(request) == 7 and request[2] == DOMAIN and request[5] == b"CURVE" and request[6] in self._known
        self.refused += not known
        status = (b"200", b"OK") if known else (b"400", b"unknown key")
        return [b"1.0", request[1] if len(request) > 1 else b"", *status, b"", b""]

    def close(self) -> None:
        if self._thread.is_alive():
            self._stop.send(b"")
            self._thread.join()
        self._stop.close(linger=0)
