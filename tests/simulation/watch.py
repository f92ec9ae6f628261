"""What must hold inside one worker at every moment, seen from between its parts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from decode.role import DecodeJob, DecodeRole
from kvtransfer.endpoint import BlockArrived, FetchEnded, Noted, StreamReleased
from kvtransfer.events import Event as KvEvent
from kvtransfer.fetching_state import Received
from kvtransfer.holding_state import Holding, LinkLost, Tick
from kvtransfer.holding_state import Received as HolderReceived
from kvtransfer.messages import Fetch, Missing
from kvtransfer.protocol import LEASE_TTL_S, MAX_INDEX, RENEW_S, Wanted, bits
from mesh.messages import Abort, KvHolder, Peer
from mesh.pieces import covering
from mesh.wire import Envelope
from tests.simulation.faults import HORIZON_S
from tests.simulation.oracle import Oracle, Violation
from tests.simulation.plan import Plan
from worker.links import ProxyLink
from worker.role import Job, engine_key
from worker.steploop import Expected

REPAIR_S = 2 * RENEW_S + 1.0
"""What was lost is asked for again within this, however its first renewal fared."""
LATE_S = 1.5
"""Deadlines are seen by an idle loop this late."""


@dataclass(slots=True)
class Gathered:
    """One fetch over several holders: what it asked whom for, and what came of it."""

    wanted: dict[int, bytes]
    claims: dict[Peer, int]
    """Blocks that each is thought to have."""
    made: bool
    """By one of them, who says the first token too."""
    deadline: float
    asked: dict[bytes, tuple[Peer, frozenset[int]]] = field(default_factory=dict)
    """Its parts that have not ended."""
    arrived: set[int] = field(default_factory=set)
    tried: set[tuple[Peer, int]] = field(default_factory=set)
    """Who was asked for which block, ever."""
    failed: set[Peer] = field(default_factory=set)

    def ask(self, name: str, part: bytes, peer: Peer, indexes: Sequence[int]) -> None:
        under_way = {index for _, others in self.asked.values() for index in others}
        for index in indexes:
            if index in self.arrived or index in under_way:
                raise Violation(f"{name} asks for block {index} twice")
            if index >= self.claims[peer]:
                raise Violation(f"{name} asks {peer.worker_id} for block {index}, which it is not said to have")
            if (peer, index) in self.tried or peer in self.failed:
                raise Violation(f"{name} asks {peer.worker_id} for block {index} again")
            self.tried.add((peer, index))
        self.asked[part] = (peer, frozenset(indexes))

    def block(self, name: str, index: int) -> None:
        if index in self.arrived or index not in self.wanted:
            raise Violation(f"{name} is given block {index}, which it does not lack")
        self.arrived.add(index)

    def ended(self, event: FetchEnded, peer: Peer) -> None:
        if event.outcome != "ok":
            self.failed.add(peer)

    def not_asked(self, index: int) -> str:
        """Who might have the block and was not asked for it."""
        others = [p for p, blocks in self.claims.items() if index < blocks and p not in self.failed]
        return next((p.worker_id for p in others if (p, index) not in self.tried), "")


class Watch:
    """Stands between the process, its KV endpoint and its role."""

    def __init__(self, host: Any, oracle: Oracle, plan: Plan) -> None:
        """`host`: the `WorkerHost` that makes this."""
        self._host = host
        self._oracle = oracle
        self._gentle = plan.gentle
        self._calm = plan.calm
        self._repaired_at = math.inf if plan.blows else HORIZON_S + REPAIR_S
        self._gathers: dict[bytes, Gathered] = {}
        """Fetches that have not ended."""
        self._wanted: dict[bytes, dict[int, bytes]] = {}
        """Transfers, which are their parts, that have not ended: their blocks' names."""
        self._asked: dict[bytes, Counter[int]] = {}
        """How often each block was asked for; a `Missing` for it counts as often."""
        self._arrived: dict[bytes, set[int]] = {}
        self._noted: set[bytes] = set()
        self._optional: set[bytes] = set()
        """Transfers that need not bring everything."""
        self._rounds: dict[tuple[bytes, bytes], dict[int, int]] = {}
        """How many blocks each round of a transfer from here asked for."""
        self._streams: set[str] = set()
        """All that were ever opened here: a fetch must not find another attempt's."""
        self.fell_short = False
        """A worker that was only asked for what it happens to hold had dropped some of it: a retry may follow."""
        self._absent: set[bytes] = set()
        """Blocks that the engine was asked for in vain, in this turn."""
        self._links_lost: set[bytes] = set()
        """Since the latest tick of the holder began."""
        self._aborted: list[str] = []
        process: Any = host.process
        kv: Any = host.kv
        self._events = process._kv_events
        self._from_proxy = process._from_proxy
        self._gather = kv.gather
        self._fetch = kv._fetcher.fetch
        self._emit = kv._fetcher._emit
        self._lost = process._role.lost
        self._open_stream = kv.open_stream
        self._provide = kv.provide
        self._step = kv._holder._step
        self._send = kv._fetcher._send
        self._received = kv._fetcher._apply
        process._kv_events = self.kv_events
        process._from_proxy = self.from_proxy
        kv.gather = self.gather
        kv._fetcher.fetch = self.fetch
        kv._fetcher._emit = self.part_event
        kv.open_stream = self.open_stream
        kv.provide = self.provide
        process._role.lost = self.lost
        kv._holder._step = self.step
        kv._fetcher._send = self.send
        kv._fetcher._apply = self.received

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
        own = self._host.kv.layout
        claims = {h.peer: h.tokens // (h.peer.layout or own).block_tokens for h in holders}
        claims |= {maker: MAX_INDEX} if maker else {}
        if any(peer.incarnation == self._host.incarnation for peer in claims):
            raise Violation(f"{self._host.name} is told to fetch from itself")
        names, deadline = {w.index: w.name for w in wanted}, self._host.clock() + deadline_s
        self._gathers[transfer_id] = Gathered(names, claims, maker is not None, deadline)
        self._gather(transfer_id, attempt, maker, stream, holders, wanted, deadline_s)

    def fetch(
        self, transfer_id: bytes, attempt: int, peer: Peer, stream: str, wanted: Sequence[Wanted], deadline_s: float
    ) -> None:
        if transfer_id in self._wanted:
            raise Violation(f"{self._host.name} uses a transfer id twice")
        part = self._host.kv._gatherer._parts[transfer_id]
        self._gathers[part.gather.transfer_id].ask(self._host.name, transfer_id, peer, [w.index for w in wanted])
        self._wanted[transfer_id] = {w.index: w.name for w in wanted}
        self._arrived[transfer_id] = set()
        if not part.noted:  # from a worker that holds what it happens to hold
            self._optional.add(transfer_id)
        self._fetch(transfer_id, attempt, peer, stream, wanted, deadline_s)

    def part_event(self, event: KvEvent) -> None:
        """One transfer says something, before the fetch that it is a part of hears it."""
        part = self._host.kv._gatherer._parts[event.transfer_id]  # type: ignore[union-attr]
        gathered = self._gathers[part.gather.transfer_id]
        if isinstance(event, BlockArrived):
            self._block(event)
        elif isinstance(event, FetchEnded):
            self._ended(event)
            gathered.ended(event, gathered.asked.pop(event.transfer_id)[0])
        self._emit(event)

    def send(self, link: Any, message: object) -> None:
        if self._calm and isinstance(message, Fetch) and message.round:
            raise Violation(f"{self._host.name} asks again for blocks though nothing was lost")
        if isinstance(message, Fetch):
            self._asked.setdefault(message.transfer_id, Counter()).update(w.index for w in message.wanted)
        self._send(link, message)

    def received(self, link: Any, event: object) -> None:
        if not isinstance(event, Received) or not isinstance(event.message, Missing):
            self._received(link, event)
            return
        self._asked.setdefault(event.message.transfer_id, Counter()).update(event.message.indexes)
        self._received(link, event)
        transfer = link.state.transfers.get(event.message.transfer_id)
        if (
            transfer is not None
            and (event.sender, event.receiver) == (link.state.holder, link.state.me)
            and event.message.attempt == transfer.attempt
            and any(transfer.pending >> index & 1 for index in event.message.indexes)
        ):
            raise Violation(f"{self._host.name} waits for a block that its holder has not got")

    def step(self, event: object) -> None:
        if isinstance(event, HolderReceived) and isinstance(event.message, Fetch):
            rounds = self._rounds.setdefault((event.link, event.message.transfer_id), {})
            rounds.setdefault(event.message.round, len(event.message.wanted))
        if isinstance(event, LinkLost):
            self._links_lost.add(event.link)
        if not isinstance(event, Tick):
            self._step(event)
            return
        before = self._host.kv._holder.state
        self._links_lost.clear()
        self._step(event)
        self._ticked(before)

    def _ticked(self, before: Holding) -> None:
        """Only what has lapsed may end by the clock alone, or because what the tick had to say found no connection."""
        now, after = self._host.clock(), self._host.kv._holder.state
        for key, serving in before.servings.items():
            lapses = min(serving.expires, before.leases[serving.link].heard_at + LEASE_TTL_S)
            if key not in after.servings and now < lapses and serving.link not in self._links_lost:
                raise Violation(f"{self._host.name} gives a transfer up {lapses - now:.1f} s early")

    def open_stream(self, stream: str) -> None:
        if stream in self._streams:
            raise Violation(f"{self._host.name} calls two streams {stream}")
        self._streams.add(stream)
        self._open_stream(stream)

    def provide(self, name: bytes, payload: Any) -> None:
        if payload is None:
            self._absent.add(name)
        self._provide(name, payload)

    def kv_events(self, events: list[KvEvent]) -> None:
        hopeless = [job for event in events if isinstance(event, FetchEnded) and (job := self._hopeless(event))]
        for event in events:
            if isinstance(event, BlockArrived):
                self._gathers[event.transfer_id].block(self._host.name, event.index)
            elif isinstance(event, Noted):
                if event.transfer_id in self._noted:
                    raise Violation(f"{self._host.name} hears a first token twice")
                self._noted.add(event.transfer_id)
            elif isinstance(event, FetchEnded):
                self._gathered(event)
            elif isinstance(event, StreamReleased) and self._calm and event.reason not in ("confirmed", "aborted"):
                raise Violation(f"{event.stream} is released by {event.reason} though nothing went wrong")
        self._events(events)
        for job in hopeless:
            if self._jobs().get(job.request_id) is job:
                raise Violation(f"{self._host.name} computes what {job.key} lacks, which is more than it may")

    def _hopeless(self, event: FetchEnded) -> DecodeJob | None:
        """The job that has not begun, and from now on lacks more than may be computed here."""
        job = cast(Any, self._host.process._role)._by_transfer.get(event.transfer_id)
        if not isinstance(job, DecodeJob) or job.started or not event.missing:
            return None
        own = self._host.kv.layout.block_tokens
        whole = min(event.missing) * (job.theirs or self._host.kv.layout).block_tokens // own * own
        return job if job.num_tokens - whole > job.recompute_limit else None

    def _block(self, event: BlockArrived) -> None:
        wanted = self._wanted.get(event.transfer_id)
        if wanted is None or event.index not in wanted:
            raise Violation(f"{self._host.name} is given a block that it did not ask for")
        if event.index in self._arrived[event.transfer_id]:
            raise Violation(f"{self._host.name} is given block {event.index} twice")
        self._arrived[event.transfer_id].add(event.index)
        self._oracle.check(wanted[event.index], event.payload, f"{self._host.name} accepts block {event.index}")

    def _ended(self, event: FetchEnded) -> None:
        wanted = self._wanted.pop(event.transfer_id, None)
        arrived = self._arrived.pop(event.transfer_id, set())
        if wanted is None:
            raise Violation(f"{self._host.name}: a transfer ends twice")
        if arrived | set(event.missing) != set(wanted) or arrived & set(event.missing):
            raise Violation(f"{self._host.name}: blocks {event.missing} are missing, {sorted(arrived)} came")
        asked = self._asked.pop(event.transfer_id, Counter())
        if event.outcome == "aborted":
            return
        if event.outcome == "ok" and any(asked[index] < 2 for index in event.missing):
            raise Violation(f"{self._host.name} gives blocks up that it has asked for once")
        missing = event.missing and event.transfer_id not in self._optional
        if event.missing and event.transfer_id in self._optional:
            self.fell_short = True
        if event.outcome == "timeout" and self._host.timeline.now > self._repaired_at:
            raise Violation(f"{self._host.name}: a fetch ends by timeout though nothing is lost any more")
        if self._gentle and (event.outcome != "ok" or missing):
            raise Violation(f"{self._host.name}: a fetch ends by {event.outcome} without {event.missing}")

    def _gathered(self, event: FetchEnded) -> None:
        gathered = self._gathers.pop(event.transfer_id, None)
        if gathered is None:
            raise Violation(f"{self._host.name}: a fetch ends twice")
        if gathered.arrived | set(event.missing) != set(gathered.wanted) or gathered.arrived & set(event.missing):
            raise Violation(f"{self._host.name}: blocks {event.missing} are missing, {sorted(gathered.arrived)} came")
        if gathered.asked:
            raise Violation(f"{self._host.name}: a fetch ends before its parts")
        if event.outcome == "aborted":
            return
        for index in event.missing if self._host.clock() < gathered.deadline else ():
            if forgotten := gathered.not_asked(index):
                raise Violation(f"{self._host.name} gives block {index} up and has not asked {forgotten} for it")
        if self._calm and gathered.made and event.transfer_id not in self._noted:
            raise Violation(f"{self._host.name} is not told the first token though nothing went wrong")

    def from_proxy(self, link: ProxyLink, envelope: Envelope, now: float) -> None:
        self._from_proxy(link, envelope, now)
        if isinstance(envelope.message, Abort):
            self._is_aborted(envelope.message)

    def _is_aborted(self, message: Abort) -> None:
        for job in self._jobs().values():
            if job.request_id == message.request_id and job.attempt <= message.attempt:
                raise Violation(f"{self._host.name} goes on with {job.key}, which was aborted")
        self._aborted.append(engine_key(message.request_id, message.attempt))

    def lost(self, link: ProxyLink) -> None:
        self._lost(link)
        if any(job.link is link for job in self._jobs().values()):
            raise Violation(f"{self._host.name} goes on for a proxy that is gone")

    def _jobs(self) -> dict[str, Job]:
        role = cast(Any, self._host.process._role)
        return cast("dict[str, Job]", role._jobs if isinstance(role, DecodeRole) else role._streams)

    def expects(self, event: Expected) -> None:
        """The engine says which blocks a request lacks: the others it holds for it."""
        request = self._host.engine._requests[event.key]
        own = self._host.kv.layout
        job = next((j for j in self._jobs().values() if j.key == event.key), None)
        theirs, missing = getattr(job, "theirs", None) or own, {m.index for m in event.missing}
        for index in range(len(request.tokens) // own.block_tokens if job is not None else 0):
            wanted = missing.issuperset(covering(own, theirs, (index,), len(request.tokens)))
            if not wanted and index not in request.fetched_pages:
                raise Violation(f"{self._host.name} neither holds nor wants a block of {event.key}")

    def looped(self) -> None:
        """After a turn of the step loop."""
        for request in self._host.engine._fetching._requests.values():
            if request.num_preemptions and request.fetched_pages:
                raise Violation(f"{self._host.name} goes on filling pages for {request.key}, which gave its pages up")
        for key in self._aborted:
            if key in self._host.engine._requests:
                raise Violation(f"{self._host.name} computes {key}, which was aborted")
        self._aborted.clear()

    def turned(self) -> None:
        """After a turn of the I/O loop."""
        host, role = self._host, cast(Any, self._host.process._role)
        now, state = host.clock(), host.kv._holder.state
        for serving in state.servings.values():
            if serving.sent > serving.granted:
                raise Violation(f"{host.name} sends {serving.sent} blocks on credit for {serving.granted}")
            if serving.sent > sum(self._rounds[serving.key].values()):
                raise Violation(f"{host.name} sends more blocks than it was asked for")
            if serving.asked and self._absent and serving.asked_at < now and not host.kv._holder._fresh:
                asked = {serving.by_index[index].name for index in bits(serving.asked)}
                if not asked.isdisjoint(self._absent):
                    raise Violation(f"{host.name} waits for a block that its engine has said it has not got")
        if not host.kv._holder._fresh:
            self._absent.clear()
        for lease in state.leases.values():
            if now > lease.heard_at + LEASE_TTL_S + LATE_S:
                raise Violation(f"{host.name} holds blocks on a lease that lapsed {now - lease.heard_at:.1f} s ago")
        for job in self._jobs().values():
            if now > job.deadline + LATE_S:
                raise Violation(f"{host.name} goes on with {job.key} after its deadline")
        parts, fetched = host.kv._gatherer._parts, host.kv._fetcher._by_transfer
        if (fetched or role._by_transfer) and {parts[t].gather.transfer_id for t in fetched} != set(role._by_transfer):
            raise Violation(f"{host.name} fetches for nobody")
