"""A worker's metrics, in its own registry; observed on the I/O thread, never inside a step.

Names and buckets follow vLLM's where the meaning is the same, so existing dashboards read them.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvtransfer.endpoint import FetchEnded, TransferStats
from mesh.messages import Load, WorkerInfo
from worker.steploop import Stepped

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TRANSFER_S = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 5)
RATIO = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)
RELEASES = ("confirmed", "aborted", "lease", "cap", "other")
OUTCOMES = ("ok", "timeout", "peer_lost", "refused", "aborted", "corrupt")


class WorkerMetrics:
    """Every child is made at the start, so that a rate over a counter is never blind to its first event."""

    def __init__(self, info: WorkerInfo) -> None:
        self.registry = CollectorRegistry()
        labels = {"model_name": info.model, "engine": info.worker_id, "role": info.role}
        names = tuple(labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, names, registry=self.registry).labels(**labels)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, names, registry=self.registry).labels(**labels)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, names, registry=self.registry, buckets=buckets).labels(**labels)

        self._running = gauge("vllm:num_requests_running", "Requests in the running batch")
        self._waiting = gauge("vllm:num_requests_waiting", "Requests waiting to be scheduled")
        self._fetching = gauge(
            "kvmesh_num_requests_fetching", "Requests waiting for KV blocks of another worker"
        )
        self._held = gauge("kvmesh_num_requests_held", "Finished prefills whose blocks wait to be fetched")
        self._usage = gauge(
            "vllm:kv_cache_usage_perc", "Share of KV blocks that running requests hold, 0 to 1"
        )
        blocks = Gauge("kvmesh_kv_blocks", "KV blocks by state", (*names, "state"), registry=self.registry)
        capacity = Gauge("kvmesh_kv_blocks_capacity", "KV blocks in the pool", names, registry=self.registry)
        capacity.labels(**labels).set(info.total_blocks)
        self._blocks = {s: blocks.labels(**labels, state=s) for s in ("free", "cached", "held")}
        self._steps = histogram("vllm:iteration_tokens_total", "Tokens computed by one step", STEP_TOKENS)
        self._generated = counter("vllm:generation_tokens_total", "Tokens sampled here")
        self._recomputed = counter(
            "kvmesh_recomputed_tokens_total", "Tokens computed here because blocks did not arrive"
        )
        self._transfer_s = histogram(
            "kvmesh_kv_transfer_seconds", "From the first fetch message to the last block", TRANSFER_S
        )
        self._overlap = histogram(
            "kvmesh_kv_transfer_overlap_ratio",
            "Share of bytes that arrived before the first token did",
            RATIO,
        )
        self._bytes = counter("kvmesh_kv_transfer_bytes_total", "Bytes of KV received from other workers")
        transfers = Counter(
            "kvmesh_kv_transfers_total", "Fetches by outcome", (*names, "outcome"), registry=self.registry
        )
        self._transfers = {o: transfers.labels(**labels, outcome=o) for o in OUTCOMES}
        releases = Counter(
            "kvmesh_kv_streams_released_total",
            "Held prefills by what ended them",
            (*names, "reason"),
            registry=self.registry,
        )
        self._releases = {r: releases.labels(**labels, reason=r) for r in RELEASES}
        endpoint = Gauge(
            "kvmesh_kv_endpoint", "State of the transfer endpoint", (*names, "what"), registry=self.registry
        )
        self._endpoint = {w: endpoint.labels(**labels, what=w) for w in ("open_transfers", "held_streams")}
        corrupt = Counter(
            "kvmesh_kv_corrupt_total", "Frames whose digest did not fit", names, registry=self.registry
        )
        self._corrupt = corrupt.labels(**labels)
        self._seen_corrupt = 0
        self._total_blocks = max(1, info.total_blocks)

    def stepped(self, event: Stepped) -> None:
        self._steps.observe(event.output.num_scheduled_tokens)
        self._generated.inc(len(event.output.tokens))

    def beaten(self, load: Load, transfers: TransferStats) -> None:
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._fetching.set(load.fetching)
        self._held.set(load.held)
        self._usage.set(load.held_blocks / self._total_blocks)
        self._blocks["free"].set(load.free_blocks)
        self._blocks["cached"].set(load.cached_blocks)
        self._blocks["held"].set(load.held_blocks)
        self._endpoint["open_transfers"].set(transfers.open_transfers)
        self._endpoint["held_streams"].set(transfers.held_streams)
        self._corrupt.inc(transfers.corrupt - self._seen_corrupt)
        self._seen_corrupt = transfers.corrupt

    def fetched(self, event: FetchEnded, received: int, before_first: int) -> None:
        self._transfers[event.outcome if event.outcome in self._transfers else "refused"].inc()
        self._transfer_s.observe(event.seconds)
        self._bytes.inc(received)
        if received:
            self._overlap.observe(before_first / received)

    def recomputed(self, tokens: int) -> None:
        self._recomputed.inc(tokens)

    def released(self, reason: str) -> None:
        self._releases[reason if reason in self._releases else "other"].inc()
