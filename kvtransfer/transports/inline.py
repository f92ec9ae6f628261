"""`zmq`: the bytes are the frame behind the message; works wherever the connection does (ipc, tcp)."""

from __future__ import annotations

from collections.abc import Sequence

from kvtransfer.messages import Place
from kvtransfer.transports.base import Payload, Posted, TransportFault
from kvtransfer.transports.pool import BufferPool

NAME = "zmq"
_PLACE = Place(NAME, "", 0, 0)


class InlineTransport:
    """See `Transport`. Blocks at least as large as a parcel are sent and received without a copy in Python."""

    name = NAME
    scope = ""

    def __init__(self, parcel_bytes: int) -> None:
        self._pool = BufferPool(parcel_bytes)

    def post(self, parts: Sequence[Payload], link: bytes) -> Posted:
        return Posted(_PLACE, parts[0] if len(parts) == 1 else self._pool.joined(parts).data)

    def take(self, place: Place, size: int, frame: Payload | None) -> Payload:
        if frame is None or len(frame) != size:
            raise TransportFault(f"{size} bytes announced, {0 if frame is None else len(frame)} came")
        return frame

    def skip(self, place: Place, size: int) -> None:
        """The frame came with the message."""

    def reclaim(self, slot: int, seq: int) -> None:
        """Nothing is kept."""

    def forget(self, segment: str) -> None:
        """Nothing is open."""

    def close(self) -> None:
        """Nothing is open."""
