"""`zmq`: the bytes are the frame behind the message; works wherever the connection does (ipc, tcp)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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

    def post(self, parts: Sequence[Payload]) -> Posted:
        return Posted(_PLACE, parts[0] if len(parts) == 1 else self._joined(parts))

    def _joined(self, parts: Sequence[Payload]) -> Payload:
        whole = self._pool.get(sum(len(p) for p in parts))
        at = 0
        for part in parts:
            np.copyto(whole[at : at + len(part)], np.frombuffer(part, dtype=np.uint8))
            at += len(part)
        return whole.data

    def take(self, place: Place, size: int, frame: Payload | None) -> Payload:
        if frame is None or len(frame) != size:
            raise TransportFault(f"{size} bytes announced, {0 if frame is None else len(frame)} came")
        return frame

    def reclaim(self, slot: int, seq: int) -> None:
        """Nothing is kept."""

    def forget(self, segment: str) -> None:
        """Nothing is open."""

    def close(self) -> None:
        """Nothing is open."""
