"""What a fetcher knows of its connection to one holder."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from kvtransfer import fetching_state as fs
from kvtransfer.channel import Opener
from kvtransfer.sockets import Socket
from kvtransfer.transports.base import Landing, Payload
from mesh.wire import Envelope

LinkKey = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Heard:
    """A message of a holder, and the bytes of its blocks if it has any."""

    envelope: Envelope
    payload: Payload | Landing


@dataclass(slots=True, eq=False)
class Link:
    """The connection to one incarnation of one holder."""

    key: LinkKey
    dealer: Socket
    """To the holder."""
    inbound: Socket
    """From it: the same socket, or with keys and over tcp one of its own, see `channel`."""
    monitors: tuple[Socket, ...]
    """Of the two, or of the one that both are."""
    state: fs.Fetching
    opened: float
    idle_since: float
    block_bytes: int
    """Of the holder's blocks."""
    version: int
    """Of the protocol, that both speak."""
    opener: Opener | None
    due: float = math.inf
    """When a tick of this state has something to do."""
    waiting: list[bytes] = field(default_factory=list)
    """What is to be said once the holder has greeted."""
    refused: str = ""
    """Why the holder will not talk to this worker."""
    failed_connects: int = 0
    segments: dict[str, str] = field(default_factory=dict)
    """Segments of this holder that were read, and by which transport."""
    returned: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    """Slots to give back, by transport."""
    behind: deque[Heard] = field(default_factory=deque)
    """Messages from the first whose bytes are still landing on: the protocol counts on their order."""
    left: dict[str, float] = field(default_factory=dict)
    """Transports that failed with this holder, and when each is offered again."""
