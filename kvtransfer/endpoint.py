"""A worker's door for KV blocks: fetches blocks from other workers and serves its own to them.

Belongs to the worker's I/O thread. Nothing here waits: the caller polls `sockets()` for reading (level-triggered, as
`zmq.Poller` does), passes each ready one to `receive`, and calls `tick` in every round; both return events. What a
call other than these two brings about is returned by the next of them, which `next_deadline` then makes due at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from kvtransfer import holding_state as hs
from kvtransfer.channel import is_hello
from kvtransfer.events import (
    BlockArrived,
    Counters,
    Event,
    FetchEnded,
    NeedBlocks,
    Noted,
    StreamReleased,
    TransferStats,
    WantedChanged,
)
from kvtransfer.fetcher import Fetcher
from kvtransfer.gatherer import Gatherer
from kvtransfer.holder import Holder
from kvtransfer.protocol import MAX_NOTE_BYTES, NAME_BYTES, TRANSFER_ID_BYTES, Wanted
from kvtransfer.sockets import Context, Socket
from kvtransfer.transports.base import Payload, Transport
from kvtransfer.transports.choice import open_transports
from kvtransfer.transports.local import Exchange
from mesh.curve import Authenticator
from mesh.keys import Keys
from mesh.layout import KvLayout
from mesh.messages import KvHolder, Peer

__all__ = [
    "BlockArrived",
    "Event",
    "FetchEnded",
    "KvEndpoint",
    "NeedBlocks",
    "Noted",
    "StreamReleased",
    "TransferStats",
    "Wanted",
    "WantedChanged",
]


def _unchanged(transport: Transport) -> Transport:
    return transport


class KvEndpoint:
    """See the module. Raises `StartupError` when it cannot listen on `bind` or a transport's name is unknown."""

    def __init__(
        self,
        *,
        context: Context,
        bind: str,
        worker_id: str,
        incarnation: int,
        host: str,
        layout: KvLayout,
        transports: tuple[str, ...],
        clock: Callable[[], float],
        exchange: Exchange | None = None,
        wrap: Callable[[Transport], Transport] = _unchanged,
        keys: Keys | None = None,
        device: str = "cpu",
    ) -> None:
        """`exchange`: shared by endpoints of one process that use `local`. `wrap`: puts faults around a transport.
        `device`: where the blocks are computed.

        With `keys`, tcp is encrypted: one such endpoint per context, because a context has one judge of client keys.
        """
        self.worker_id = worker_id
        self.layout = layout
        self._clock = clock
        self._events: list[Event] = []
        self._closed = False
        self._counters = Counters()
        opened = open_transports(
            transports, host=host, block_bytes=layout.block_bytes, exchange=exchange, bind=bind, device=device
        )
        self._transports = {name: wrap(transport) for name, transport in opened.items()}
        emit = self._events.append
        parts = (incarnation, layout, self._transports, self._counters, clock, emit)
        self._authenticator = (
            Authenticator(context, frozenset({keys.worker}), partial(is_hello, keys.transfer))
            if keys is not None
            else None
        )
        try:
            self._holder = Holder(context, bind, *parts, keys)
        except BaseException:
            self._close_parts()
            raise
        self._fetcher = Fetcher(context, *parts, keys)
        self._gatherer = Gatherer(self._fetcher, host, layout, clock, emit)
        self.address = self._holder.address
        self.peer = Peer(worker_id, incarnation, self.address, host, layout)
        """How other workers name this endpoint."""

    def fetch(
        self,
        transfer_id: bytes,
        attempt: int,
        peer: Peer,
        stream: str,
        wanted: Sequence[Wanted],
        deadline_s: float,
    ) -> None:
        """Asks `peer` for blocks; ends with `FetchEnded`, after `deadline_s` seconds at the latest.

        Blocks are named, sized and delivered as `peer` has them, in its layout; it is refused when no block of it could
        be converted to this endpoint's.
        With a `stream`, the transfer lasts until the peer closes it and hears its notes (so `wanted` may be empty).
        With an empty `stream`, it brings what the peer holds now. `transfer_id` is 16 random bytes, used once.
        """
        self._check_fetch(transfer_id, wanted)
        self._fetcher.fetch(transfer_id, attempt, peer, stream, wanted, deadline_s)

    def gather(
        self,
        transfer_id: bytes,
        attempt: int,
        maker: Peer | None,
        stream: str,
        holders: Sequence[KvHolder],
        wanted: Sequence[Wanted],
        deadline_s: float,
    ) -> None:
        """As `fetch`, from several workers at once: what `holders` have comes from them, the rest from the `maker` of
        `stream`, if there is one, all in one layout; what one has not got or fails to bring is asked of the others. One
        transfer to the caller: each block and note once, and one `FetchEnded` that misses what nobody had."""
        self._check_fetch(transfer_id, wanted)
        self._gatherer.gather(transfer_id, attempt, maker, stream, holders, wanted, deadline_s)

    def abort_fetch(self, transfer_id: bytes) -> None:
        """Ends a transfer in whatever state; one that is not known has ended already."""
        self._gatherer.abort(transfer_id)
        self._fetcher.abort(transfer_id)

    def open_stream(self, stream: str) -> None:
        """From now on fetches of `stream` are served as its blocks are produced, and earlier ones begin."""
        self._holder.apply(hs.OpenStream(stream))

    def note(self, stream: str, payload: bytes) -> None:
        """Sends `payload` to every fetcher of `stream`, those that come later included."""
        if len(payload) > MAX_NOTE_BYTES:
            raise ValueError(f"a note has at most {MAX_NOTE_BYTES} bytes")
        self._holder.apply(hs.GiveNote(stream, payload))

    def produced(self, stream: str, name: bytes, payload: Payload) -> None:
        """A block of `stream` is complete; `payload`'s `layout.block_bytes` bytes must not change afterwards."""
        self._check(payload)
        self._holder.give(stream, name, payload)

    def close_stream(self, stream: str) -> None:
        """Nothing more is produced. What is held stays fetchable by `NeedBlocks` until the stream is released."""
        self._holder.apply(hs.CloseStream(stream))

    def release_stream(self, stream: str) -> None:
        """The worker gives the stream up by itself; no `StreamReleased` follows."""
        self._holder.apply(hs.ReleaseStream(stream))

    def provide(self, name: bytes, payload: Payload | None) -> None:
        """Answers `NeedBlocks` for one name; None: not held."""
        if payload is not None:
            self._check(payload)
        self._holder.give(None, name, payload)

    def wants(self, stream: str) -> frozenset[bytes]:
        """Names of blocks that the fetchers of `stream` still wait for."""
        return self._holder.wants(stream)

    def sockets(self) -> list[Socket]:
        """To be polled for reading; changes as connections come and go."""
        return [*self._holder.sockets, *self._fetcher.sockets]

    def receive(self, socket: Socket) -> list[Event]:
        """Reads what came on `socket`, a bounded number of messages; whatever it is, nothing is raised."""
        if socket is self._holder.router:
            self._holder.receive()
        elif socket is self._holder.out:
            self._holder.receive_hellos()
        elif socket is self._holder.monitor:
            self._holder.receive_monitor()
        else:
            self._fetcher.receive(socket)
        return self._drain()

    def tick(self) -> list[Event]:
        """Does what is due: deadlines, leases, blocks that waited to leave together."""
        self._fetcher.tick()
        self._holder.tick()
        return self._drain()

    def next_deadline(self) -> float:
        """When `tick` has something to do at the latest, by the endpoint's clock; infinity: never."""
        if self._events:
            return self._clock()
        return min(self._fetcher.next_deadline(), self._holder.next_deadline())

    def stats(self) -> TransferStats:
        c = self._counters
        dropped = dict(c.dropped)
        if self._authenticator is not None:
            dropped["client_key"] = self._authenticator.refused
            dropped["hello"] = dropped.get("hello", 0) + self._authenticator.refused_hellos
        return TransferStats(
            fetching=self._fetcher.num_transfers,
            serving=len(self._holder.state.servings),
            held_streams=len(self._holder.state.streams),
            links=self._fetcher.num_links,
            slots=self._holder.num_slots,
            bytes_in=dict(c.bytes_in),
            bytes_out=dict(c.bytes_out),
            blocks_in=c.blocks_in,
            blocks_out=c.blocks_out,
            corrupt=c.corrupt,
            dropped=dropped,
            ended=dict(c.ended),
        )

    def close(self) -> None:
        """Closes every socket and segment; the peers find out at once. Twice is once."""
        if self._closed:
            return
        self._closed = True
        self._fetcher.close()
        self._holder.close()
        self._close_parts()

    def _close_parts(self) -> None:
        if self._authenticator is not None:
            self._authenticator.close()
        for transport in self._transports.values():
            transport.close()

    def _drain(self) -> list[Event]:
        events: list[Event] = []
        while self._events:  # what one holder leaves is asked of another, and that may end at once
            fresh = self._events[:]
            self._events.clear()
            for event in fresh:
                events += self._gatherer.told(event)
            events += self._gatherer.settle()
        return events

    def _check_fetch(self, transfer_id: bytes, wanted: Sequence[Wanted]) -> None:
        if len(transfer_id) != TRANSFER_ID_BYTES or any(len(w.name) != NAME_BYTES for w in wanted):
            raise ValueError(f"a transfer id has {TRANSFER_ID_BYTES} bytes and a block's name {NAME_BYTES}")

    def _check(self, payload: Payload) -> None:
        if len(payload) != self.layout.block_bytes:
            raise ValueError(f"a block has {self.layout.block_bytes} bytes, not {len(payload)}")
