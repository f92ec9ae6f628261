"""One worker process: the step loop's thread beside the I/O thread that owns every socket.

    proxies ◀── ProxyLink ──┐                        ┌── StepLoop (thread: engine, pages, beat)
                            ├── I/O loop (this file) ┤
    other workers ◀─ KvEndpoint                      └── Role (prefill or decode: what each message means)

Shutdown, on SIGTERM or SIGINT:

    1. tell the proxies (a beat with `draining`); refuse new requests
    2. wait until every request is finished, at most `drain_timeout`
    3. hand what is left back to its proxy, say goodbye
    4. stop the step loop, close the sockets
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from dataclasses import dataclass

import zmq

from engine.engine import Engine
from kvtransfer.endpoint import Event as KvEvent
from kvtransfer.endpoint import KvEndpoint, NeedBlocks, WantedChanged
from mesh.errors import EXIT_WORKER
from mesh.keys import Keys
from mesh.messages import (
    Abort,
    Beat,
    BlockEvents,
    Decode,
    Goodbye,
    Prefill,
    ProxyBeat,
    Refused,
    Welcome,
    WorkerInfo,
)
from mesh.metrics import Health
from mesh.residency import Publisher
from mesh.wire import Envelope
from worker.grammars import Grammars
from worker.links import ProxyLink
from worker.metrics import WorkerMetrics
from worker.role import Parts, Replies, Role
from worker.steploop import (
    Beaten,
    Expected,
    Exported,
    Finished,
    LoopEvent,
    Produced,
    Rejected,
    Snapshot,
    StepLoop,
    Stepped,
    Stopped,
)
from worker.wakeup import Wakeup

log = logging.getLogger(__name__)

LOOP_EVENTS = 256
"""Of the step loop, read in one turn with those that it tells meanwhile; then it is the sockets' turn."""
POLL_MS = 50
"""Longest sleep of the I/O loop: the resolution of its deadlines."""
STOP_TIMEOUT_S = 5.0
"""For the step in progress when the process leaves."""


@dataclass(frozen=True, slots=True)
class Station:
    """Everything that was opened before the loop starts."""

    info: WorkerInfo
    engine: Engine
    kv: KvEndpoint
    publisher: Publisher
    metrics: WorkerMetrics
    grammars: Grammars
    proxies: tuple[str, ...]
    drain_timeout: float
    keys: Keys | None = None


