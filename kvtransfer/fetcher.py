"""The I/O of the fetching side: one DEALER per holder around `fetching.step`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import zmq

from kvtransfer import fetching
from kvtransfer import fetching_state as fs
from kvtransfer.channel import Opener, Unsealable, hello, new_link
from kvtransfer.events import BlockArrived, Counters, Event, FetchEnded, Noted
from kvtransfer.integrity import is_intact, seal, unseal
from kvtransfer.link import Heard, Link, LinkKey
from kvtransfer.messages import BlockHeader, Blocks, Offer, SlotsReturned
from kvtransfer.protocol import ANSWER_S, MAX_CONTROL_BYTES, Wanted, window_blocks
from kvtransfer.sockets import (
    DENIED,
    FAILED_CONNECTS,
    LOST,
    RETRIED,
    Context,
    DialRefused,
    Socket,
    addresses,
    close_monitored,
    monitor_of,
    open_dealer,
    read_monitor,
    send,
)
from kvtransfer.transports.base import Landing, Payload, Transport, TransportFault, parcel_bytes
from kvtransfer.transports.choice import offers
from kvtransfer.transports.inline import NAME as INLINE
from kvtransfer.transports.pool import BufferPool
from mesh.errors import BadFrame, KvmeshError
from mesh.keys import Keys
from mesh.layout import KvLayout
from mesh.messages import Peer
from mesh.wire import KV, Envelope

RECEIVE_MESSAGES = 64
RECEIVE_BYTES = 8 << 20
"""Read from a connection at once: what is handed over is still in the cache when it is scattered (measured: twice the
bandwidth of 64 MiB), and shared-memory slots return while the holder still has others."""
LINK_IDLE_S = 30.0
"""A connection without transfers is closed; the next fetch opens another in about a millisecond."""
PROBE_S = 30.0
"""A transport that failed with one holder is left for so long, then offered to it once more: what was wrong may be
over, and a probe costs no more than one refetch."""
LANDING_POLL_S = 0.001
"""Bytes that are still landing are looked for so often; a window is bytes for several such turns."""
MAX_BEHIND = 1024
"""Messages of one holder that wait behind such bytes; then its connection is not read."""
MAX_WAITING = 2048
"""Messages kept for a holder that has not greeted yet; the fetches among them end by their deadline."""
WATCHED = LOST | RETRIED
NO_GREETING = "the holder's greeting did not come, or cannot be read"
"""Nothing is said before it, so the next fetch needs another connection."""


class PeerRefused(KvmeshError):
    """This holder speaks another protocol, or none of its blocks can be converted to one's own layout."""


