"""The sealed sessions of one holder, by link."""

from __future__ import annotations

from kvtransfer.channel import TAG_BYTES, Sealer, is_hello
from kvtransfer.transports.base import Payload, parcel_bytes
from kvtransfer.transports.pool import BufferPool
from mesh.layout import KvLayout

MAX_SESSIONS = 4096
"""Of fetchers that proved the fleet's key; the oldest makes room, and its fetches end as those of a lost peer."""


class Sealing:
    def __init__(self, transfer_key: bytes, layout: KvLayout) -> None:
        self._transfer_key = transfer_key
        self._pool = BufferPool(parcel_bytes(layout.block_bytes) + TAG_BYTES)
        self._sessions: dict[bytes, Sealer] = {}

    def greet(self, link: bytes, frame: bytes) -> bytes | None:
        """Begins `link`'s session and returns its first message; None: that was no hello of this fleet."""
        if not is_hello(self._transfer_key, link, frame):
            return None
        while len(self._sessions) >= MAX_SESSIONS:
            del self._sessions[next(iter(self._sessions))]
        session = self._sessions[link] = Sealer(self._transfer_key, link, self._pool)
        return session.seal(b"", None)[0]

    def seal(self, link: bytes, frame: bytes, payload: Payload | None) -> tuple[bytes, Payload | None] | None:
        """The frames to send; None: the link has no session."""
        session = self._sessions.get(link)
        return None if session is None else session.seal(frame, payload)

    def forget(self, link: bytes) -> None:
        self._sessions.pop(link, None)
