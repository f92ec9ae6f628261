"""Many seeds, and what they came to."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from tests.simulation.fleet import Simulation
from tests.simulation.mutants import MUTANTS
from tests.simulation.oracle import Violation
from tests.simulation.plan import draw
from tests.simulation.scale import replaced
from tests.simulation.shorten import Failure, failure


@dataclass(slots=True, eq=False)
class Suite:
    """A sum over seeds that hold."""

    seeds: int = 0
    faults: int = 0
    events: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    began: float = field(default_factory=time.process_time)
    """Processor time: how fast this is on a core of its own."""
    began_at: float = field(default_factory=time.monotonic)

    def __str__(self) -> str:
        seconds, passed = time.process_time() - self.began, time.monotonic() - self.began_at
        return (
            f"{self.seeds} seeds, {self.faults} faults, {self.events} events in {seconds:.1f} s of processor time, "
            f"{self.faults / max(seconds, 1e-9):.0f} faults/s ({self.faults / max(passed, 1e-9):.0f} faults/s as "
            "the clock runs)"
        )


def play(seed: int, suite: Suite) -> Failure | None:
    """Plays one seed and adds it to the sum, unless it fails."""
    plan = draw(seed)
    simulation = Simulation(plan)
    try:
        report = simulation.run()
    except Violation as violation:
        return Failure(plan, tuple(simulation.faults.injected), str(violation))
    suite.seeds += 1
    suite.faults += len(report.injected)
    suite.events += report.events
    suite.outcomes.update(report.outcomes.values())
    return None


def hunt(name: str, seeds: Iterable[int]) -> tuple[int, str] | None:
    """The first of the seeds that finds this mutant out, and how; None: it survives them all."""
    with replaced(*MUTANTS[name].changes):
        for seed in seeds:
            found = failure(draw(seed))
            if found is not None:
                return seed, found.violation
    return None
