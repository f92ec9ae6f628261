"""The I/O of the holding side: one ROUTER for all fetchers around `holding.step`."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter

import zmq

from kvtransfer import holding
from kvtransfer import holding_state as hs
from kvtransfer.events import Counters, Event, NeedBlocks, StreamReleased, WantedChanged
from kvtransfer.integrity import digest, seal, unseal
from kvtransfer.messages import BlockHeader, Blocks, Offer, SlotsReturned, Standing
from kvtransfer.protocol import MAX_CONTROL_BYTES, Wanted
from kvtransfer.sealing import Sealing
from kvtransfer.sockets import (
    LOST,
    Context,
    Socket,
    close_monitored,
    monitor_of,
    open_bulk_router,
    open_router,
    read_monitor,
    send,
)
from kvtransfer.transports.base import Payload, Transport, parcel_bytes
from kvtransfer.transports.choice import choose
from kvtransfer.transports.inline import NAME as INLINE
from mesh.curve import is_ipc
from mesh.errors import BadFrame
from mesh.keys import Keys
from mesh.layout import KvLayout
from mesh.wire import Envelope

RECEIVE_BUDGET = 256
"""Messages read from a socket at once, so that one busy peer does not keep the I/O thread from the others."""
PROBE_S = 0.02
PROBES = 5
"""The monitor says that a connection broke but not whose: for a moment every fetcher is written to."""


@dataclass(slots=True, eq=False)
class Parcel:
    """Blocks of one transfer that will leave in one message."""

    link: bytes
    fetcher: int
    transfer_id: bytes
    attempt: int
    offers: tuple[Offer, ...]
    blocks: list[tuple[Wanted, Payload]] = field(default_factory=list)
    size: int = 0


class Holder:
    """Used by one thread; events go to `emit`."""

    def __init__(
        self,
        context: Context,
        bind: str,
        incarnation: int,
        layout: KvLayout,
        transports: dict[str, Transport],
        counters: Counters,
        clock: Callable[[], float],
        emit: Callable[[Event], None],
        keys: Keys | None = None,
    ) -> None:
        self.router, self.address = open_router(context, bind, layout.block_bytes, keys)
        self.out = self.router
        """What fetchers are told goes out here: with keys and over tcp, a socket of its own, see `channel`."""
        self._sealing = Sealing(keys.transfer, layout) if keys is not None and not is_ipc(bind) else None
        if self._sealing is not None:
            try:
                self.out, self.address = open_bulk_router(context, bind, self.address)
            except BaseException:
                self.router.close()
                raise
        self.monitor = monitor_of(self.out, LOST)
        self.state = hs.Holding(incarnation, layout)
        self._due = math.inf
        """When a tick of this state has something to do."""
        self._me = incarnation
        self._parcel_bytes = parcel_bytes(layout.block_bytes)
        self._transports = transports
        self._counters = counters
        self._clock = clock
        self._emit = emit
        self._parcels: dict[hs.Key, Parcel] = {}
        self._slots: dict[hs.Key, set[tuple[str, int, int]]] = {}
        self._owner: dict[tuple[str, int, int], hs.Key] = {}
        self._lost: list[bytes] = []
        self._fresh: list[tuple[str | None, bytes, Payload | None]] = []
        """Blocks given by the engine and not yet to the protocol: (stream or None for an answer, name, bytes)."""
        self._fresh_size = 0
        self._probes = 0
        self._probe_at = 0.0
        self._answering = (0, 0)
        """Incarnation and version in the envelope that is being answered."""

    @property
    def sockets(self) -> list[Socket]:
        bulk = [] if self.out is self.router else [self.out]
        return [self.router, self.monitor, *bulk]

    @property
    def num_slots(self) -> int:
        return len(self._owner)

    def wants(self, stream: str) -> frozenset[bytes]:
        if self._fresh:
            self._take_fresh()
        return self.state.wants(stream)

    def next_deadline(self) -> float:
        if self._parcels or self._fresh:
            return self._clock()
        return min(self._due, self._probe_at) if self._probes else self._due

    def give(self, stream: str | None, name: bytes, payload: Payload | None) -> None:
        """A block from the engine: produced for `stream`, or (None) the answer to `NeedBlocks`."""
        self._fresh.append((stream, name, payload))
        self._fresh_size += len(payload) if payload is not None else 0
        if self._fresh_size >= self._parcel_bytes:
            self._take_fresh()

    def _take_fresh(self) -> None:
        """One step for each run of blocks of one kind: a step costs the same for one block as for many."""
        fresh, self._fresh, self._fresh_size = self._fresh, [], 0
        for stream, run in groupby(fresh, key=itemgetter(0)):
            blocks = [(name, payload) for _, name, payload in run]
            if stream is None:
                self._step(hs.Provided(tuple(blocks)))
            else:
                self._step(hs.Produced(stream, tuple((n, p) for n, p in blocks if p is not None)))

    def apply(self, event: hs.Event) -> None:
        """One step of the protocol, its effects done, after everything that was given before."""
        if self._fresh:
            self._take_fresh()
        self._step(event)

    def _step(self, event: hs.Event) -> None:
        after, effects = holding.step(self.state, event, self._clock())
        if after is not self.state:
            self.state, self._due = after, holding.next_deadline(after)
        for effect in effects:
            self._do(effect)
        self._step_lost()

    def _step_lost(self) -> None:
        while self._lost:
            link = self._lost.pop()
            if self._sealing is not None:
                self._sealing.forget(link)
            self._step(hs.LinkLost(link))

    def _do(self, effect: hs.Effect) -> None:
        if isinstance(effect, hs.SendBlocks):
            self._load(effect)
        elif isinstance(effect, hs.Send):
            self._flush_link(effect.link)  # what was produced before a message arrives before it
            self._send(effect.link, seal(effect.message, self._me, *self._fetcher_of(effect.link)), None)
        elif isinstance(effect, hs.Need):
            self._emit(NeedBlocks(effect.stream, effect.names))
        elif isinstance(effect, hs.WantsChanged):
            self._emit(WantedChanged(effect.stream, self.state.wants(effect.stream)))
        elif isinstance(effect, hs.Released):
            self._emit(StreamReleased(effect.stream, effect.reason))
        elif isinstance(effect, hs.Finished):
            self._finish((effect.link, effect.transfer_id))
        else:
            self._counters.drop(effect.reason)

    def _fetcher_of(self, link: bytes) -> tuple[int, int]:
        """Its incarnation, and the version of the protocol for it."""
        lease = self.state.leases.get(link)  # a link without a transfer is only ever answered
        return (lease.fetcher, lease.version) if lease is not None else self._answering

    def _load(self, effect: hs.SendBlocks) -> None:
        """Puts blocks into the transfer's parcel; a full parcel leaves."""
        key = (effect.link, effect.transfer_id)
        for wanted, payload in effect.blocks:
            parcel = self._parcels.get(key)
            if parcel is not None and (
                parcel.size + len(payload) > self._parcel_bytes or parcel.offers != effect.offers
            ):
                self._post(self._parcels.pop(key))
                parcel = None
            if parcel is None:
                parcel = self._parcels[key] = Parcel(
                    effect.link, effect.fetcher, effect.transfer_id, effect.attempt, effect.offers
                )
            parcel.blocks.append((wanted, payload))
            parcel.size += len(payload)
            if parcel.size >= self._parcel_bytes:
                self._post(self._parcels.pop(key))

    def flush(self) -> None:
        """Sends everything that was given."""
        if self._fresh:
            self._take_fresh()
        for key in list(self._parcels):
            self._post(self._parcels.pop(key))
        self._step_lost()

    def _flush_link(self, link: bytes) -> None:
        for key in [k for k in self._parcels if k[0] == link]:
            self._post(self._parcels.pop(key))

    def _post(self, parcel: Parcel) -> None:
        parts = [payload for _, payload in parcel.blocks]
        transport = choose(parcel.offers, self._transports)
        posted = transport.post(parts, parcel.link)
        if posted is None:
            transport = self._transports[INLINE]
            posted = transport.post(parts, parcel.link)
        if posted is None:
            raise AssertionError("the connection always has room")
        head = (parcel.transfer_id, parcel.attempt, self._me, parcel.fetcher)
        headers = tuple(
            BlockHeader(w.index, w.name, w.valid_tokens, len(p), digest(*head, w.index, w.name, w.valid_tokens, p))
            for w, p in parcel.blocks
        )
        place = posted.place
        if posted.frame is None:
            key, slot = (parcel.link, parcel.transfer_id), (transport.name, place.slot, place.seq)
            self._slots.setdefault(key, set()).add(slot)
            self._owner[slot] = key
        message = Blocks(parcel.transfer_id, parcel.attempt, place, headers)
        self._counters.sent(transport.name, parcel.size, len(parcel.blocks))
        version = self._fetcher_of(parcel.link)[1]
        self._send(parcel.link, seal(message, self._me, parcel.fetcher, version), posted.frame)

    def _send(self, link: bytes, frame: bytes, payload: Payload | None) -> None:
        if self._sealing is not None:
            sealed = self._sealing.seal(link, frame, payload)
            if sealed is None:  # its bulk connection was never greeted, or is gone
                self._counters.drop("unreachable")
                self._lost.append(link)
                return
            frame, payload = sealed
        try:
            send(self.out, (link, frame), payload)
        except zmq.Again:
            self._counters.drop("backlog")
        except zmq.ZMQError as error:
            self._counters.drop("unreachable")
            if error.errno == errno.EHOSTUNREACH:
                self._lost.append(link)

    def _finish(self, key: hs.Key) -> None:
        """A transfer is over: its parcel and its slots are free. A late reader finds another slot number."""
        self._parcels.pop(key, None)
        for slot in self._slots.pop(key, ()):
            del self._owner[slot]
            self._transports[slot[0]].reclaim(slot[1], slot[2])

    def _returned(self, link: bytes, message: SlotsReturned) -> None:
        for number, seq in message.slots:
            slot = (message.transport, number, seq)
            key = self._owner.get(slot)
            if key is None or key[0] != link:
                self._counters.drop("slot")
                continue
            del self._owner[slot]
            self._slots[key].discard(slot)
            self._transports[slot[0]].reclaim(number, seq)

    def receive(self) -> None:
        for _ in range(RECEIVE_BUDGET):
            try:
                frames = self.router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(frames) != 2 or len(frames[1]) > MAX_CONTROL_BYTES:
                self._counters.drop("frames")
                continue
            try:
                envelope = unseal(frames[1])
            except BadFrame:
                self._counters.drop("bad_frame")
                continue
            self._heard(frames[0], envelope)
        self.flush()

    def receive_hellos(self) -> None:
        """Reads the bulk socket: whoever says the hello of the link that it is, is greeted."""
        if self._sealing is None:
            return
        for _ in range(RECEIVE_BUDGET):
            try:
                frames = self.out.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            link = frames[0]
            greeting = self._sealing.greet(link, frames[1]) if len(frames) == 2 else None
            if greeting is None:
                self._counters.drop("hello")
                continue
            with suppress(zmq.ZMQError):  # gone again, or it does not read: it is no fetcher yet
                send(self.out, (link, greeting), None)

    def _heard(self, link: bytes, envelope: Envelope) -> None:
        if isinstance(envelope.message, SlotsReturned):
            self._returned(link, envelope.message)
            return
        self._answering = (envelope.sender, envelope.version)
        self.apply(hs.Received(link, envelope.sender, envelope.receiver, envelope.message, envelope.version))

    def receive_monitor(self) -> None:
        while (event := read_monitor(self.monitor)) is not None:
            if event == LOST:
                self._probes, self._probe_at = PROBES, self._clock()

    def tick(self) -> None:
        self.flush()
        self.apply(hs.Tick())
        if self._probes and self._clock() >= self._probe_at:
            self._probes, self._probe_at = self._probes - 1, self._clock() + PROBE_S
            for link, lease in self.state.leases.items():
                self._send(link, seal(Standing(0, ()), self._me, lease.fetcher, lease.version), None)
        self.flush()

    def close(self) -> None:
        close_monitored(self.out, self.monitor)
        self.router.close(linger=0)
