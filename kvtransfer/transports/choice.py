"""Which transports an endpoint has, and which of them a transfer uses."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from kvtransfer.messages import Offer
from kvtransfer.transports import inline, local, shm
from kvtransfer.transports.base import Transport, parcel_bytes
from mesh.errors import EXIT_USAGE, StartupError

log = logging.getLogger(__name__)

NAMES = (local.NAME, shm.NAME, inline.NAME)


def open_transports(
    names: Sequence[str], *, host: str, block_bytes: int, exchange: local.Exchange | None
) -> dict[str, Transport]:
    """By name, in order of preference; `zmq` is always there, as the last resort. Raises `StartupError`."""
    found: dict[str, Transport] = {}
    for name in names:
        if name not in NAMES:
            raise StartupError(f"unknown KV transport {name!r}; known are {', '.join(NAMES)}", EXIT_USAGE)
        if name == local.NAME and exchange is not None:
            found[name] = local.LocalTransport(exchange)
        elif name == shm.NAME:
            try:
                found[name] = shm.ShmTransport(host, parcel_bytes(block_bytes))
            except OSError as error:
                log.warning("no shared memory (%s): KV blocks go by ZeroMQ", error)
        elif name == inline.NAME:
            found[name] = inline.InlineTransport(parcel_bytes(block_bytes))
    found.setdefault(inline.NAME, inline.InlineTransport(parcel_bytes(block_bytes)))
    return found


def offers(transports: Mapping[str, Transport]) -> tuple[Offer, ...]:
    """What a fetcher says of itself."""
    return tuple(Offer(t.name, t.scope) for t in transports.values())


def choose(wanted: Sequence[Offer], transports: Mapping[str, Transport]) -> Transport:
    """The fetcher's most preferred transport that this holder shares with it."""
    for offer in wanted:
        mine = transports.get(offer.transport)
        if mine is not None and mine.scope == offer.scope:
            return mine
    return transports[inline.NAME]
