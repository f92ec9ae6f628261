"""What the proxy knows of its fleet, for /metrics; read when asked, counted nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mesh.layout import KvLayout
from proxy.dispatcher import MeshDispatcher
from proxy.fleet import Fleet

LAYOUT = tuple([field.name for field in fields(KvLayout)])
CAUSES = ("lost", "refused", "gap", "diverged")


class FleetCollector(Collector):
    def __init__(
        self,
        fleet: Fleet,
        dispatcher: MeshDispatcher,
        bad_frames: Callable[[], int],
        refused_keys: Callable[[], int],
    ) -> None:
        self._fleet = fleet
        self._dispatcher = dispatcher
        self._bad_frames = bad_frames
        self._refused_keys = refused_keys

    def collect(self) -> Iterator[Metric]:
        workers = GaugeMetricFamily("kvmesh_workers", "Registered workers.", labels=["role", "state"])
        states = Counter((w.info.role, w.state) for w in self._fleet.pool.workers())
        for (role, state), count in sorted(states.items()):
            workers.add_metric([role, state], count)
        yield workers
        layouts = GaugeMetricFamily(
            "kvmesh_worker_layout", "1, with the layout of a worker's KV blocks.", labels=["worker", "role", *LAYOUT]
        )
        for worker in self._fleet.pool.workers():
            values = [str(getattr(worker.info.layout, name)) for name in LAYOUT]
            layouts.add_metric([worker.info.worker_id, worker.info.role, *values], 1)
        yield layouts
        retries = CounterMetricFamily(
            "kvmesh_attempts_repeated",
            "Attempts after a choice's first, by why the last one ended.",
            labels=["cause"],
        )
        for cause in CAUSES:
            retries.add_metric([cause], self._dispatcher.retries.get(cause, 0))
        yield retries
        yield GaugeMetricFamily("kvmesh_choices_live", "Choices being generated.", self._dispatcher.live)
        yield GaugeMetricFamily("kvmesh_choices_waiting", "Choices without a worker.", self._dispatcher.waiting)
        yield GaugeMetricFamily("kvmesh_residency_names", "Blocks in the local index.", len(self._fleet.index))
        yield CounterMetricFamily("kvmesh_residency_gaps", "Missed residency events.", self._fleet.gaps)
        yield CounterMetricFamily("kvmesh_control_bad_frames", "Control frames dropped.", self._bad_frames())
        yield CounterMetricFamily(
            "kvmesh_control_refused_keys", "Control connections refused for their key.", self._refused_keys()
        )
