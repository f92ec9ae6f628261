"""`docs/metrics.md` lists exactly what the processes export."""

from __future__ import annotations

import re
from pathlib import Path

from prometheus_client import CollectorRegistry

from proxy.dispatcher import MeshDispatcher
from proxy.fleet import Fleet
from proxy.fleet_metrics import FleetCollector
from proxy.metrics import ProxyMetrics
from proxy.routing.residency import LocalResidency
from tests.worker.role_fakes import info
from worker.metrics import WorkerMetrics

PAGE = Path(__file__).resolve().parents[2] / "docs" / "metrics.md"


def documented(section: str) -> set[tuple[str, str]]:
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return {(name, kind) for name, kind in re.findall(r"^\| `([^`]+)` \| (\w+) \|", text, re.MULTILINE)}


def exported(registry: CollectorRegistry) -> set[tuple[str, str]]:
    return {(family.name, family.type) for family in registry.collect()}


def test_the_workers_metrics_are_documented() -> None:
    assert exported(WorkerMetrics(info()).registry) == documented("Worker")


def test_the_proxys_metrics_are_documented() -> None:
    fleet = Fleet(LocalResidency(), lambda: 0.0, lambda later: None)
    dispatcher = MeshDispatcher(fleet, lambda: 0.0, max_requests=1, disaggregate_above=0)
    metrics = ProxyMetrics("m")
    metrics.registry.register(FleetCollector(fleet, dispatcher, lambda: 0, lambda: 0))
    assert exported(metrics.registry) == documented("Proxy")
