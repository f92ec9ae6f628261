"""What carries payload bytes from a holder to a fetcher, behind one small interface.

Control messages always travel by ZeroMQ; a transport only decides where the bytes of a `Blocks` message are. One object
serves both directions of an endpoint and is used by one thread; none of its methods waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from kvtransfer.messages import Place
from mesh.errors import KvmeshError

Payload = bytes | memoryview

PARCEL_BYTES = 1 << 20
"""Small blocks go together up to this size: below it the cost per message dominates, above 4 MiB page faults do."""
ALONE_BYTES = 1 << 19
"""A block of this size travels alone. Putting smaller ones together saves more of the time per message than the copy
costs: at 192 KiB a quarter of the processor time over shared memory, a third over ZeroMQ (measured)."""


def parcel_bytes(block_bytes: int) -> int:
    """The most that one message carries."""
    return block_bytes if block_bytes >= ALONE_BYTES else PARCEL_BYTES


class TransportFault(KvmeshError):
    """The bytes cannot be had from where the message says they are."""


@dataclass(frozen=True, slots=True)
class Posted:
    """Bytes that wait for their receiver."""

    place: Place
    frame: Payload | None
    """To be sent behind the message."""


class Landing(Protocol):
    """Bytes that are still on their way into this process."""

    def payload(self) -> Payload | None:
        """The bytes; None: not yet, ask again. Raises `TransportFault`, within seconds if they do not come."""


class Transport(Protocol):
    @property
    def name(self) -> str: ...

    @property
    def scope(self) -> str:
        """Two endpoints can use this transport if their scopes are equal."""

    def post(self, parts: Sequence[Payload], link: bytes) -> Posted | None:
        """Makes `parts`, one after another, available to the receiver at the other end of `link`; None: not now, use
        another transport.

        The caller must not change `parts` afterwards.
        """

    def take(self, place: Place, size: int, frame: Payload | None) -> Payload | Landing:
        """The `size` bytes at `place`, in memory that the sender cannot change. Raises `TransportFault`.

        Called once for each message of a link, in their order.
        """

    def skip(self, place: Place, size: int) -> None:
        """Instead of `take`: nobody wants these bytes any more."""

    def reclaim(self, slot: int, seq: int) -> None:
        """The receiver is done with what `post` put there, or will never read it."""

    def forget(self, segment: str) -> None:
        """The sender that owns `segment` is gone: whatever is open of it is closed."""

    def close(self) -> None: ...
