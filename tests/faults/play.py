"""Plays one seed on running processes and checks all that must hold then."""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.faults.client import CLEAR, Client, Violation
from tests.faults.fleet import RelayedDeployment
from tests.faults.plan import KILL, PAUSE, RESTART, Fault, Plan, draw

HANG_S = 90.0
"""Longer than the proxy lets any request take: a stream that is open then hangs."""
QUIET_S = 60.0
"""Longer than any lease; whatever is held then is held for ever."""
NOTED_S = 10.0
"""What is held for longer is told."""
BAD_WORDS = ("ERROR", "CRITICAL", "Traceback")
"""Of a log: nothing that goes wrong outside a process is an error inside it."""
TAIL_BYTES = 3000


@dataclass(frozen=True, slots=True)
class Played:
    """What came of one seed."""

    outcomes: Counter[str]
    """How the clients' streams ended."""
    slowest_s: float
    """Of the streams."""
    quiet_s: float
    """Until nobody held anything any more, after the last stream's end."""
    held: str
    """What was held for long."""

    def __str__(self) -> str:
        times = f"slowest stream {self.slowest_s:.1f} s, quiet after {self.quiet_s:.1f} s"
        return "; ".join(filter(None, (counts(self.outcomes), times, self.held)))


def counts(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in sorted(counter.items()))


def play(fleet: RelayedDeployment, seed: int) -> Played:
    """Raises `Violation` with all that is known."""
    plan = draw(seed)
    sizes = {path: path.stat().st_size for path in fleet.directory.glob("*.log")}
    try:
        clients = _play(fleet, plan)
        ended = time.monotonic()
        held = _quiet(fleet)
        quiet_s = time.monotonic() - ended
        _clean_logs(fleet, sizes)
    except Exception as error:
        faults = "\n".join(f"  {fault}" for fault in plan.faults)
        raise Violation(f"seed {seed}: {error}\nits faults:\n{faults}\n{tails(fleet)}") from error
    return Played(Counter(c.outcome for c in clients), max(c.seconds for c in clients), quiet_s, held)


def _play(fleet: RelayedDeployment, plan: Plan) -> list[Client]:
    """The clients, all of whose streams have ended as they must."""
    began = time.monotonic()
    clients = [
        Client(ask, f"client {number}", fleet.port, fleet.model_name, began) for number, ask in enumerate(plan.asks)
    ]
    for client in clients:
        client.start()
    try:
        _strike(fleet, plan.faults, began)
    finally:
        for client in clients:
            client.join(max(0.0, began + HANG_S - time.monotonic()))
        for links in fleet.links.values():
            links.forget()
    wrong = [c.violation or f"{c.name} hangs" for c in clients if c.violation or c.is_alive()]
    if plan.gentle:
        wrong += [f"{c.name} ends by {c.outcome}, though little went wrong" for c in clients if c.outcome in CLEAR]
    if wrong:
        raise Violation("; ".join(wrong))
    return clients


def _strike(fleet: RelayedDeployment, faults: tuple[Fault, ...], began: float) -> None:
    """Each at its time; a worker that ended starts again, one that stands still goes on."""
    for at, act in sorted(_acts(fleet, faults), key=lambda timed: timed[0]):
        threading.Event().wait(max(0.0, began + at - time.monotonic()))
        act()


def _acts(fleet: RelayedDeployment, faults: tuple[Fault, ...]) -> list[tuple[float, Callable[[], None]]]:
    acts: list[tuple[float, Callable[[], None]]] = []
    for fault in faults:
        name, later = fault.worker, fault.at + fault.seconds
        if fault.kind == KILL:
            acts += [(fault.at, lambda n=name: fleet.kill(n)), (later, lambda n=name: fleet.start(n))]  # type: ignore[misc]
        elif fault.kind in (PAUSE, RESTART):
            first, then = (signal.SIGSTOP, fleet.resume) if fault.kind == PAUSE else (signal.SIGTERM, fleet.restart)
            acts += [(fault.at, lambda n=name, s=first: fleet.signal(n, s)), (later, lambda n=name, t=then: t(n))]  # type: ignore[misc]
        else:
            strikes = fleet.links[name].sides[fault.side]
            acts.append((fault.at, lambda s=strikes, f=fault: s.strike(f.kind, f.count, f.seconds)))  # type: ignore[misc]
    return acts


def _quiet(fleet: RelayedDeployment) -> str:
    """Waits until everybody is there again and nobody holds anything; returns what was held for long."""
    fleet.wait_ready()
    try:
        fleet.assert_quiet(NOTED_S)
    except AssertionError as held:
        fleet.assert_quiet(QUIET_S - NOTED_S)
        return str(held)
    return ""


def _clean_logs(fleet: RelayedDeployment, sizes: dict[Path, int]) -> None:
    for path in fleet.directory.glob("*.log"):
        with path.open() as log:
            log.seek(sizes.get(path, 0))
            for line in log:
                if any(word in line for word in BAD_WORDS):
                    raise Violation(f"{path.name}: {line.rstrip()}")


def tails(fleet: RelayedDeployment) -> str:
    return "\n".join(f"--- {p.name}\n{p.read_text()[-TAIL_BYTES:]}" for p in sorted(fleet.directory.glob("*.log")))
