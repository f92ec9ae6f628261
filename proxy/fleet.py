"""The workers as the dispatcher sees them: registered, heard, lost; and what they hold.

This is where the control socket's news becomes knowledge (`WorkerPool`, `ResidencyIndex`) and where the
dispatcher is told what concerns running requests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from mesh.messages import Beat, BlockEvents, Goodbye, Peer, Refused, TokenBatch, TokenDelta, WorkerInfo
from proxy.routing.place import Place
from proxy.routing.pool import WorkerPool
from proxy.routing.residency import BlockChange, ResidencyIndex, short_names

log = logging.getLogger(__name__)

FORGET_S = 120.0
"""A worker silent for so long is forgotten with all it held; if it ever speaks again it has to register."""
STALL_S = 1.0
"""A tick that comes so late, ten times its period, says that this process stood still, not its workers."""
MAX_COMPLAINTS = 1000
"""Refused registrations that are remembered, so that each is logged once and not twice per second."""


class Connections(Protocol):
    """What the fleet needs of the control socket."""

    def send(self, worker: Place, message: Any) -> bool: ...

    def forget(self, worker: Place) -> None: ...


class FleetListener(Protocol):
    """Who has requests running on the fleet."""

    def delta(self, worker: Place, delta: TokenDelta) -> None: ...

    def refused(self, worker: Place, refusal: Refused) -> None: ...

    def lost(self, worker: Place) -> None:
        """Whatever ran there has to run elsewhere."""

    def changed(self) -> None:
        """A worker can be asked that could not be asked before. Not called from within `lost`."""


class Fleet:
    """`proxy.control.ControlHandler`; `connect` it before the first message."""

    def __init__(
        self,
        index: ResidencyIndex,
        clock: Callable[[], float],
        later: Callable[[Callable[[], None]], Any],
    ) -> None:
        """`later` runs a function soon, after the present event."""
        self.pool = WorkerPool()
        self.index = index
        self.gaps = 0
        """Times that residency events of a worker were missed."""
        self._clock = clock
        self._later = later
        self.on_model: Callable[[bytes], None] | None = None
        """Learns the digest of the model that is served."""
        self._connections: Connections | None = None
        self._listener: FleetListener | None = None
        self._complaints: set[tuple[str, str]] = set()
        self._ticked = clock()

    def connect(self, connections: Connections, listener: FleetListener) -> None:
        self._connections = connections
        self._listener = listener

    def send(self, worker: Place, message: Any) -> bool:
        return self._connections is not None and self._connections.send(worker, message)

    def peer(self, worker: Place) -> Peer | None:
        known = self.pool.get(worker)
        return known.peer if known is not None else None

    def registered(self, info: WorkerInfo, *, moved: bool) -> bool:
        outcome = self.pool.register(info, self._clock(), moved=moved)
        if not outcome.accepted:
            self._complain(info.worker_id, outcome.reason)
            return False
        if outcome.converts:
            log.warning("%s converts KV blocks: %s", info.worker_id, outcome.converts)
        for place in outcome.forgotten:
            self._close(place)
        for place in outcome.lost:
            why = "its next life registered" if place in outcome.forgotten else "it registered again"
            self._later(partial(self._lose, place, why))
        if self.on_model is not None:
            self.on_model(info.model_digest)
        self._later(self._changed)
        return True

    def heard(self, worker: Place, message: Any) -> None:
        if isinstance(message, TokenBatch):
            self._tokens(worker, message)
        elif isinstance(message, Beat):
            if self.pool.beat(worker, message, self._clock()):
                self._later(self._changed)
        elif isinstance(message, BlockEvents):
            stored, removed = short_names(message.stored), short_names(message.removed)
            self.apply(worker, BlockChange(message.seq, message.reset, stored, removed))
        elif isinstance(message, Refused):
            if message.code == "draining":
                self.pool.drain(worker)
            if self._listener is not None:
                self._listener.refused(worker, message)
        elif isinstance(message, Goodbye):
            log.info("%s left: %s", worker.worker_id, message.reason)
            self._forget(worker, "it left")

    def ended(self, worker: Place) -> None:
        """Its process is over. The entry stays for a while: another process may have had that number."""
        if self.pool.silence(worker, self._clock()):
            self._lose(worker, "its process ended")

    def unreachable(self, worker: Place) -> None:
        """A message could not be handed over."""
        if self.pool.silence(worker, self._clock()):
            self._later(partial(self._lose, worker, "it does not take messages"))

    def apply(self, worker: Place, change: BlockChange) -> None:
        """Notes which blocks a worker holds."""
        if not self.index.apply(worker, change):
            self.gaps += 1
            log.debug("residency events of %s were missed", worker.worker_id)

    def tick(self) -> None:
        """Called about ten times per second."""
        now = self._clock()
        if now - self._ticked > STALL_S:
            log.warning("this process stood still for %.1f s", now - self._ticked)
            self.pool.excuse(now - self._ticked, now)
        self._ticked = now
        # All of them are out of use before the first one's requests look for another worker.
        for place in [p for p in self.pool.overdue(now) if self.pool.silence(p, now)]:
            self._lose(place, "its step loop is silent")
        for place in self.pool.silent_since(now - FORGET_S):
            self._forget(place, "it stayed silent")
        self.index.scrub()

    def _tokens(self, worker: Place, batch: TokenBatch) -> None:
        known, listener = self.pool.get(worker), self._listener
        if known is None or listener is None:
            return
        for delta in batch.deltas:
            if known.assigned:
                known.settle(delta.request_id)
            listener.delta(worker, delta)

    def _lose(self, worker: Place, why: str) -> None:
        log.warning("lost %s: %s", worker.worker_id, why)
        if self._listener is not None:
            self._listener.lost(worker)

    def _forget(self, worker: Place, why: str) -> None:
        if self.pool.forget(worker, self._clock()):
            self._close(worker)
            self._lose(worker, why)

    def _close(self, worker: Place) -> None:
        self.index.retire(worker)
        if self._connections is not None:
            self._connections.forget(worker)

    def _changed(self) -> None:
        if self._listener is not None:
            self._listener.changed()

    def _complain(self, worker_id: str, reason: str) -> None:
        if len(self._complaints) < MAX_COMPLAINTS and (worker_id, reason) not in self._complaints:
            self._complaints.add((worker_id, reason))
            log.warning("refused to take %s: %s", worker_id, reason)
