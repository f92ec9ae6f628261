"""`gloo`, `nccl`: parcels as sends and receives in a group of two ranks, see `groups` and `pairs`.

The holder builds a group with the first parcel for a link, and the place of each parcel names it: the store's address,
the group, the parcel's number. The fetcher joins when it reads that, and receives the parcels in the order of their
messages. Neither waits: parcels land while the endpoint goes on. If the other side never joins, dies or hangs, the pair
has failed within `WAIT_S`; its parcels are faults, which the fetcher has sent by ZeroMQ, and the holder builds another
group no sooner than `REBUILD_S` later.

What travels so is not encrypted, by neither backend, and a group takes what comes for what its peer sent. So `gloo` is
for loopback, and `nccl` for a network that only the fleet can reach.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from kvtransfer.messages import Place
from kvtransfer.transports.base import Landing, Payload, Posted, TransportFault
from kvtransfer.transports.groups import RECEIVER, SENDER, WAIT_S, Backend, Group, Meeting, check_address
from kvtransfer.transports.pairs import IDLE_S, Arriving, Pair
from kvtransfer.transports.pool import BufferPool

REBUILD_S = 10.0
SLACK_S = 0.5
"""What a thread may need beyond the time that it waits for the other side, before a process ends without it."""
MAX_PAIRS = 256
"""Groups that an endpoint is in at once, each way: each is a thread and some sockets."""
LARGER = 16
"""So many times the own bound may a parcel have: its holder's blocks may be larger, and its numbers wider."""
_SEGMENT = re.compile(r"(.{1,255}:\d{1,5})/([0-9a-f]{32})")


class CollectiveTransport:
    """See `Transport`."""

    def __init__(
        self,
        backend: Backend,
        scope: str,
        host: str,
        parcel_bytes: int,
        *,
        wait_s: float = WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`host`: where this side listens. `wait_s`: for the other side to join, and for each parcel."""
        self.name = backend.name
        self.scope = scope
        self._backend = backend
        self._host = host
        self._wait_s = wait_s
        self._clock = clock
        self._pool = BufferPool(parcel_bytes)
        self._parcel_bytes = parcel_bytes
        self._meeting: Meeting | None = None
        self._sending: dict[bytes, Pair] = {}
        self._receiving: dict[str, Pair] = {}

    def post(self, parts: Sequence[Payload], link: bytes) -> Posted | None:
        pair = self._sender(link)
        if pair is None or sum(len(p) for p in parts) > self._parcel_bytes:
            return None
        parcel = torch.from_numpy(self._pool.joined(parts))
        if not pair.put(lambda group: group.send(parcel)):
            return None
        number, pair.next_number = pair.next_number, pair.next_number + 1
        return Posted(Place(self.name, pair.name, number, 0), None)

    def _sender(self, link: bytes) -> Pair | None:
        pair = self._sending.get(link)
        if pair is not None and not pair.ended:
            return pair
        now = self._clock()
        if pair is not None and pair.failure and now < pair.began + REBUILD_S:
            return None
        try:
            self._meeting = self._meeting or Meeting(self._host)
        except (OSError, RuntimeError):
            return None
        while len(self._sending) >= MAX_PAIRS:
            self._sending.pop(next(iter(self._sending))).abandon("too many pairs")
        pair = self._pair(f"{self._meeting.address}/{secrets.token_hex(16)}", SENDER)
        self._sending[link] = pair
        return pair

    def _pair(self, name: str, rank: int) -> Pair:
        address, _, group = name.rpartition("/")
        join = partial(Group, self._backend, address, group, rank, self._host, self._wait_s)
        return Pair(name, join, IDLE_S if rank == SENDER else None, self._clock)

    def take(self, place: Place, size: int, frame: Payload | None) -> Landing:
        pair = self._receiver(place.segment)
        if pair.failure:
            raise TransportFault(pair.failure)
        if place.slot != pair.next_number or not 0 <= size <= LARGER * self._parcel_bytes:
            pair.abandon("a parcel's message was lost, or is none")
            raise TransportFault(pair.failure)
        pair.next_number += 1
        buffer = self._pool.get(max(size, self._parcel_bytes))
        landing = Arriving(pair, buffer, size, self._clock, self._wait_s + SLACK_S)
        pair.put(landing.move)
        return landing

    def _receiver(self, name: str) -> Pair:
        pair = self._receiving.get(name)
        if pair is None:
            found = _SEGMENT.fullmatch(name)
            if found is None:
                raise TransportFault("not the name of a group")
            check_address(found[1])
            while len(self._receiving) >= MAX_PAIRS:
                self.forget(next(iter(self._receiving)))
            pair = self._receiving[name] = self._pair(name, RECEIVER)
        return pair

    def skip(self, place: Place, size: int) -> None:
        """The parcels after it come only when this one has."""
        try:
            self.take(place, size, None)
        except TransportFault:
            return

    def reclaim(self, slot: int, seq: int) -> None:
        """A parcel is copied when it is posted, and sent in its turn."""

    def forget(self, segment: str) -> None:
        pair = self._receiving.pop(segment, None)
        if pair is not None:
            pair.abandon("the holder is gone")

    def close(self) -> None:
        pairs = [*self._sending.values(), *self._receiving.values()]
        self._sending.clear()
        self._receiving.clear()
        for pair in pairs:
            pair.abandon("this endpoint is closed")
        limit = time.monotonic() + self._wait_s + SLACK_S
        for pair in pairs:
            pair.wait(max(0.0, limit - time.monotonic()))
        self._meeting = None
