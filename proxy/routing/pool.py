"""The workers that this proxy knows: who lives, who may be asked, and how much each has to do.

    (unknown) ──Register──▶ ALIVE ──no beat in time──▶ SILENT ──beat──▶ ALIVE
                              └──process ended, Goodbye, newer incarnation──▶ forgotten (its incarnation stays
                              fenced)

A silent worker keeps its entry: a paused process or a healed network takes up where it was, without its
requests. Pure bookkeeping: times are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from mesh.messages import Beat, Load, Peer, WorkerInfo
from proxy.choice_events import Absence
from proxy.generation import ModelFacts
from proxy.routing.place import Place

BEAT_TIMEOUT_S = 3.0
"""Silence that counts as death: fifteen beats, and more than a garbage collection or a page-fault storm."""
MAX_STEP_BOUND_S = 60.0
"""Whatever bound a worker announces, a longer silence is a hang."""
REVIVE_AFTER_S = 1.0
"""Beats that arrive sooner after a death were sent before it."""
OPTIMISM_S = 0.5
"""An assignment counts as load until a beat must have counted it: two beats and a transit."""
REGISTER_ECHO_S = 1.0
"""A worker repeats `Register` until it is answered; repetitions this early on one connection mean nothing."""
RETURN_WINDOW_S = 60.0
"""A worker lost so lately is probably being restarted."""
MAX_WORKERS = 4096
"""Fences kept; the oldest worker id without a live process is forgotten above it."""

CONVERTING = 6
"""The first version of the KV protocol whose speakers convert between layouts."""

IDLE = Load(0, 0, 0, 0, 0, 0, 0, 0, 0.0)


class Health(Enum):
    ALIVE = "alive"
    SILENT = "silent"


@dataclass(slots=True, eq=False)
class Worker:
    """One incarnation of one worker; live state of the pool."""

    info: WorkerInfo
    place: Place
    registered_at: float
    last_beat: float
    health: Health = Health.ALIVE
    silent_since: float = 0.0
    draining: bool = False
    beaten: bool = False
    load: Load = IDLE
    assigned: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Request -> (when, tokens to compute): what no beat has counted yet."""

    @property
    def decodes(self) -> bool:
        return self.info.role in ("decode", "both")

    @property
    def prefills(self) -> bool:
        """Computes prompts for others. A `both` worker does not: its prompts are computed where they are
        decoded."""
        return self.info.role == "prefill"

    @property
    def routable(self) -> bool:
        return self.health is Health.ALIVE and not self.draining

    @property
    def state(self) -> str:
        """For people: `alive`, `draining` or `silent`."""
        return "draining" if self.health is Health.ALIVE and self.draining else self.health.value

    @property
    def peer(self) -> Peer:
        info = self.info
        return Peer(info.worker_id, info.incarnation, info.kv_address, info.host, info.layout, info.kv)

    @property
    def silence_limit(self) -> float:
        return max(BEAT_TIMEOUT_S, min(self.info.step_bound_s, MAX_STEP_BOUND_S))

    @property
    def pending(self) -> tuple[int, int]:
        """(requests, tokens) assigned since the last beats."""
        return len(self.assigned), sum([tokens for _, tokens in self.assigned.values()])

    def assign(self, request: str, tokens: int, now: float) -> None:
        self.assigned[request] = (now, tokens)

    def settle(self, request: str) -> None:
        """The request's first token came, or it went elsewhere."""
        self.assigned.pop(request, None)

    def forget_counted(self, now: float) -> None:
        while self.assigned:
            request, (when, _) = next(iter(self.assigned.items()))
            if now - when < OPTIMISM_S:
                return
            del self.assigned[request]


@dataclass(frozen=True, slots=True)
class Registration:
    """What a `Register` came to."""

    accepted: bool
    reason: str = ""
    """Why not, as one sentence."""
    lost: tuple[Place, ...] = ()
    """Incarnations whose requests must go elsewhere: older ones, or this one when it registers anew."""
    forgotten: tuple[Place, ...] = ()
    """Of these, the ones that are over."""
    converts: str = ""
    """What the worker converts of blocks from a worker with another KV layout, where there is one."""


