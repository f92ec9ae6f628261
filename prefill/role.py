"""The prefill role: prompts in; the first token and fetchable blocks out.

Life of a request here:

    1. `Prefill` arrives        with holders of its beginning: their blocks are fetched (FETCHING);
                                the engine computes the rest chunk by chunk (a request that leaves after one token)
    2. the decode worker's `Fetch` may come before, during or after; completed blocks go out with the chunk that
       completes them
    3. the first token          straight to the proxy, and as a note on the stream to the decode worker
    4. HELD                     blocks stay referenced until the fetcher confirms, aborts, or its lease lapses
    5. released                 they remain ordinary cached blocks
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from engine.step import TokenOut
from kvtransfer.endpoint import BlockArrived, FetchEnded, StreamReleased
from kvtransfer.endpoint import Event as KvEvent
from kvtransfer.protocol import Wanted
from mesh.layout import KvLayout
from mesh.messages import Abort, Decode, KvHolder, Prefill, PrefillReport
from worker.firsttoken import FirstToken
from worker.links import ProxyLink
from worker.role import Job, Parts, converted_from, engine_request, new_transfer_id, same_layout
from worker.steploop import Expected, Finished, Rejected, Stepped


@dataclass(slots=True, eq=False)
class PrefillJob(Job):
    """A prompt that is computed here."""

    holders: tuple[KvHolder, ...]
    theirs: KvLayout | None
    """What the blocks that come are converted from."""
    transfer_id: bytes = b""
    """From the holders, while they bring something."""
    transfer_s: float = 0.0
    transfer_bytes: int = 0


class PrefillRole:
    """See `worker.role.Role`."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._jobs: dict[str, PrefillJob] = {}
        """By request id, until the first token is out."""
        self._streams: dict[str, PrefillJob] = {}
        """By engine key, until the blocks are released."""
        self._by_transfer: dict[bytes, PrefillJob] = {}

    @property
    def num_jobs(self) -> int:
        return len(self._streams.keys() | {job.key for job in self._jobs.values()})

    def assign(self, link: ProxyLink, message: Prefill | Decode) -> None:
        deadline = self._parts.clock() + max(0.0, message.deadline_s)
        if not isinstance(message, Prefill):
            self._parts.refuse_role(Job(message.request_id, message.attempt, link, deadline), message)
            return
        layout, holders = same_layout(None, message.holders)
        theirs = converted_from(self._parts.kv.layout, layout)
        job = PrefillJob(message.request_id, message.attempt, link, deadline, holders, theirs)
        known = self._jobs.get(message.request_id)
        if not self._parts.is_new(job, known, len(message.tokens)):
            return
        if known is not None:
            self._end(known)
        self._jobs[job.request_id] = job
        self._streams[job.key] = job
        self._parts.kv.open_stream(job.key)
        request = engine_request(message, self._parts.clock(), stop_after=1)
        if job.holders:
            self._parts.loop.expect(request, job.theirs)
        else:
            self._parts.loop.add(request)

    def abort(self, message: Abort) -> None:
        for job in [j for j in self._streams.values() if j.request_id == message.request_id]:
            if job.attempt <= message.attempt:
                self._end(job)

    def stepped(self, event: Stepped) -> None:
        for out in event.output.tokens:
            job = self._streams.get(out.request.key)
            if job is not None:
                self._first_token(job, out)

    def exported_all(self, event: Finished) -> None:
        for out in event.output.tokens:
            key = out.request.key
            if key not in self._streams:
                continue
            self._parts.kv.close_stream(key)
            if out.finish != "handoff":  # the first token was the last: nobody needs the blocks
                del self._streams[key]
                self._parts.loop.want(key, frozenset())
                self._parts.kv.release_stream(key)

    def _first_token(self, job: PrefillJob, out: TokenOut) -> None:
        finish = None if out.finish == "handoff" else out.finish
        request = out.request
        waited = (request.first_scheduled or request.arrived) - request.arrived
        report = PrefillReport(
            cached_tokens=request.num_cached_tokens,
            fetched_tokens=request.num_fetched_tokens,
            computed_tokens=request.num_prompt_tokens - request.num_cached_tokens - request.num_fetched_tokens,
            queue_s=waited,
            compute_s=self._parts.clock() - request.arrived - waited,
            transfer_s=job.transfer_s,
            transfer_bytes=job.transfer_bytes,
            overlap_bytes=0,
            reused_tokens=request.num_cached_tokens + request.num_fetched_tokens,
        )
        self._parts.metrics.prompt(report)
        self._parts.replies.token(job, out, finish, report)
        self._parts.kv.note(job.key, FirstToken(out.index, out.token, finish).pack())
        self._jobs.pop(job.request_id, None)

    def expected(self, event: Expected) -> None:
        job = self._streams.get(event.key)
        if job is None or not job.holders:
            return
        block_tokens = (job.theirs or self._parts.kv.layout).block_tokens
        blocks = max(h.tokens for h in job.holders) // block_tokens
        wanted = [Wanted(m.index, m.hash, m.valid_tokens) for m in event.missing if m.index < blocks]
        if not wanted:
            self._parts.loop.ready(job.key, ())
            return
        job.transfer_id = new_transfer_id()
        self._by_transfer[job.transfer_id] = job
        left = job.deadline - self._parts.clock()
        self._parts.kv.gather(job.transfer_id, job.attempt, None, "", job.holders, wanted, left)

    def rejected(self, event: Rejected) -> None:
        job = self._streams.get(event.key)
        if job is not None:
            self._parts.refuse(job, event.code, event.message, retryable=event.retryable)
            self._end(job)

    def transferred(self, events: Iterable[KvEvent]) -> None:
        for event in events:
            if isinstance(event, StreamReleased):
                self._released(event)
            elif isinstance(event, BlockArrived):
                self._block(event)
            elif isinstance(event, FetchEnded):
                self._fetched(event)

    def _block(self, event: BlockArrived) -> None:
        job = self._by_transfer.get(event.transfer_id)
        if job is not None:
            job.transfer_bytes += len(event.payload)
            self._parts.loop.fill(job.key, event.index, event.payload, job.theirs)

    def _fetched(self, event: FetchEnded) -> None:
        """Whatever the holders did not bring is computed."""
        job = self._by_transfer.pop(event.transfer_id, None)
        if job is not None:
            job.transfer_s = event.seconds
            self._parts.metrics.fetched(event, 0)
            self._parts.loop.ready(job.key, ())

    def _released(self, event: StreamReleased) -> None:
        """Nobody fetches from the stream any more. Before the first token is out, that also ends the work: the decode
        worker it was for is gone or has given up, and the proxy will say what happens next."""
        job = self._streams.get(event.stream)
        if job is None:
            return
        if self._jobs.get(job.request_id) is job:
            self._end(job)
            return
        del self._streams[event.stream]
        self._parts.loop.want(event.stream, frozenset())
        self._parts.loop.release(event.stream)

    def tick(self, now: float) -> None:
        for job in [j for j in self._streams.values() if now >= j.deadline]:
            self._parts.refuse(job, "deadline", "the request's time is over", retryable=False)
            self._end(job)

    def lost(self, link: ProxyLink) -> None:
        for job in [j for j in self._streams.values() if j.link is link]:
            self._end(job)

    def hand_back(self) -> None:
        for job in list(self._streams.values()):
            if job.request_id in self._jobs:
                self._parts.refuse(job, "draining", "this worker is leaving", retryable=True)
            self._end(job)

    def _end(self, job: PrefillJob) -> None:
        if self._by_transfer.pop(job.transfer_id, None) is not None:
            self._parts.kv.abort_fetch(job.transfer_id)
        if self._jobs.get(job.request_id) is job:
            del self._jobs[job.request_id]
        self._streams.pop(job.key, None)
        self._parts.loop.want(job.key, frozenset())
        self._parts.loop.abort(job.key)
        self._parts.kv.close_stream(job.key)
        self._parts.kv.release_stream(job.key)
