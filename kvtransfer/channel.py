"""What a holder says to a fetcher over `tcp`, sealed with AES-256-GCM: CURVE would cost two thirds of the bandwidth.

Fetcher and holder have two connections, made under one random routing id, the link:

    fetcher                                        holder
      hello(link), as a password   ── bulk ────▶     proves the transfer key, or the connection ends
      hello(link)                  ── bulk ────▶     the holder makes a session
                                   ◀─── bulk ──      greeting: the first sealed message, of no bytes
      Fetch, Credit, Renew, …      ── control ─▶     over CURVE, once the greeting has come
                                   ◀─── bulk ──      Standing, Blocks, Note, …: all of it, so that it stays in order

A session's key is derived from the fleet's transfer key, the link (random, the fetcher's) and a salt (random, the
holder's), so no session has the key of another, and no recording can be played back. It is as secret as the transfer
key: who gets that can read what was recorded. Every message has the next number of its session, which is its nonce; the
receiver wants each number above the last. So a message that was recorded, repeated or moved is refused, one that was
cut or changed does not open, and a number that is left out is a lost message, which the protocol repairs.
"""

from __future__ import annotations

import hmac
import secrets
import struct

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from kvtransfer.transports.base import Payload
from kvtransfer.transports.pool import BufferPool
from mesh.errors import KvmeshError

LINK_BYTES = 16
SALT_BYTES = 16
TAG_BYTES = 16
KEY_BYTES = 32
_HEAD = struct.Struct(f">{SALT_BYTES}sQ")
_NONCE = struct.Struct(">IQ")
_MESSAGE, _PAYLOAD = 0, 1
"""The first four bytes of a nonce: which of a message's two frames."""
OVERHEAD_BYTES = _HEAD.size + TAG_BYTES


class Unsealable(KvmeshError):
    """A message that is not the next of its session; `reason` is the counter it goes to."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        """`truncated`, `session` (of another session), `replayed` or `forged`."""


def new_link() -> bytes:
    """A routing id; ZeroMQ keeps those that begin with a zero byte for itself."""
    return b"\x01" + secrets.token_bytes(LINK_BYTES - 1)


def hello(transfer_key: bytes, link: bytes) -> bytes:
    return hmac.digest(transfer_key, b"kvmesh kv hello 1" + link, "sha256")


def is_hello(transfer_key: bytes, link: bytes, frame: bytes) -> bool:
    return len(link) == LINK_BYTES and hmac.compare_digest(hello(transfer_key, link), frame)


def _cipher(transfer_key: bytes, link: bytes, salt: bytes) -> AESGCM:
    derived = HKDF(SHA256(), KEY_BYTES, salt=link + salt, info=b"kvmesh kv session 1").derive(transfer_key)
    return AESGCM(derived)


def _associated(head: bytes, has_payload: bool) -> bytes:
    return head + (b"\x01" if has_payload else b"\x00")


class Sealer:
    """The holder's side of one session."""

    def __init__(self, transfer_key: bytes, link: bytes, pool: BufferPool) -> None:
        self._salt = secrets.token_bytes(SALT_BYTES)
        self._cipher = _cipher(transfer_key, link, self._salt)
        self._pool = pool
        self._number = 0

    def seal(self, message: bytes, payload: Payload | None) -> tuple[bytes, Payload | None]:
        """The frames to send. The number is used up even if they are not sent."""
        self._number += 1
        head = _HEAD.pack(self._salt, self._number)
        associated = _associated(head, payload is not None)
        frame = head + self._cipher.encrypt(_NONCE.pack(_MESSAGE, self._number), message, associated)
        if payload is None:
            return frame, None
        sealed = self._pool.get(len(payload) + TAG_BYTES).data
        self._cipher.encrypt_into(_NONCE.pack(_PAYLOAD, self._number), payload, associated, sealed)
        return frame, sealed


class Opener:
    """The fetcher's side of one session; the first message that opens decides which session."""

    def __init__(self, transfer_key: bytes, link: bytes, pool: BufferPool) -> None:
        self._transfer_key = transfer_key
        self._link = link
        self._pool = pool
        self._salt = b""
        self._cipher: AESGCM | None = None
        self._number = 0

    @property
    def is_open(self) -> bool:
        return self._cipher is not None

    def open(self, frame: Payload, payload: Payload | None) -> tuple[bytes, Payload | None]:
        """The message and its payload. Raises `Unsealable`, and then nothing has changed."""
        if len(frame) < OVERHEAD_BYTES or (payload is not None and len(payload) < TAG_BYTES):
            raise Unsealable("truncated")
        head = bytes(frame[: _HEAD.size])
        salt, number = _HEAD.unpack(head)
        cipher = self._cipher
        if cipher is None:
            cipher = _cipher(self._transfer_key, self._link, salt)
        elif salt != self._salt:
            raise Unsealable("session")
        if number <= self._number:
            raise Unsealable("replayed")
        associated = _associated(head, payload is not None)
        try:
            message = cipher.decrypt(_NONCE.pack(_MESSAGE, number), frame[_HEAD.size :], associated)
            opened = None if payload is None else self._payload(cipher, number, payload, associated)
        except InvalidTag:
            raise Unsealable("forged") from None
        self._salt, self._cipher, self._number = salt, cipher, number
        return message, opened

    def _payload(self, cipher: AESGCM, number: int, payload: Payload, associated: bytes) -> Payload:
        whole = self._pool.get(len(payload) - TAG_BYTES).data
        cipher.decrypt_into(_NONCE.pack(_PAYLOAD, number), payload, associated, whole)
        return whole.toreadonly()
