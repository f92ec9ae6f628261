"""`python -m tests.fuzz --requests 20000 --seed 1`: prints every failure and how often each status came.

With `--service` the requests go to a real proxy with real workers (a simulated engine), which must live through them.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from pathlib import Path

from tests.clients.scripted import MODEL_DIR as DEMO_MODEL
from tests.e2e.processes import deployment
from tests.fuzz.remote import FLAGS, RemoteTarget
from tests.fuzz.run import Report, fuzz


def fuzzed_service(requests: int, seed: int) -> Report:
    with (
        tempfile.TemporaryDirectory() as directory,
        deployment(Path(directory), DEMO_MODEL, prefill=1, decode=1, flags=FLAGS) as service,
    ):
        report = asyncio.run(fuzz(requests, seed, RemoteTarget(service)))
        ended = [name for name, worker in service.workers.items() if worker.process.poll() is not None]
        report.failures += [f"{name} ended" for name in ended]
        service.assert_quiet()
    return report


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzzes the API by its own description.")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--service", action="store_true", help="to processes, instead of within this one")
    options = parser.parse_args()
    started = time.perf_counter()
    if options.service:
        report = fuzzed_service(options.requests, options.seed)
    else:
        report = asyncio.run(fuzz(options.requests, options.seed))
    for line in report.failures:
        print(line)
    counts = ", ".join(f"{status}: {count}" for status, count in sorted(report.statuses.items()))
    print(f"{options.requests} requests in {time.perf_counter() - started:.1f} s; {counts}")
    print(f"{len(report.failures)} failures")
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
