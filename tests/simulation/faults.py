"""What goes wrong in one seed: a list of blows, and a fate for every message.

The fate of a message is a function of the seed, its connection and its number there, and a blow is drawn before
anything happens; so leaving one fault out leaves the others where they were, and a history can be shortened.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

from engine.sim_engine import MASK, splitmix64

HORIZON_S = 12.0
"""Nothing new goes wrong later."""
KV_FATES = ("lose", "flip", "truncate", *("repeat",) * 2, *("overtake",) * 3, *("delay",) * 4)
GENTLE_FATES = ("lose", "flip", "truncate", "overtake")
CONTROL_FATES = ("delay",) * 127 + ("cut",)
SCALE = 1 << 16


@dataclass(frozen=True, slots=True)
class Fate:
    """What becomes of one message."""

    kind: str
    seconds: float
    number: int
    """Where the damage is."""


@dataclass(frozen=True, slots=True)
class Blow:
    """Something that happens to a process, a connection or a client."""

    at: float
    kind: str
    target: str
    other: str = ""
    seconds: float = 0.0
    flag: bool = False
    """Of a crash: silent."""

    def __str__(self) -> str:
        where = f"{self.target}>{self.other}" if self.other else self.target
        silent = " silently" if self.flag else ""
        return f"{self.kind} {where} at {self.at:.3f} for {self.seconds:.3f}{silent}"


class Faults:
    """Draws faults, and notes those that were injected."""

    def __init__(
        self, seed: int, rates: dict[str, float], only: Collection[str] | None = None, *, once: bool = False
    ) -> None:
        """`only`: names of faults, of which those that are drawn are injected. `once`: of the messages between two
        processes, in both directions, one."""
        self._seed = splitmix64(seed)
        self._limits = {kind: int(rate * SCALE) for kind, rate in rates.items()}
        self._only = only if only is None else frozenset(only)
        self.injected: list[str] = []
        self._struck: set[str] | None = set() if once else None
        self.over = False
        """The horizon is behind: whatever is sent now arrives."""

    def fate(self, kind: str, key: str, salt: int, count: int) -> Fate | None:
        """What becomes of the `count`-th message of a direction; None: it arrives."""
        limit = self._limits.get(kind, 0)
        if not limit or self.over:
            return None
        number = splitmix64((self._seed ^ salt * 0x9E3779B97F4A7C15 ^ count * 0xD1342543DE82EF95) & MASK)
        if number % SCALE >= limit:
            return None
        kinds = GENTLE_FATES if self._struck is not None else KV_FATES if kind == "kv" else CONTROL_FATES
        fate = Fate(kinds[(number >> 16) % len(kinds)], 0.002 * 1.5 ** ((number >> 24) % 16), number >> 32)
        pair = key.partition("/")[0]
        if self._struck is not None and pair in self._struck:
            return None
        if not self._happens(f"{fate.kind} {key}{count}"):
            return None
        if self._struck is not None:
            self._struck.add(pair)
        return fate

    def strikes(self, blow: Blow) -> bool:
        """Notes a blow; False: it is left out."""
        return self._happens(str(blow))

    def _happens(self, name: str) -> bool:
        if self._only is not None and name not in self._only:
            return False
        self.injected.append(name)
        return True


def draw_blows(
    chance: random.Random, count: int, workers: list[str], proxies: list[str], requests: list[str]
) -> list[Blow]:
    """`count` blows within the horizon."""
    return sorted((_draw(chance, workers, proxies, requests) for _ in range(count)), key=lambda b: b.at)


def _draw(chance: random.Random, workers: list[str], proxies: list[str], requests: list[str]) -> Blow:
    at = chance.uniform(0.05, HORIZON_S)
    kinds = ("crash", "crash", "pause", "hang", "jump", "cut", "cut", "partition", "slow", "cancel", "drain", "proxy")
    kind = chance.choice(kinds)
    worker = chance.choice(workers)
    if kind == "cancel":
        return Blow(at, kind, chance.choice(requests))
    if kind in ("cut", "partition"):
        other = chance.choice([n for n in (*workers, *proxies) if n != worker])
        one, two = (worker, other) if chance.random() < 0.5 else (other, worker)
        return Blow(at, kind, one, two, chance.choice((0.1, 1.0, 4.0, 8.0)) if kind == "partition" else 0.0)
    if kind == "proxy":
        sub = chance.choice(("pause", "pause", "jump", "crash"))
        return Blow(at, sub, chance.choice(proxies), seconds=chance.choice((0.2, 1.0, 4.0)))
    seconds = {
        "crash": chance.choice((0.02, 0.5, 3.0, 6.0)),
        "pause": chance.choice((0.1, 0.1, 2.0, 4.0, 4.0, 12.0)),
        "hang": chance.choice((0.5, 4.0, 9.0)),
        "jump": chance.choice((0.5, 3.0, 20.0)),
        "slow": chance.choice((0.5, 3.0)),
        "drain": chance.choice((0.02, 2.0)),
    }[kind]
    return Blow(at, kind, worker, seconds=seconds, flag=kind == "crash" and chance.random() < 0.3)
