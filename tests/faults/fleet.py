"""A deployment whose workers' links go through relays, and what may be done to it."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from mesh.keys import create
from mesh.modeldir import DEMO_MODEL
from tests.e2e.processes import Deployment, Process, free_port
from tests.faults.links import Links
from tests.faults.nursery import Nursery
from tests.faults.plan import MAX_MODEL_LEN, WORKERS

FLAGS = (
    *("--engine", "sim", "--sim-step-s", "0.01", "--max-num-batched-tokens", "64", "--max-num-seqs", "16"),
    *("--max-model-len", str(MAX_MODEL_LEN), "--kv-blocks", "512", "--transport", "zmq", "--drain-timeout", "5"),
)
DRAIN_S = 20.0
"""A worker that is told to leave is gone by then."""


@dataclass(slots=True)
class RelayedDeployment(Deployment):
    nursery: Nursery = field(default_factory=Nursery)
    links: dict[str, Links] = field(default_factory=dict)

    def start(self, name: str) -> None:
        self.start_worker(name.split("-")[0], name)

    def restart(self, name: str) -> None:
        """After its end, which was asked for."""
        process = self.workers[name].process
        try:
            process.wait(DRAIN_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{name} does not leave within {DRAIN_S} s") from None
        self.start(name)

    def resume(self, name: str) -> None:
        self.signal(name, signal.SIGCONT)

    def signal(self, name: str, number: signal.Signals) -> None:
        self.workers[name].process.send_signal(number)

    def _start_worker(self, role: str, arguments: list[str], name: str) -> Process:
        return self.nursery.fork(role, arguments, self.links[name].kv_address, self.directory / f"{name}.log")

    def _addresses(self, name: str, port: int) -> list[str]:
        return self.links[name].arguments


@contextmanager
def relayed(directory: Path) -> Iterator[RelayedDeployment]:
    create(directory / "keys")
    fleet = RelayedDeployment(directory, DEMO_MODEL, free_port(), FLAGS, keys=directory / "keys")
    try:
        fleet.start_proxy("--disaggregate-above", "32", "--request-timeout", "60")
        control_port = int(fleet.control.rsplit(":", 1)[1])
        for name in WORKERS:
            fleet.links[name] = Links(control_port)
            fleet.start(name)
        fleet.wait_ready()
        yield fleet
    finally:
        fleet.stop()
        fleet.nursery.close()
        for links in fleet.links.values():
            links.close()
