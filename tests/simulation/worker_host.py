"""A worker's process in virtual time: production's engine, step loop, I/O loop, role and KV endpoint, whole.

Only what they stand on is replaced: sockets (in memory), the thread (its turns are run one by one), the poller and
metrics.
"""

from __future__ import annotations

import queue
import zlib
from collections import deque
from collections.abc import Callable
from typing import Any, cast

import zmq

from decode.role import DecodeRole
from engine.engine import Engine, EngineConfig
from kvtransfer.endpoint import KvEndpoint
from kvtransfer.transports.local import Exchange
from mesh.messages import WorkerInfo
from mesh.residency import DirectPublisher
from prefill.role import PrefillRole
from tests.simulation.host import Host
from tests.simulation.network import Network
from tests.simulation.oracle import Oracle, Violation
from tests.simulation.pages import WatchedRunner
from tests.simulation.plan import Plan
from tests.simulation.sockets import VirtualContext, VirtualPoller
from tests.simulation.watch import Watch
from worker.grammars import Grammars
from worker.metrics import WorkerMetrics
from worker.process import Station, WorkerProcess
from worker.steploop import IDLE_WAIT_S, Expected, Exported, LoopEvent, Produced

IDLE_S = 1.0
"""Production polls every 50 ms; a longer sleep only delays deadlines."""
BEAT_S = 1.0
"""Production's 0.2 s costs more than all else; three beats in a row are missed before anybody is missed."""
LIFE_NS = 1_000_000
"""Between the incarnations of two lives."""


class Nothing:
    """Takes any call and does nothing: metrics."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _nothing


def _nothing(*_: Any, **__: Any) -> None:
    return None


class Commands:
    """The step loop's queue without a wait: a command wakes the loop instead."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.count = 0
        self._queue: deque[Callable[[], object]] = deque()
        self._wake = wake

    def put(self, command: Callable[[], object]) -> None:
        self._queue.append(command)
        self.count += 1
        self._wake()

    def get(self, timeout: float | None = None) -> Callable[[], object]:
        return self.get_nowait()

    def get_nowait(self) -> Callable[[], object]:
        if not self._queue:
            raise queue.Empty
        return self._queue.popleft()


class Wake:
    """The step loop's word that something waits for the I/O loop."""

    fd = -1

    def __init__(self, host: Host) -> None:
        self._host = host

    def set(self) -> None:
        self._host.wake()

    def clear(self) -> None:
        """Nothing is kept."""

    def close(self) -> None:
        """Nothing is open."""