class WorkerPool:
    """See the module."""

    def __init__(self) -> None:
        self._workers: dict[Place, Worker] = {}
        self._fences: dict[str, int] = {}
        self._digest: bytes | None = None
        self._facts: ModelFacts | None = None
        self._block_sizes: tuple[int, ...] = ()
        self._token_bytes = 0
        self._last_loss: float | None = None

    def get(self, place: Place) -> Worker | None:
        return self._workers.get(place)

    def workers(self) -> list[Worker]:
        return list(self._workers.values())

    def routable(self) -> list[Worker]:
        return [w for w in self._workers.values() if w.routable]

    @property
    def model(self) -> ModelFacts | None:
        return self._facts

    @property
    def digest(self) -> bytes | None:
        """Of the model that all workers serve."""
        return self._digest

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """In tokens: of a fleet of equal workers one. A prompt's blocks have other names in each."""
        return self._block_sizes

    @property
    def token_bytes(self) -> int:
        """KV of one token at the worker that has most of it."""
        return self._token_bytes

    @property
    def ready(self) -> bool:
        return any(w.decodes and w.routable for w in self._workers.values())

    def register(self, info: WorkerInfo, now: float, *, moved: bool = False) -> Registration:
        """A worker introduces itself, for the first time or again. `moved`: on another connection than before."""
        place = Place(info.worker_id, info.incarnation)
        if info.role not in ("prefill", "decode", "both"):
            return Registration(False, f"unknown role {info.role!r}")
        if info.incarnation < self._fences.get(info.worker_id, 0):
            return Registration(False, "a later life of this worker is known")
        refusal = self._foreign(info)
        if refusal:
            return Registration(False, refusal)
        known = self._workers.get(place)
        if known is not None:
            return self._register_again(known, now, moved)
        converts = self._converts(info)
        older = tuple([p for p in self._workers if p.worker_id == info.worker_id])
        for p in older:
            self.forget(p, now)
        self._workers[place] = Worker(info, place, now, now)
        self._fences.pop(info.worker_id, None)
        self._fences[info.worker_id] = info.incarnation
        self._bound_fences()
        self._digest = info.model_digest
        self._refresh_facts()
        return Registration(True, lost=older, forgotten=older, converts=converts)

    def _register_again(self, worker: Worker, now: float, moved: bool) -> Registration:
        """Only a worker whose connection or lease broke says `Register` twice: what it had been sent, or had said, may
        be lost."""
        worker.last_beat = now
        worker.health = Health.ALIVE
        echo = not moved and now - worker.registered_at < REGISTER_ECHO_S
        worker.registered_at = now
        return Registration(True, lost=() if echo else (worker.place,))

    def _foreign(self, info: WorkerInfo) -> str:
        """Why the worker cannot join the others; empty when it can, or when there are no others left."""
        fault = info.layout.taking(info.layout).refused
        if fault:
            return f"{info.worker_id} has a KV layout that is none: {fault}"
        others = [w for w in self._workers.values() if w.health is Health.ALIVE and w.info.worker_id != info.worker_id]
        if others and info.model_digest != self._digest:
            return f"{info.worker_id} serves another model ({info.model}) than the workers before it"
        return next((why for other in others if (why := _strangers(info, other.info))), "")

    def _converts(self, info: WorkerInfo) -> str:
        for other in self._workers.values():
            conversions = info.layout.taking(other.info.layout).conversions
            if conversions:
                return f"{', '.join(conversions)} (of {other.info.worker_id})"
        return ""

    def _refresh_facts(self) -> None:
        infos = [w.info for w in self._workers.values()]
        if self._digest is not None and infos:
            self._facts = ModelFacts(min([i.max_model_len for i in infos]), self._digest)
        self._block_sizes = tuple(sorted({i.layout.block_tokens for i in infos}))
        self._token_bytes = max([i.layout.token_bytes for i in infos], default=0)

    def _bound_fences(self) -> None:
        if len(self._fences) > MAX_WORKERS:
            live = {p.worker_id for p in self._workers}
            oldest = next((w for w in self._fences if w not in live), None)
            if oldest is not None:
                del self._fences[oldest]

    def beat(self, place: Place, beat: Beat, now: float) -> bool:
        """Notes progress. True: this changes who can be asked."""
        worker = self._workers.get(place)
        if worker is None:
            return False
        if worker.health is Health.SILENT and now - worker.silent_since < REVIVE_AFTER_S:
            return False
        before = worker.routable
        worker.health = Health.ALIVE
        worker.last_beat = now
        worker.draining = worker.draining or beat.draining
        worker.load = beat.load
        worker.beaten = True
        worker.forget_counted(now)
        return worker.routable and not before

    def drain(self, place: Place) -> None:
        """The worker said that it is leaving; it is not asked again."""
        worker = self._workers.get(place)
        if worker is not None:
            worker.draining = True

    def silence(self, place: Place, now: float) -> bool:
        """Takes a worker out of use until it beats again. True: it was in use."""
        worker = self._workers.get(place)
        if worker is None or worker.health is Health.SILENT:
            return False
        worker.health = Health.SILENT
        worker.silent_since = now
        worker.assigned.clear()
        self._note_loss(worker, now)
        return True

    def forget(self, place: Place, now: float) -> bool:
        """The incarnation is over. True: it was known."""
        worker = self._workers.pop(place, None)
        if worker is None:
            return False
        self._note_loss(worker, now)
        self._refresh_facts()
        return True

    def excuse(self, seconds: float, now: float) -> None:
        """Until now, nobody listened for so long: that time counts as no worker's silence."""
        for worker in self._workers.values():
            worker.last_beat = min(now, worker.last_beat + seconds)

    def overdue(self, now: float) -> list[Place]:
        """Workers in use that have been silent for too long."""
        return [
            w.place for w in self._workers.values() if w.health is Health.ALIVE and now - w.last_beat > w.silence_limit
        ]

    def silent_since(self, when: float) -> list[Place]:
        """Workers that have been silent since `when` or longer."""
        return [w.place for w in self._workers.values() if w.health is Health.SILENT and w.silent_since <= when]

    def _note_loss(self, worker: Worker, now: float) -> None:
        if worker.decodes:
            self._last_loss = now

    def absence(self, now: float) -> Absence:
        """Why no decode worker can be asked."""
        if self.ready:
            return Absence.HELD
        if any(w.decodes for w in self._workers.values()):
            return Absence.RETURNING
        lately = self._last_loss is not None and now - self._last_loss < RETURN_WINDOW_S
        return Absence.RETURNING if lately else Absence.NONE


def _strangers(new: WorkerInfo, old: WorkerInfo) -> str:
    """Why two workers of one model cannot exchange KV blocks; empty when they can."""
    version = new.kv.common(old.kv)
    if version is None:
        return f"{new.worker_id} speaks KV protocol {new.kv} and {old.worker_id} {old.kv}"
    refused = new.layout.taking(old.layout).refused
    difference = new.layout.difference(old.layout) if version < CONVERTING else ""
    if not refused and difference:
        refused = f"{difference}, and KV protocol {version} of {new.worker_id} or {old.worker_id} converts nothing"
    return f"{new.worker_id} cannot take KV blocks of {old.worker_id}: {refused}" if refused else ""