class Fetcher:
    """Used by one thread; events go to `emit`."""

    def __init__(
        self,
        context: Context,
        incarnation: int,
        layout: KvLayout,
        transports: dict[str, Transport],
        counters: Counters,
        clock: Callable[[], float],
        emit: Callable[[Event], None],
        keys: Keys | None = None,
    ) -> None:
        self._context = context
        self._me = incarnation
        self._layout = layout
        self._transports = transports
        self._counters = counters
        self._clock = clock
        self._emit = emit
        self._keys = keys
        self._pool = BufferPool(parcel_bytes(layout.block_bytes))
        """What sealed payloads are opened into."""
        self._links: dict[LinkKey, Link] = {}
        self._by_socket: dict[Socket, Link] = {}
        self._by_transfer: dict[bytes, Link] = {}

    @property
    def sockets(self) -> list[Socket]:
        return list(self._by_socket)

    @property
    def num_links(self) -> int:
        return len(self._links)

    @property
    def num_transfers(self) -> int:
        return len(self._by_transfer)

    def queued(self, peer: Peer) -> int:
        """Blocks that are awaited from `peer`."""
        link = self._links.get((peer.kv_address, peer.incarnation))
        return 0 if link is None else sum(t.pending.bit_count() for t in link.state.transfers.values())

    def next_deadline(self) -> float:
        if any(link.behind for link in self._links.values()):
            return self._clock() + LANDING_POLL_S
        nearest = [link.due if link.state.transfers else link.idle_since + LINK_IDLE_S for link in self._links.values()]
        return min(nearest, default=float("inf"))

    def fetch(
        self,
        transfer_id: bytes,
        attempt: int,
        peer: Peer,
        stream: str,
        wanted: Sequence[Wanted],
        deadline_s: float,
    ) -> None:
        if transfer_id in self._by_transfer:
            raise ValueError("a transfer id is used once")
        try:
            link = self._link_to(peer)
        except (
            zmq.ZMQError,
            DialRefused,
            PeerRefused,
        ) as error:  # an address that is none is a peer that cannot be reached
            outcome = "peer_lost" if isinstance(error, zmq.ZMQError) else "refused"
            self._counters.end(outcome)
            missing = tuple(w.index for w in wanted)
            self._emit(FetchEnded(transfer_id, missing, outcome, 0, 0.0, 0, str(error)))
            return
        self._by_transfer[transfer_id] = link
        self._probe(link)
        self._apply(link, fs.Start(transfer_id, attempt, stream, tuple(wanted), deadline_s))

    def abort(self, transfer_id: bytes) -> None:
        link = self._by_transfer.get(transfer_id)
        if link is not None:
            self._apply(link, fs.Abort(transfer_id))

    def _link_to(self, peer: Peer) -> Link:
        key = (peer.kv_address, peer.incarnation)
        link = self._links.get(key)
        if link is None:
            link = self._links[key] = self._open(key, peer)
            for socket in (link.dealer, link.inbound, *link.monitors):
                self._by_socket[socket] = link
        return link

    def _open(self, key: LinkKey, peer: Peer) -> Link:
        """Raises `zmq.ZMQError`, `DialRefused` or `PeerRefused`."""
        version, layout = KV.common(peer.kv), peer.layout or self._layout
        refused = self._layout.taking(layout).refused
        if version is None:
            raise PeerRefused(f"{peer.worker_id} speaks KV protocol {peer.kv} and this worker {KV}")
        if refused:
            raise PeerRefused(f"layout: {refused}")
        control, bulk = addresses(peer.kv_address, self._keys)
        size = layout.block_bytes
        now = self._clock()
        state = fs.Fetching(
            self._me,
            peer.incarnation,
            layout,
            offers(self._transports),
            (Offer(INLINE, self._transports[INLINE].scope),),
            window_blocks(size),
        )
        if not bulk or self._keys is None:
            dealer = open_dealer(self._context, control, size)
            return Link(key, dealer, dealer, (monitor_of(dealer, WATCHED),), state, now, now, size, version, None)
        name = new_link()
        dealer = open_dealer(self._context, control, size, keys=self._keys, link=name)
        greeting = hello(self._keys.transfer, name)
        try:
            inbound = open_dealer(self._context, bulk, size, link=name, hello=greeting)
        except zmq.ZMQError:
            dealer.close()
            raise
        inbound.send(greeting)
        monitors = (monitor_of(dealer, WATCHED | DENIED), monitor_of(inbound, WATCHED | DENIED))
        opener = Opener(self._keys.transfer, name, self._pool)
        return Link(key, dealer, inbound, monitors, state, now, now, size, version, opener)

    def _apply(self, link: Link, event: fs.Event) -> None:
        after, effects = fetching.step(link.state, event, self._clock())
        if after is not link.state:
            link.state, link.due = after, fetching.next_deadline(after)
        for effect in effects:
            self._do(link, effect)
        if link.state.transfers:
            link.idle_since = self._clock()

    def _do(self, link: Link, effect: fs.Effect) -> None:
        if isinstance(effect, fs.Deliver):
            self._counters.blocks_in += 1
            self._emit(BlockArrived(effect.transfer_id, effect.index, effect.payload))
        elif isinstance(effect, fs.Send):
            self._send(link, effect.message)
        elif isinstance(effect, fs.DeliverNote):
            self._emit(Noted(effect.transfer_id, effect.payload))
        elif isinstance(effect, fs.Ended):
            self._ended(effect)
        else:
            self._counters.drop(effect.reason)
            self._counters.corrupt += effect.reason in ("digest", "identity", "index")

    def _ended(self, effect: fs.Ended) -> None:
        del self._by_transfer[effect.transfer_id]
        self._counters.end(effect.outcome)
        self._emit(
            FetchEnded(
                effect.transfer_id,
                effect.missing,
                effect.outcome,
                effect.num_bytes,
                effect.seconds,
                effect.corrupt,
                effect.detail,
            )
        )

    def _send(self, link: Link, message: object) -> None:
        frame = seal(message, self._me, link.state.holder, link.version)
        if link.opener is not None and not link.opener.is_open:
            if len(link.waiting) < MAX_WAITING:
                link.waiting.append(frame)
            else:
                self._counters.drop("backlog")
            return
        self._send_frame(link, frame)

    def _send_frame(self, link: Link, frame: bytes) -> None:
        try:
            send(link.dealer, (frame,), None)
        except zmq.ZMQError:  # the queue is full: the lease or the next `Standing` will tell
            self._counters.drop("backlog")

    def receive(self, socket: Socket) -> None:
        link = self._by_socket.get(socket)
        if link is None:  # closed since the caller polled
            return
        if socket in link.monitors:
            self._monitor(link, socket)
        else:
            self._read(link)
        if link.refused:
            self._lose(link, link.refused)

    def _read(self, link: Link) -> int:
        """Reads a bounded number of messages; returns how many there were."""
        count = size = 0
        while count < RECEIVE_MESSAGES and size < RECEIVE_BYTES and len(link.behind) < MAX_BEHIND:
            try:
                frames = link.inbound.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            count += 1
            size += self._frames(link, frames)
        self._return_slots(link)
        return count

    def _return_slots(self, link: Link) -> None:
        for transport, slots in link.returned.items():
            self._send(link, SlotsReturned(transport, tuple(slots)))
        link.returned.clear()

    def _frames(self, link: Link, frames: list[zmq.Frame]) -> int:
        """Takes one message in; returns the bytes of its blocks."""
        if len(frames) > 2:
            self._counters.drop("frames")
            return 0
        head: Payload = frames[0].buffer
        payload: Payload | None = frames[1].buffer.toreadonly() if len(frames) == 2 else None
        if link.opener is not None:
            opened = self._unsealed(link, link.opener, head, payload)
            if opened is None:
                return 0
            head, payload = opened
        if len(head) > MAX_CONTROL_BYTES:
            self._counters.drop("frames")
            return 0
        try:
            envelope = unseal(head)
        except BadFrame:
            self._counters.drop("bad_frame")
            return 0
        taken: Payload | Landing = b""
        if isinstance(envelope.message, Blocks):
            taken = self._take(link, envelope.message, payload)
        if link.behind or not isinstance(taken, bytes | memoryview):
            link.behind.append(Heard(envelope, taken))
            return 0
        self._heard(link, envelope, taken)
        return len(taken)

    def _heard(self, link: Link, envelope: Envelope, payload: Payload) -> None:
        if isinstance(envelope.message, Blocks):
            self._blocks(link, envelope, envelope.message, payload)
        else:
            self._apply(link, fs.Received(envelope.sender, envelope.receiver, envelope.message))

    def _land(self, link: Link) -> None:
        """Takes in what has landed, and the messages after it."""
        while link.behind:
            envelope, payload = link.behind[0].envelope, link.behind[0].payload
            if not isinstance(payload, bytes | memoryview):
                landed = self._landed(link, envelope.message, payload)
                if landed is None:
                    break
                payload = landed
            link.behind.popleft()
            self._heard(link, envelope, payload)
        self._return_slots(link)

    def _landed(self, link: Link, message: Blocks, landing: Landing) -> Payload | None:
        try:
            payload = landing.payload()
        except TransportFault:
            self._fault(link, message.place.transport)
            return b""
        if payload is not None:
            self._counters.received(message.place.transport, len(payload))
        return payload

    def _unsealed(
        self, link: Link, opener: Opener, frame: Payload, payload: Payload | None
    ) -> tuple[Payload, Payload | None] | None:
        """The message in sealed frames; None: the greeting, or nothing of this session."""
        greeted = opener.is_open
        try:
            opened = opener.open(frame, payload)
        except Unsealable as error:
            self._counters.drop(error.reason)
            link.refused = link.refused if greeted else NO_GREETING
            return None
        if greeted:
            return opened
        waiting, link.waiting = link.waiting, []
        for said in waiting:
            self._send_frame(link, said)
        return None

    def _blocks(self, link: Link, envelope: Envelope, message: Blocks, payload: Payload) -> None:
        place = message.place
        if place.transport != INLINE and place.transport in self._transports:
            link.returned.setdefault(place.transport, []).append((place.slot, place.seq))
        arrivals = []
        at = 0
        for header in message.blocks:
            part = payload[at : at + link.block_bytes]
            at += link.block_bytes
            arrivals.append(self._check(link, envelope, message, header, part))
        self._apply(
            link,
            fs.BlocksIn(envelope.sender, envelope.receiver, message.transfer_id, message.attempt, tuple(arrivals)),
        )

    def _check(self, link: Link, envelope: Envelope, message: Blocks, header: BlockHeader, part: Payload) -> fs.Arrival:
        intact = len(part) == link.block_bytes and is_intact(
            header, message.transfer_id, message.attempt, envelope.sender, envelope.receiver, part
        )
        return fs.Arrival(header.index, header.name, header.valid_tokens, part, intact)

    def _take(self, link: Link, message: Blocks, frame: Payload | None) -> Payload | Landing:
        """The bytes of the message's blocks, in our own memory or on their way there; none when they cannot be had."""
        place = message.place
        transport = self._transports.get(place.transport)
        size = len(message.blocks) * link.block_bytes
        if transport is None:
            self._counters.drop("transport")
            return b""
        if message.transfer_id not in link.state.transfers:  # not worth a copy
            transport.skip(place, size)
            return b""
        try:
            payload = transport.take(place, size, frame)
        except TransportFault:
            self._fault(link, place.transport)
            return b""
        if place.segment:
            link.segments[place.segment] = place.transport
        if isinstance(payload, bytes | memoryview):
            self._counters.received(place.transport, size)
        return payload

    def _fault(self, link: Link, transport: str) -> None:
        """The transport is left: the blocks are asked for again by ZeroMQ, and other fetches of this holder use the
        next transport that both have."""
        self._counters.drop("transport")
        if transport != INLINE:
            link.left[transport] = self._clock() + PROBE_S
            self._offer(link)

    def _probe(self, link: Link) -> None:
        """A transport that was left long enough is offered again."""
        due = [transport for transport, at in link.left.items() if self._clock() >= at]
        for transport in due:
            del link.left[transport]
        if due:
            self._offer(link)

    def _offer(self, link: Link) -> None:
        offered = tuple(o for o in offers(self._transports) if o.transport not in link.left)
        link.state = replace(link.state, offers=offered)

    def _monitor(self, link: Link, monitor: Socket) -> None:
        while (event := read_monitor(monitor)) is not None:
            link.failed_connects += event == RETRIED
            if event & DENIED:
                self._counters.drop("unknown_key")
                link.refused = "the holder and this worker do not know each other's keys"
            elif event == LOST or link.failed_connects >= FAILED_CONNECTS:
                while self._read(link):  # what arrived before the end counts
                    pass
                self._lose(link, link.refused or fs.PeerLost().detail)
                return

    def _lose(self, link: Link, detail: str) -> None:
        if self._links.get(link.key) is link:
            self._apply(link, fs.PeerLost(detail))
            self._close(link)

    def tick(self) -> None:
        now = self._clock()
        for link in list(self._links.values()):
            if link.behind:
                self._land(link)
            if link.opener is not None and not link.opener.is_open and now >= link.opened + ANSWER_S:
                self._lose(link, NO_GREETING)
            elif link.state.transfers:
                self._apply(link, fs.Tick())
            elif now >= link.idle_since + LINK_IDLE_S:
                self._close(link)

    def _close(self, link: Link) -> None:
        for segment, transport in link.segments.items():
            self._transports[transport].forget(segment)
        del self._links[link.key]
        for socket in {link.dealer, link.inbound, *link.monitors}:
            del self._by_socket[socket]
        for socket, monitor in zip((link.dealer, link.inbound), link.monitors, strict=False):
            close_monitored(socket, monitor)

    def close(self) -> None:
        for link in list(self._links.values()):
            self._close(link)
