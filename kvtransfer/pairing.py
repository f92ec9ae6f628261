"""Which transport two workers use, by where they are, and why each better one is not used: what `kvmesh doctor` says.

The workers' own choice is `transports.choice`; this is the same choice told in words, from links that were measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from kvtransfer.transports import cuda, inline, shm
from kvtransfer.transports.choice import NCCL, unfit

BEST_FIRST = (cuda.NAME, shm.NAME, NCCL, inline.NAME)
"""`local` is for endpoints of one process, `gloo` for tests: no pair of workers has a reason to use them."""
NO_KEYS = "other hosts are refused before the fleet has keys (`kvmesh keys DIR`, --keys DIR)"
Against = Callable[[str], str]
"""Why two workers in one place cannot use a transport; empty: they can."""
Objection = Callable[[str, Mapping[str, str]], str]
"""The same, from what failed here too."""


@dataclass(frozen=True, slots=True)
class Pair:
    """What two workers in one place use."""

    place: str
    used: str
    """A transport; empty: none."""
    instead_of: Mapping[str, str]
    """Each better transport, and why it is not used; all of them where none is."""
    sealed: bool = False

    def text(self, names: Mapping[str, str]) -> str:
        """In words; `names`: what the transports are called."""
        reasons = "".join(f"; not {better}: {why}" for better, why in self.instead_of.items())
        sealed = ", sealed with AES-256-GCM" if self.sealed else ""
        return f"{self.place}: {names.get(self.used, 'none')}{sealed}{reasons}"


def pairs(failures: Mapping[str, str], *, order: Sequence[str], device: str, sealed: bool) -> list[Pair]:
    """`failures`: what went wrong with each route that was tried, empty: nothing. `order`: `--transport`; `device`:
    `--device`; `sealed`: with `--keys`."""
    places: dict[str, Objection] = {
        "same host": _here,
        "containers of one host": _apart,
        "other hosts": partial(_far, sealed=sealed),
    }
    here, apart, far = (
        _pair(place, partial(_against, against, failures, device), order) for place, against in places.items()
    )
    return [here, apart, replace(far, sealed=sealed and far.used == inline.NAME)]


def _pair(place: str, against: Against, order: Sequence[str]) -> Pair:
    """As `choose` does: the first of `order` that both can use, `zmq` after all."""
    asked = list(dict.fromkeys([*order, inline.NAME]))
    used = next((name for name in asked if name in BEST_FIRST and not against(name)), "")
    better = BEST_FIRST[: BEST_FIRST.index(used)] if used else BEST_FIRST
    return Pair(place, used, {name: against(name) or _unasked(name, asked) for name in better})


def _unasked(name: str, asked: Sequence[str]) -> str:
    return "--transport prefers another" if name in asked else "--transport does not name it"


def _against(place: Objection, failures: Mapping[str, str], device: str, name: str) -> str:
    return unfit(name, device) or place(name, failures)


def _here(name: str, failures: Mapping[str, str]) -> str:
    if name == NCCL:
        return "it refuses two workers on one device"
    return failures.get("zmq-ipc" if name == inline.NAME else name, "")


def _apart(name: str, failures: Mapping[str, str]) -> str:
    if name in (cuda.NAME, shm.NAME):
        return "they do not share /dev/shm (--ipc=host, or a volume there, makes them the same host)"
    return _here(name, failures) if name != inline.NAME else failures.get("zmq-tcp", "")


def _far(name: str, failures: Mapping[str, str], sealed: bool) -> str:
    if name in (cuda.NAME, shm.NAME):
        return "they share no memory"
    if not sealed:
        return NO_KEYS
    return "" if name == NCCL else failures.get("zmq-aes", "")
