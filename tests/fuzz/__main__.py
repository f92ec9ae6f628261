"""`python -m tests.fuzz --requests 20000 --seed 1`: prints every failure and how often each status came."""

from __future__ import annotations

import argparse
import asyncio
import time

from tests.fuzz.run import fuzz


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzzes the API by its own description.")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    started = time.perf_counter()
    report = asyncio.run(fuzz(options.requests, options.seed))
    for line in report.failures:
        print(line)
    counts = ", ".join(f"{status}: {count}" for status, count in sorted(report.statuses.items()))
    print(f"{options.requests} requests in {time.perf_counter() - started:.1f} s; {counts}")
    print(f"{len(report.failures)} failures")
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