class WorkerHost(Host):
    """One life of one worker."""

    def __init__(
        self,
        name: str,
        role: str,
        life: int,
        network: Network,
        oracle: Oracle,
        shape: WorkerInfo,
        proxies: tuple[str, ...],
        transports: tuple[str, ...],
        exchange: Exchange,
        step_s: float,
        clock_rate: float,
        plan: Plan,
    ) -> None:
        super().__init__(name, network.timeline, clock_at=zlib.crc32(name.encode()) % 5000, clock_rate=clock_rate)
        self.role = role
        self.network = network
        self._oracle = oracle
        self._step_s = step_s
        self._loop_at = float("inf")
        self._hangs_until = 0.0
        context = cast("zmq.Context[zmq.Socket[bytes]]", VirtualContext(network, self))
        layout = shape.layout
        self.runner = WatchedRunner(shape.total_blocks, layout.block_tokens, shape.max_model_len)
        config = EngineConfig(shape.max_num_seqs, shape.max_num_batched_tokens, shape.max_model_len)
        self.engine = self.runner.engine = Engine(self.runner, config, self.clock)
        incarnation = life * LIFE_NS + zlib.crc32(name.encode()) % LIFE_NS
        self.kv = KvEndpoint(
            context=context,
            bind=f"tcp://127.0.0.1:{shape.kv_address}",
            worker_id=name,
            incarnation=incarnation,
            host="host",
            layout=layout,
            transports=transports,
            clock=self.clock,
            exchange=exchange,
        )
        self.info = WorkerInfo(
            **{
                field: getattr(shape, field)
                for field in shape.__dataclass_fields__
                if field not in ("worker_id", "incarnation", "role", "kv_address", "model_digest")
            },
            worker_id=name,
            incarnation=incarnation,
            role=role,
            kv_address=self.kv.address,
            model_digest=self.runner.digest,
        )
        metrics = cast(WorkerMetrics, Nothing())
        publisher = DirectPublisher(lambda events: self.process.publish(events))
        station = Station(self.info, self.engine, self.kv, publisher, metrics, cast(Grammars, Nothing()), proxies, 5.0)
        self.process = WorkerProcess(station, context, PrefillRole if role == "prefill" else DecodeRole, self.clock)
        self.process._wake.close()
        self.process._wake = cast(Any, Wake(self))
        poller = VirtualPoller()
        for link in self.process._links:
            poller.register(link.socket)
            poller.register(link.monitor)
        self.process._poller = cast(Any, poller)
        self.loop = self.process._loop
        self._commands = Commands(self._wake_loop)
        self._checked = (0, 0)
        self.loop._commands = cast(Any, self._commands)
        self.loop._emit = self._emit
        self.watch = Watch(self, oracle, plan)
        self.wake()
        self._wake_loop()

    @property
    def incarnation(self) -> int:
        return self.info.incarnation

    def turn(self) -> None:
        self.process._turn()
        self.watch.turned()
        if self.process._exit_code is not None:
            self.leave()
            return
        if any(s.inbox for s in cast(Any, self.kv.sockets())):  # production's poll is level-triggered too
            self.wake()
        self.wake_at_clock(self.kv.next_deadline(), IDLE_S)

    def leave(self) -> None:
        """The end of `WorkerProcess._close`: what was said still arrives."""
        for link in self.process._links:
            link.flush()
        self.kv.close()
        for link in self.process._links:
            link.close()
        self.alive = False

    def crash(self, *, silent: bool) -> None:
        self.alive = False
        self.network.crash(self, silent=silent)
        for transport in self.kv._transports.values():  # memory of the process
            transport.close()

    def hang(self, seconds: float) -> None:
        """The step loop stands still, the I/O loop goes on."""
        self._hangs_until = max(self._hangs_until, self.timeline.now + seconds)

    def _emit(self, event: LoopEvent) -> None:
        if isinstance(event, Produced):
            for exported in event.exported:
                self._check_export(exported)
        elif isinstance(event, Exported):
            self._check_export(event)
        elif isinstance(event, Expected):
            self.watch.expects(event)
        self.process._emit(event)

    def _check_export(self, block: Exported) -> None:
        if block.payload is not None:
            self._oracle.check(block.name, block.payload, f"{self.name} sends a block")

    def _wake_loop(self, delay: float = 0.0) -> None:
        when = self.timeline.now + delay
        if when < self._loop_at:
            self._loop_at = when
            self.soon(self._run_loop, when, delay=delay)

    def _run_loop(self, when: float) -> None:
        if when != self._loop_at:
            return
        self._loop_at = float("inf")
        if self.timeline.now < self._hangs_until:
            self._wake_loop(self._hangs_until - self.timeline.now)
            return
        self.loop._turn()
        self.watch.looped()
        if self._checked != (now := (self.engine.num_steps, self._commands.count)):
            self._checked = now
            self.engine.check()
            self.runner.check(self._oracle)
        stuck_s = IDLE_WAIT_S if self.engine.has_work else BEAT_S
        self._wake_loop(self._step_s if self.engine.has_work and self.loop._progressed else stuck_s)

    def left_over(self) -> str:
        """What this worker still has in hand, in words; empty when it is idle."""
        stats, load = self.kv.stats(), self.engine.load()
        pool = self.engine.pool
        if pool.num_free + pool.num_cached + pool.num_held != pool.num_blocks:
            raise Violation(f"{self.name}: free + cached + held is not the total")
        left = {
            "jobs": self.process._role.num_jobs,
            "requests": load.running + load.waiting + load.fetching + load.held,
            "held blocks": load.held_blocks,
            "fetching": stats.fetching + len(self.kv._gatherer._gathers) + len(self.kv._gatherer._parts),
            "serving": stats.serving,
            "streams": stats.held_streams,
            "slots": stats.slots,
            "wanted": len(self.loop._wanted),
            "compiling": len(self.loop._compiling),
        }
        return ", ".join(f"{what} {count}" for what, count in left.items() if count)
