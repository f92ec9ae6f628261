"""`local`: two endpoints of one process; the bytes stay where they are."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field

from kvtransfer.messages import Place
from kvtransfer.transports.base import Payload, Posted, TransportFault

NAME = "local"


@dataclass(slots=True, eq=False)
class Exchange:
    """Where the endpoints of one process leave parcels for each other. Each use is one atomic dict operation."""

    name: str = field(default_factory=lambda: secrets.token_hex(16))
    parcels: dict[int, tuple[Payload, ...]] = field(default_factory=dict)
    numbers: itertools.count[int] = field(default_factory=lambda: itertools.count(1))


class LocalTransport:
    """See `Transport`."""

    name = NAME

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._mine: set[int] = set()

    @property
    def scope(self) -> str:
        return self._exchange.name

    def post(self, parts: Sequence[Payload], link: bytes) -> Posted:
        number = next(self._exchange.numbers)
        self._exchange.parcels[number] = tuple(parts)
        self._mine.add(number)
        return Posted(Place(NAME, "", number, 0), None)

    def take(self, place: Place, size: int, frame: Payload | None) -> Payload:
        parts = self._exchange.parcels.get(place.slot)
        if parts is None:
            raise TransportFault("the parcel was taken back")
        payload = parts[0] if len(parts) == 1 else b"".join(parts)
        if len(payload) != size:
            raise TransportFault(f"{size} bytes announced, {len(payload)} found")
        return payload

    def skip(self, place: Place, size: int) -> None:
        """The parcel is the sender's again when it is returned."""

    def reclaim(self, slot: int, seq: int) -> None:
        self._exchange.parcels.pop(slot, None)
        self._mine.discard(slot)

    def forget(self, segment: str) -> None:
        """Nothing is open."""

    def close(self) -> None:
        for number in list(self._mine):
            self.reclaim(number, 0)