class WorkerProcess:
    """The I/O loop. `run` returns the process's exit code."""

    def __init__(
        self,
        station: Station,
        context: zmq.Context[zmq.Socket[bytes]],
        make_role: Callable[[Parts], Role],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._station = station
        self._clock = clock
        self._events: queue.SimpleQueue[LoopEvent] = queue.SimpleQueue()
        self._wake = Wakeup()
        self._loop = StepLoop(station.engine, self._emit, station.grammars, clock)
        self._links = [ProxyLink(context, address, station.info, station.keys) for address in station.proxies]
        self._replies = Replies()
        self._role = make_role(
            Parts(
                self._loop,
                station.kv,
                self._replies,
                station.metrics,
                station.info.max_model_len,
                clock,
            )
        )
        self._publisher = station.publisher
        self._drain_asked = False
        self._draining_until: float | None = None
        self._exit_code: int | None = None
        self._last_beat = clock()
        self._poller = zmq.Poller()
        self._poller.register(self._wake.fd, zmq.POLLIN)
        self._watched: set[zmq.Socket[bytes]] = set()

    def drain(self) -> None:
        """Asks for a clean end; callable from a signal handler."""
        self._drain_asked = True
        self._wake.set()

    def publish(self, events: BlockEvents) -> None:
        """Sends residency straight to every proxy (when no shared store carries it)."""
        for link in self._links:
            if link.registered:
                link.send(events)

    def health(self) -> Health:
        """Read by the metrics server's threads: healthy while the step loop beats."""
        age = self._clock() - self._last_beat
        healthy = age <= self._station.info.step_bound_s and self._exit_code is None
        registered = sum(link.registered for link in self._links)
        return Health(healthy, {"last_step_age_s": round(age, 3), "proxies": registered, "draining": self._drain_asked})

    def run(self) -> int:
        self._loop.start()
        try:
            while self._exit_code is None:
                self._turn()
        finally:
            self._close()
        return self._exit_code

    def _watch(self, current: set[zmq.Socket[bytes]]) -> None:
        """Connections come and go."""
        for socket in self._watched - current:
            self._poller.unregister(socket)
        for socket in current - self._watched:
            self._poller.register(socket, zmq.POLLIN)
        self._watched = current

    def _turn(self) -> None:
        """One round: wait, read everything that came, answer, flush."""
        kv_sockets = self._station.kv.sockets()
        self._watch({*kv_sockets, *(s for link in self._links for s in (link.socket, link.monitor))})
        due_ms = (self._station.kv.next_deadline() - self._clock()) * 1000
        ready = {source for source, _ in self._poller.poll(int(max(0.0, min(POLL_MS, due_ms))))}
        if self._wake.fd in ready:
            self._wake.clear()
        now = self._clock()
        self._read_proxies(now)
        for socket in kv_sockets:
            if socket in ready:
                self._kv_events(self._station.kv.receive(socket))
        self._read_loop()
        self._tick(now)
        self._flush()

    def _flush(self) -> None:
        self._replies.flush()
        for link in self._links:
            link.flush()

    def _emit(self, event: LoopEvent) -> None:
        """Runs on the step loop's thread."""
        self._events.put(event)
        self._wake.set()

    def _read_proxies(self, now: float) -> None:
        for link in self._links:
            link.reconnected(now)
            for envelope in link.receive():
                self._from_proxy(link, envelope, now)

    def _from_proxy(self, link: ProxyLink, envelope: Envelope, now: float) -> None:
        message = envelope.message
        if isinstance(message, (Welcome, ProxyBeat)):
            if link.heard(message, now):
                log.info("registered with proxy %s at %s", link.proxy_id, link.address)
                self._role.lost(link)  # whatever an earlier proxy process at this address had asked for
                self._loop.snapshot()
        elif isinstance(message, (Prefill, Decode)):
            self._assign(link, envelope, message)
        elif isinstance(message, Abort):
            self._role.abort(message)

    def _assign(self, link: ProxyLink, envelope: Envelope, message: Prefill | Decode) -> None:
        refusal = None
        if envelope.receiver != self._station.info.incarnation:
            refusal = ("stale_incarnation", "this is a later life of that worker")
        elif self._draining_until is not None or self._drain_asked:
            refusal = ("draining", "this worker is leaving")
        if refusal is None:
            self._role.assign(link, message)
        else:
            self._station.metrics.refused(refusal[0])
            link.send(Refused(message.request_id, message.attempt, refusal[0], refusal[1], True))

    def _read_loop(self) -> None:
        for _ in range(LOOP_EVENTS):
            try:
                event = self._events.get_nowait()
            except queue.Empty:
                return
            if isinstance(event, Stepped):
                self._stepped(event)
            elif isinstance(event, Produced):
                self._produced(event)
            elif isinstance(event, Finished):
                self._role.exported_all(event)
            elif isinstance(event, Exported):
                self._station.kv.provide(event.name, event.payload)
            elif isinstance(event, Expected):
                self._role.expected(event)
            elif isinstance(event, Rejected):
                self._role.rejected(event)
            elif isinstance(event, Beaten):
                self._beat(event)
            elif isinstance(event, Snapshot):
                self._publisher.reset(event.names)
            elif isinstance(event, Stopped):
                self._stopped(event)
        self._wake.set()  # there may be more

    def _stepped(self, event: Stepped) -> None:
        self._station.metrics.stepped(event)
        self._role.stepped(event)
        if event.output.stored or event.output.removed:
            self._publisher.publish(event.output.stored, event.output.removed)

    def _produced(self, event: Produced) -> None:
        self._flush()  # the step's tokens do not wait until its blocks are on their way
        for block in event.exported:
            if block.payload is not None:
                self._station.kv.produced(block.stream, block.name, block.payload)

    def _beat(self, event: Beaten) -> None:
        self._last_beat = self._clock()
        self._station.metrics.beaten(event.load, self._station.kv.stats(), self._role.num_jobs)
        beat = Beat(event.steps, self._draining_until is not None, event.load)
        for link in self._links:
            if link.registered:
                link.send(beat)

    def _kv_events(self, events: list[KvEvent]) -> None:
        if not events:
            return
        for event in events:
            if isinstance(event, WantedChanged):
                self._loop.want(event.stream, event.names)
            elif isinstance(event, NeedBlocks):
                self._loop.export(event.stream, event.names)
        self._role.transferred(events)

    def _tick(self, now: float) -> None:
        self._kv_events(self._station.kv.tick())
        self._role.tick(now)
        for link in self._links:
            if link.tick(now):
                self._role.lost(link)
        if self._drain_asked and self._draining_until is None:
            log.info("draining: finishing %s", "running requests" if self._role.num_jobs else "nothing")
            self._draining_until = now + self._station.drain_timeout
        if self._draining_until is not None and (not self._role.num_jobs or now >= self._draining_until):
            self._leave()

    def _leave(self) -> None:
        self._role.hand_back()
        self._replies.flush()
        for link in self._links:
            if link.registered:
                link.send(Goodbye("drained"))
        if self._exit_code is None:
            self._exit_code = 0

    def _stopped(self, event: Stopped) -> None:
        if event.error is None:
            return
        log.critical("the step loop failed: %s", event.error, exc_info=event.error)
        self._exit_code = EXIT_WORKER
        for link in self._links:  # a proxy that cannot watch this process would only find it silent
            if link.registered:
                link.send(Goodbye("its engine failed"))

    def _close(self) -> None:
        for link in self._links:
            link.flush()
        self._loop.stop(STOP_TIMEOUT_S)
        self._station.grammars.close()
        self._publisher.close()
        self._station.kv.close()
        for link in self._links:
            link.close()
        self._wake.close()
