"""One fetch over several holders: who is asked for what, and who next when one fails or has less than was thought.

    plan ──asks──▶ holder ──ended──▶ what it brought is not wanted any more
      ▲                        └───▶ what it did not bring it is not asked for again; if it failed, for nothing
      └──────────────────────────────so every round leaves less to ask

What is wanted, on its way from nobody and had by nobody is missing, and a miss is computed. A state is a value.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvtransfer.planning import Cost, Lane, assign


@dataclass(frozen=True, slots=True)
class Source:
    """A holder of this fetch."""

    has: int
    """What it may be asked for: shrinks as it proves to have less."""
    spare: bool = False
    """As in `Lane`."""
    asked: int = 0
    """On its way from here."""


@dataclass(frozen=True, slots=True)
class Gathering:
    """A fetch that has not ended."""

    wanted: int
    """Not brought by anybody who is done."""
    sources: tuple[Source, ...]

    @property
    def open(self) -> int:
        """Wanted and on its way from nobody."""
        mask = self.wanted
        for source in self.sources:
            mask &= ~source.asked
        return mask


def plan(state: Gathering, costs: Sequence[Cost]) -> tuple[Gathering, list[int]]:
    """Asks for everything that is open: for each source, what to ask of it now."""
    lanes = [Lane(s.has, cost, s.spare) for s, cost in zip(state.sources, costs, strict=True)]
    asks = assign(state.open, lanes)
    sources = tuple(replace(s, asked=s.asked | ask) for s, ask in zip(state.sources, asks, strict=True))
    return replace(state, sources=sources), asks


def ended(state: Gathering, number: int, asked: int, missing: int, *, failed: bool) -> Gathering:
    """A source is done with what it was `asked` for in one go, and has brought all of it but `missing`. `failed`: it
    is not to be asked again."""
    source = state.sources[number]
    source = replace(source, has=0 if failed else source.has & ~missing, asked=source.asked & ~asked)
    sources = (*state.sources[:number], source, *state.sources[number + 1 :])
    return Gathering(state.wanted & ~(asked & ~missing), sources)


def stopped(state: Gathering) -> Gathering:
    """Nobody is asked any more."""
    return replace(state, sources=tuple(replace(s, has=0) for s in state.sources))
