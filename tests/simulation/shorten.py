"""A failing seed, with as few requests and faults as still make it fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from tests.simulation.fleet import Simulation
from tests.simulation.oracle import Violation
from tests.simulation.plan import Plan

T = TypeVar("T")
VIOLATION = "VIOLATION:"
"""The last line of a history that has one."""
TRIES = 400
"""So many runs are made at most; a run takes about a tenth of a second."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A seed that fails. `faults`: names of those that it needs."""

    plan: Plan
    faults: tuple[str, ...]
    violation: str


def failure(plan: Plan, faults: tuple[str, ...] | None = None) -> Failure | None:
    """What is wrong when the plan is played with these faults only; None: nothing."""
    simulation = Simulation(plan, faults)
    try:
        simulation.run()
    except Violation as violation:
        return Failure(plan, tuple(simulation.faults.injected), str(violation))
    return None


def shorten(found: Failure) -> Failure:
    """Leaves out requests, then faults, then what requests that leaves, in ever smaller groups, as long as something
    goes wrong without them. It need not be the same thing: a shorter history of any violation is worth more."""
    left = TRIES

    def fails(plan: Plan, faults: tuple[str, ...]) -> bool:
        nonlocal found, left
        left -= 1
        shorter = failure(plan, faults)
        if shorter is not None:
            found = shorter
        return shorter is not None

    def drop_requests() -> None:
        _drop(found.plan.requests, lambda rest: left > 0 and fails(replace(found.plan, requests=rest), found.faults))

    drop_requests()
    _drop(found.faults, lambda rest: left > 0 and fails(found.plan, rest))
    drop_requests()
    return found


def _drop(items: tuple[T, ...], fails: Callable[[tuple[T, ...]], bool]) -> None:
    """Tries `items` without each group of them, from the last to the first."""
    size = (len(items) + 1) // 2
    while size:
        end = len(items)
        while end > 0:
            rest = items[: max(0, end - size)] + items[end:]
            if fails(rest):
                items = rest
            end -= size
        size //= 2


def history(plan: Plan, faults: tuple[str, ...] | None = None) -> list[str]:
    """All that happens when the plan is played with these faults only, line by line."""
    lines: list[str] = []
    try:
        Simulation(plan, faults, lines).run()
    except Violation as violation:
        lines.append(f"{VIOLATION} {violation}")
    return lines
