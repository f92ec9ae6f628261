"""A proxy's process in virtual time: production's dispatcher, fleet and control socket, whole, without HTTP."""

from __future__ import annotations

import asyncio
import math
import zlib
from collections.abc import Callable
from typing import Any, cast

import zmq

from mesh.messages import Abort, Beat, Decode, Goodbye, Prefill, TokenDelta
from proxy.control import ControlSocket
from proxy.dispatcher import MeshDispatcher
from proxy.fleet import Fleet
from proxy.routing.place import Place
from proxy.routing.pool import BEAT_TIMEOUT_S, REVIVE_AFTER_S, Health
from proxy.routing.residency import LocalResidency
from tests.simulation.client import Client
from tests.simulation.host import Host
from tests.simulation.network import Network
from tests.simulation.oracle import Violation
from tests.simulation.sockets import VirtualContext

TICK_S = 0.2
"""Twice production's: nothing depends on it but how late a deadline is seen."""
NOTICED_S = 0.001
"""The kernel tells of the end of a process of the same machine within this."""


class Timer:
    """A call that may be taken back."""

    def __init__(self) -> None:
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class VirtualLoop:
    """As much of an event loop as production's control socket uses."""

    def __init__(self, host: Host) -> None:
        self._host = host

    def call_soon(self, action: Callable[..., Any], *arguments: Any) -> Timer:
        return self.call_later(0.0, action, *arguments)

    def call_later(self, delay: float, action: Callable[..., Any], *arguments: Any) -> Timer:
        timer = Timer()

        def run() -> None:
            if not timer.cancelled:
                action(*arguments)

        self._host.soon(run, delay=delay)
        return timer


class WatchedDispatcher(MeshDispatcher):
    """Looks at what workers say before production does."""

    def delta(self, worker: Place, delta: TokenDelta) -> None:
        choice = self._choices.get(delta.request_id)
        attempt = choice.state.attempt if choice is not None else None
        if attempt is not None and delta.attempt == attempt.number and delta.index < attempt.first_index:
            raise Violation(f"{worker.worker_id} computes token {delta.index} of {delta.request_id} again")
        super().delta(worker, delta)


class ProxyHost(Host):
    """One life of one proxy, and the clients connected to it."""

    def __init__(self, name: str, life: int, address: str, network: Network, disaggregate_above: int) -> None:
        super().__init__(name, network.timeline, clock_at=zlib.crc32(name.encode()) % 5000)
        self.clients: list[Client] = []
        self.network = network
        loop = VirtualLoop(self)
        self.index = LocalResidency()
        self.fleet = Fleet(self.index, self.clock, loop.call_soon)
        self.dispatcher = WatchedDispatcher(
            self.fleet, self.clock, max_requests=100, disaggregate_above=disaggregate_above
        )
        context = cast("zmq.Context[zmq.Socket[bytes]]", VirtualContext(network, self))
        self.control = ControlSocket(f"{name}.{life}", life, "elsewhere", self.fleet, context=context)
        self.control.bind(address)
        self.control._loop = cast(asyncio.AbstractEventLoop, loop)
        self.fleet.connect(self.control, self.dispatcher)
        self._assigned: dict[str, dict[Place, int]] = {}
        """Who was given which attempt of a request and was not told that it is over."""
        self._send = self.fleet.send
        self.fleet.send = self.send  # type: ignore[method-assign]
        self._heard = self.fleet.heard
        self.fleet.heard = self.heard  # type: ignore[method-assign]
        self._beat = self.fleet.pool.beat
        self.fleet.pool.beat = self.beat  # type: ignore[method-assign]
        self.control._beat()
        self._tick()

    def send(self, worker: Place, message: Any) -> bool:
        if isinstance(message, Abort):
            places = self._assigned.get(message.request_id, {})
            if places.get(worker, math.inf) <= message.attempt:
                del places[worker]
        elif isinstance(message, (Prefill, Decode)):
            places = self._assigned.setdefault(message.request_id, {})
            if any(attempt < message.attempt for attempt in places.values()):
                raise Violation(f"{message.request_id} is tried again and an earlier attempt was not aborted")
            places[worker] = message.attempt
        return self._send(worker, message)

    def heard(self, worker: Place, message: Any) -> None:
        self._heard(worker, message)
        if isinstance(message, Goodbye) and self.fleet.pool.get(worker) is not None:
            raise Violation(f"{self.name} still knows {worker.worker_id}, which has left")

    def beat(self, place: Place, beat: Beat, now: float) -> bool:
        changed = self._beat(place, beat, now)
        known = self.fleet.pool.get(place)
        if known is not None and known.health is Health.SILENT and now - known.silent_since >= REVIVE_AFTER_S:
            raise Violation(f"{self.name} takes {place} for dead though it beats")
        return changed

    def turn(self) -> None:
        self.control._drain()
        self.serve()

    def serve(self) -> None:
        """Every client reads what there is."""
        for client in self.clients[:]:
            client.read()
            if client.outcome:
                self.clients.remove(client)

    def ask(self, client: Client) -> None:
        """A client connects and sends its request."""
        self.clients.append(client)
        self.soon(self._submit, client)

    def _submit(self, client: Client) -> None:
        client.submit(self.dispatcher)
        self.serve()

    def _tick(self) -> None:
        self.fleet.tick()
        self.dispatcher.tick()
        self.serve()
        now = self.clock()
        for worker in self.fleet.pool.workers():
            if worker.health is Health.ALIVE and now - worker.last_beat > BEAT_TIMEOUT_S:
                raise Violation(
                    f"{self.name} takes {worker.place} for alive, silent for {now - worker.last_beat:.1f} s"
                )
        for client in self.clients:
            if client.deadline is not None and now >= client.deadline:
                raise Violation(f"{client.name} has neither an answer nor an error at its deadline")
        self.soon(self._tick, delay=TICK_S)

    def crash(self) -> None:
        self.alive = False
        self.network.crash(self, silent=False)
        for client in self.clients:
            client.hung_up("its proxy crashed")

    def process_ended(self, worker: str, incarnation: int) -> None:
        """What the kernel says of a worker on the proxy's own machine."""
        self.soon(self.control._ended, Place(worker, incarnation), delay=NOTICED_S)

    def unknown(self, workers: list[Place]) -> list[str]:
        """Of these workers, those that this proxy would not ask."""
        routable = {w.place for w in self.fleet.pool.routable()}
        return [w.worker_id for w in workers if w not in routable]

    def left_over(self) -> str:
        """What the proxy still has in hand, in words; empty when it is idle."""
        d = self.dispatcher
        left = {
            "live": d.live,
            "waiting": d.waiting,
            "requests": len(d._requests),
            "choices on workers": len(d._on_worker),
            "pending": sum(len(w.assigned) for w in self.fleet.pool.workers()),
        }
        return ", ".join(f"{what} {count}" for what, count in left.items() if count)
