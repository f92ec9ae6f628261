"""`python -m tests.faults`: plays seeds over real processes until one fails.

`--first N --seeds 1` plays one again: the same requests and faults, though not to the millisecond.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.faults.client import Violation
from tests.faults.fleet import relayed
from tests.faults.plan import WORKER_KINDS, draw
from tests.faults.play import counts, play


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=200, help="how many")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    faults: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    with tempfile.TemporaryDirectory(prefix="kvmesh-") as directory, relayed(Path(directory)) as fleet:
        for seed in range(options.first, options.first + options.seeds):
            seed_began = time.monotonic()
            try:
                found = play(fleet, seed)
            except Violation as violation:
                print(f"{violation}\nagain: python -m tests.faults --first {seed} --seeds 1")
                return 1
            outcomes += found.outcomes
            faults.update(fault.kind for fault in draw(seed).faults if fault.kind in WORKER_KINDS)
            print(f"seed {seed} ({time.monotonic() - seed_began:.1f} s): {found}", flush=True)
        faults.update(sum((s.done for links in fleet.links.values() for s in links.sides.values()), Counter()))
    seconds = time.monotonic() - began
    print(f"seeds {options.first} to {options.first + options.seeds - 1} hold ({seconds:.0f} s)")
    print(f"{faults.total()} faults: {counts(faults)}; {outcomes.total()} streams: {counts(outcomes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
