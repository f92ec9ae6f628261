"""`python -m tests.simulation`: plays seeds until one of the bounds is reached, or a seed fails.

`--seed N` shows one; `--mutants` plays seeds against every mistake of `mutants.py`.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from contextlib import nullcontext

from tests.simulation.mutants import MUTANTS
from tests.simulation.plan import draw
from tests.simulation.scale import replaced
from tests.simulation.shorten import VIOLATION, history, shorten
from tests.simulation.suite import Suite, hunt, play

PROGRESS_S = 10.0
GARBAGE_OBJECTS = 500_000
"""Of some seeds together."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--fresh", action="store_true", help="the first seed is the time")
    parser.add_argument("--seeds", type=int, help="so many at most")
    parser.add_argument("--faults", type=int, help="until so many were injected")
    parser.add_argument("--seconds", type=float, help="for so long")
    parser.add_argument("--seed", type=int, help="prints what happens in this one")
    parser.add_argument("--mutant", choices=MUTANTS, help="with this mistake made")
    parser.add_argument(
        "--mutants", nargs="*", metavar="MUTANT", help="these mistakes, or all, in turn; --seeds seeds at most for each"
    )
    options = parser.parse_args(arguments)
    gc.freeze()  # a fleet is garbage as a whole, and looking for it more often costs a tenth of the time
    gc.set_threshold(GARBAGE_OBJECTS)
    if options.mutants is not None:
        return _mutants(options.mutants or list(MUTANTS), options.first, options.seeds or 1000)
    with replaced(*MUTANTS[options.mutant].changes) if options.mutant else nullcontext():
        if options.seed is not None:
            return _show(options.seed)
        first = time.time_ns() // 1_000_000 if options.fresh else options.first
        return _play(first, options.seeds, options.faults, options.seconds)


def _show(seed: int) -> int:
    lines = history(draw(seed))
    print("\n".join(lines))
    return 1 if lines[-1].startswith(VIOLATION) else 0


def _play(first: int, seeds: int | None, faults: int | None, seconds: float | None) -> int:
    if seeds is None and faults is None and seconds is None:
        seeds = 100
    began, shown = time.monotonic(), 0.0
    suite = Suite()
    while (
        (seeds is None or suite.seeds < seeds)
        and (faults is None or suite.faults < faults)
        and (seconds is None or time.monotonic() - began < seconds)
    ):
        seed = first + suite.seeds
        found = play(seed, suite)
        if found is not None:
            print(f"seed {seed} FAILS: {found.violation}\nshortening its {len(found.faults)} faults ...", flush=True)
            short = shorten(found)
            print("\n".join(history(short.plan, short.faults)))
            print(f"seed {seed}: {short.violation}\nwith: {'; '.join(short.faults) or 'no fault'}")
            return 1
        if time.monotonic() - began > shown + PROGRESS_S:
            shown = time.monotonic() - began
            print(f"{shown:5.0f} s: {suite}", flush=True)
    print(f"seeds {first} to {first + suite.seeds - 1} hold: {suite}")
    print(", ".join(f"{what} {count}" for what, count in suite.outcomes.most_common()))
    return 0


def _mutants(names: list[str], first: int, seeds: int) -> int:
    survivors = []
    for name in names:
        began = time.process_time()
        killed = hunt(name, range(first, first + seeds))
        seconds = time.process_time() - began
        if killed is None:
            survivors.append(name)
        verdict = f"killed by seed {killed[0]}: {killed[1]}" if killed else f"SURVIVED {seeds} seeds"
        print(f"{name:40} {seconds:6.1f} s  {verdict}"[:160], flush=True)
    print(f"{len(names) - len(survivors)} of {len(names)} mutants killed; survived: {', '.join(survivors) or 'none'}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
