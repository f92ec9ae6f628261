"""`python -m tests.simulation`: plays seeds; `--seed N -v` shows one."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.simulation.fleet import Simulation
from tests.simulation.oracle import Violation
from tests.simulation.plan import draw


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("-v", action="store_true", dest="verbose")
    options = parser.parse_args()
    seeds = range(options.first, options.first + options.count) if options.seed is None else (options.seed,)
    outcomes: Counter[str] = Counter()
    faults = failed = events = 0
    began = time.process_time()
    for seed in seeds:
        history: list[str] | None = [] if options.verbose else None
        try:
            report = Simulation(draw(seed), history=history).run()
        except Violation as violation:
            failed += 1
            print(f"seed {seed}: {violation}", flush=True)
            if options.verbose:
                print("\n".join(history or ()))
                raise
            continue
        if options.verbose:
            print("\n".join(history or ()))
        outcomes.update(report.outcomes.values())
        faults += len(report.injected)
        events += report.events
    seconds = time.process_time() - began
    print(f"{len(seeds)} seeds, {failed} failed, {faults} faults, {events} events in {seconds:.1f} s of processor time")
    print(", ".join(f"{what} {count}" for what, count in outcomes.most_common()))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
