"""One fetch over several holders, as transfers from each of them: the shell around `gathering`.

To the caller it is one transfer: what is told of its parts is told under its id, and its end once all of them ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

from kvtransfer import gathering
from kvtransfer.events import BlockArrived, Event, FetchEnded, Noted
from kvtransfer.fetcher import Fetcher
from kvtransfer.gathering import Gathering, Source
from kvtransfer.pace import Pace
from kvtransfer.protocol import MAX_INDEX, TRANSFER_ID_BYTES, Wanted, bits, mask_of
from mesh.layout import KvLayout
from mesh.messages import KvHolder, Peer


@dataclass(frozen=True, slots=True)
class Part:
    """What one holder was asked for in one go."""

    gather: Gather
    number: int
    """Of the holder."""
    asked: int
    noted: bool
    """The stream's notes are heard on this one."""
    began: float


@dataclass(slots=True, eq=False)
class Gather:
    """A fetch that has not ended."""

    transfer_id: bytes
    attempt: int
    holders: tuple[KvHolder, ...]
    stream: str
    """Of the first holder, if it makes one."""
    wanted: Mapping[int, Wanted]
    began: float
    deadline: float
    state: Gathering
    parts: list[bytes] = field(default_factory=list)
    """Transfers that have not ended."""
    num_parts: int = 0
    num_bytes: int = 0
    last_block_at: float = 0.0
    corrupt: int = 0
    outcome: str = "ok"
    """Of the stream, or of the whole when it is aborted."""
    trouble: tuple[str, str] = ("ok", "")
    """Outcome and detail of the last holder that failed; it matters if something is missing in the end."""


class Gatherer:
    """See the module."""

    def __init__(
        self,
        fetcher: Fetcher,
        host: str,
        layout: KvLayout,
        clock: Callable[[], float],
        emit: Callable[[Event], None],
    ) -> None:
        self._fetcher = fetcher
        self._layout = layout
        self._clock = clock
        self._emit = emit
        self._pace = Pace(host, layout)
        self._gathers: dict[bytes, Gather] = {}
        self._parts: dict[bytes, Part] = {}
        self._unsettled: list[Gather] = []

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
        """See `KvEndpoint.gather`."""
        if transfer_id in self._gathers:
            raise ValueError("a transfer id is used once")
        now = self._clock()
        by_index = {w.index: w for w in wanted}
        everything = mask_of(by_index)
        made = () if maker is None else (KvHolder(maker, 0, 0),)
        others = tuple({h.peer: h for h in holders if h.peer != maker}.values())
        layout = next((h.peer.layout for h in (*made, *others)), None) or self._layout
        size = max(1, layout.block_tokens)  # a layout that is none is refused when its holder is asked
        full = mask_of(w.index for w in wanted if w.valid_tokens == size)
        sources = (
            *(Source(everything, spare=True) for _ in made),
            *(Source(full & ((1 << max(0, min(h.tokens // size, MAX_INDEX))) - 1)) for h in others),
        )
        gather = Gather(
            transfer_id,
            attempt,
            (*made, *others),
            stream if made else "",
            by_index,
            now,
            now + deadline_s,
            Gathering(everything, sources),
        )
        self._gathers[transfer_id] = gather
        self._ask(gather, first=True)
        if not gather.parts:
            self._emit(self._end(gather))

    def abort(self, transfer_id: bytes) -> None:
        gather = self._gathers.get(transfer_id)
        if gather is not None:
            gather.outcome = "aborted"
            gather.state = gathering.stopped(gather.state)
            for part in list(gather.parts):
                self._fetcher.abort(part)

    def told(self, event: Event) -> Sequence[Event]:
        """What the caller is to hear instead of an event of this endpoint."""
        if not isinstance(event, (BlockArrived, Noted, FetchEnded)):
            return (event,)
        part = self._parts.get(event.transfer_id)
        if part is None:  # a transfer by itself
            return (event,)
        gather = part.gather
        if isinstance(event, BlockArrived):
            return (BlockArrived(gather.transfer_id, event.index, event.payload),)
        if isinstance(event, Noted):
            return (Noted(gather.transfer_id, event.payload),) if part.noted else ()
        self._part_ended(part, event)
        return ()

    def settle(self) -> list[Event]:
        """Asks on where parts have ended, after all that is known of their ends was told; the ends of fetches."""
        ended: list[Event] = []
        for gather in self._unsettled:
            self._ask(gather)
            if not gather.parts:
                ended.append(self._end(gather))
        self._unsettled.clear()
        return ended

    def _part_ended(self, part: Part, event: FetchEnded) -> None:
        gather, failed = part.gather, event.outcome != "ok"
        del self._parts[event.transfer_id]
        gather.parts.remove(event.transfer_id)
        gather.num_bytes += event.num_bytes
        gather.corrupt += event.corrupt
        if event.num_bytes:
            gather.last_block_at = max(gather.last_block_at, part.began + event.seconds)
        if not gather.stream or part.number:
            self._pace.learn(gather.holders[part.number].peer, event.num_bytes, event.seconds)
        if failed:
            gather.trouble = (event.outcome, event.detail)
            if part.noted and gather.outcome == "ok":
                gather.outcome = event.outcome
        missing = mask_of(event.missing)
        gather.state = gathering.ended(gather.state, part.number, part.asked, missing, failed=failed)
        if self._clock() >= gather.deadline:
            gather.state = gathering.stopped(gather.state)
        if gather not in self._unsettled:
            self._unsettled.append(gather)

    def _ask(self, gather: Gather, *, first: bool = False) -> None:
        """Asks for everything that is on its way from nobody, as it is thought to come soonest."""
        costs = [self._pace.cost(h, self._fetcher.queued(h.peer)) for h in gather.holders]
        gather.state, asks = gathering.plan(gather.state, costs)
        for number, mask in enumerate(asks):
            streams = bool(gather.stream) and number == 0
            noted = streams and first
            if not mask and not noted:
                continue
            gather.num_parts += 1
            part = blake2b(
                gather.transfer_id + gather.num_parts.to_bytes(8, "little"), digest_size=TRANSFER_ID_BYTES
            ).digest()
            gather.parts.append(part)
            self._parts[part] = Part(gather, number, mask, noted, self._clock())
            self._fetcher.fetch(
                part,
                gather.attempt,
                gather.holders[number].peer,
                gather.stream if streams else "",
                [gather.wanted[index] for index in bits(mask)],
                gather.deadline - self._clock(),
            )

    def _end(self, gather: Gather) -> FetchEnded:
        del self._gathers[gather.transfer_id]
        missing = tuple(bits(gather.state.wanted))
        outcome, detail = gather.outcome, gather.trouble[1]
        if missing and outcome == "ok":
            outcome = gather.trouble[0]
        until = gather.last_block_at if gather.num_bytes else self._clock()
        return FetchEnded(
            gather.transfer_id, missing, outcome, gather.num_bytes, until - gather.began, gather.corrupt, detail
        )
