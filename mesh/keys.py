"""The keys of a fleet whose sockets leave the machine: who may dial, and what KV blocks are sealed with.

    proxy.secret   worker.secret      CURVE key pairs of ZeroMQ, one per kind of process
    proxy.public   worker.public      what the other kind knows it by
    transfer.secret                   32 bytes that every worker shares; session keys are derived from it

A proxy needs `proxy.*` and `worker.public`; a worker needs `worker.*`, `proxy.public` and `transfer.secret`. A file
that is missing, readable by others, not ours or of another form is refused at start: nothing falls back to plain text.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import zmq

from mesh.errors import EXIT_USAGE, StartupError

TRANSFER_BYTES = 32
CURVE_CHARS = 40
"""A CURVE key in Z85, as ZeroMQ prints it."""
MAX_FILE_BYTES = 256
PROXY = "proxy"
WORKER = "worker"
TRANSFER = "transfer.secret"


@dataclass(frozen=True, slots=True)
class Keys:
    """What one process knows. Secrets stay out of `repr`, and so out of every log."""

    public: bytes
    secret: bytes
    proxy: bytes
    """Public key of the proxies; workers take orders from nobody else."""
    worker: bytes
    """Public key of the workers; the only one that may dial a proxy or another worker."""
    transfer: bytes
    """Empty in a proxy."""

    def __repr__(self) -> str:
        return f"Keys(public={self.public!r})"


def main(argv: Sequence[str]) -> int:
    """`kvmesh keys DIR`. Raises `StartupError`."""
    if len(argv) != 1 or argv[0].startswith("-"):
        print(
            "usage: kvmesh keys DIR\n\nMakes the keys of a new fleet in DIR; give DIR to its processes as --keys DIR."
        )
        return 0 if list(argv) in (["-h"], ["--help"]) else EXIT_USAGE
    create(Path(argv[0]))
    print(f"keys of a new fleet are in {argv[0]}; start its proxies and workers with --keys {argv[0]}")
    return 0


def create(folder: Path) -> None:
    """Makes `folder`, for its owner alone, and every key in it; keys that exist are never replaced."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = [f"{kind}.{part}" for kind in (PROXY, WORKER) for part in ("public", "secret")]
        for name in (*names, TRANSFER):
            if (folder / name).exists():
                raise StartupError(f"{folder / name} exists; keys are not replaced", EXIT_USAGE)
        for kind in (PROXY, WORKER):
            public, secret = zmq.curve_keypair()
            _write(folder / f"{kind}.secret", secret, 0o600)
            _write(folder / f"{kind}.public", public, 0o644)
        _write(folder / TRANSFER, secrets.token_hex(TRANSFER_BYTES).encode(), 0o600)
    except OSError as error:
        raise StartupError(f"cannot make keys in {folder}: {error.strerror}", EXIT_USAGE) from None


def _write(path: Path, content: bytes, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content + b"\n")


def load(folder: str, kind: str) -> Keys | None:
    """The keys of a `proxy` or `worker` process; None without a folder. Raises `StartupError`."""
    if not folder:
        return None
    place = Path(folder)
    secret = _curve(place / f"{kind}.secret", private=True)
    publics = {name: _curve(place / f"{name}.public", private=False) for name in (PROXY, WORKER)}
    if zmq.curve_public(secret) != publics[kind]:
        raise StartupError(f"{place}: {kind}.secret and {kind}.public are not one pair", EXIT_USAGE)
    transfer = _transfer(place / TRANSFER) if kind == WORKER else b""
    return Keys(publics[kind], secret, publics[PROXY], publics[WORKER], transfer)


def _curve(path: Path, *, private: bool) -> bytes:
    text = _read(path, private=private)
    try:
        if len(text) != CURVE_CHARS:
            raise ValueError
        zmq.curve_public(text)  # decodes it; any 32 bytes would do as a secret
    except (ValueError, zmq.ZMQError):
        raise StartupError(f"{path} is not a CURVE key", EXIT_USAGE) from None
    return text


def _transfer(path: Path) -> bytes:
    text = _read(path, private=True)
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != TRANSFER_BYTES:
        raise StartupError(f"{path} is not {TRANSFER_BYTES} bytes in hexadecimal", EXIT_USAGE)
    return key


def _read(path: Path, *, private: bool) -> bytes:
    """Checked on the open file, so that what was checked is what is read, wherever a link led (mounted secrets are
    links in Kubernetes)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise StartupError(f"--keys: cannot read {path}: {error.strerror}", EXIT_USAGE) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise StartupError(f"--keys: {path} is not a file", EXIT_USAGE)
        if status.st_uid not in (os.geteuid(), 0):
            raise StartupError(f"--keys: {path} belongs to another user", EXIT_USAGE)
        if status.st_mode & (0o077 if private else 0o022):
            may = "read" if private else "written"
            raise StartupError(f"--keys: {path} can be {may} by other users; use chmod go-rwx", EXIT_USAGE)
        return os.read(descriptor, MAX_FILE_BYTES).strip()
    finally:
        os.close(descriptor)
