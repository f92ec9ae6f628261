"""A worker's metrics in its own registry, observed on the I/O thread and never inside a step.

Names that begin with `vllm:` mean what they mean there, so that dashboards made for it work. Every child is made at
the start: a rate over a counter is never blind to its first event.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from kvtransfer.endpoint import FetchEnded, TransferStats
from mesh import __version__
from mesh.messages import Load, PrefillReport, WorkerInfo
from worker.steploop import Stepped

STEP_TOKENS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
SECONDS = (0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 5)
BLOCK_STATES = ("free", "cached", "held")
OPEN = ("fetching", "serving", "streams", "slots")
SOURCES = ("local_compute", "local_cache_hit", "external_kv_transfer")
TRANSPORTS = ("local", "cuda", "shm", "zmq", "nccl", "gloo")
UNSEALED = ("forged", "replayed", "session", "truncated", "hello", "unknown_key", "client_key")
OUTCOMES = ("ok", "timeout", "peer_lost", "refused", "aborted")
REFUSALS = ("blocks_missing", "deadline", "draining", "no_memory", "stale_incarnation", "too_long", "wrong_role")


class WorkerMetrics:
    """What an SRE sees of one worker."""

    def __init__(self, info: WorkerInfo) -> None:
        self.registry = CollectorRegistry()
        self._labels = {"model_name": info.model, "engine": info.worker_id, "role": info.role}
        self._total_blocks = max(1, info.total_blocks)
        self._seen: TransferStats | None = None
        self._running = self._gauge("vllm:num_requests_running", "Requests in the running batch.")
        self._waiting = self._gauge("vllm:num_requests_waiting", "Requests that wait to be scheduled.")
        self._usage = self._gauge("vllm:kv_cache_usage_perc", "Share of KV blocks in use by requests, 0 to 1.")
        self._fetching = self._gauge("kvmesh_kv_fetching_requests", "Requests that wait for blocks of another worker.")
        self._held = self._gauge("kvmesh_kv_held_requests", "Finished prefills whose blocks wait to be fetched.")
        self._jobs = self._gauge("kvmesh_open_attempts", "Attempts of requests that are not over here.")
        self._blocks = self._gauges("kvmesh_kv_blocks", "KV blocks; the sum is the pool.", "state", BLOCK_STATES)
        self._open = self._gauges(
            "kvmesh_kv_open",
            "Transfers under way, streams kept for a fetcher, and its parcels in shared memory.",
            "what",
            OPEN,
        )
        self._step_tokens = self._histogram("vllm:iteration_tokens_total", "Tokens per engine step.", STEP_TOKENS)
        self._step_seconds = self._histogram("kvmesh_engine_step_seconds", "Time of one engine step.", SECONDS)
        self._transfer_seconds = self._histogram(
            "kvmesh_kv_transfer_seconds", "From a fetch to its last block.", SECONDS
        )
        self._generated = self._counter("vllm:generation_tokens", "Tokens generated here.")
        self._prompt = self._counter("vllm:prompt_tokens", "Prompt tokens computed here.")
        self._queries = self._counter("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self._hits = self._counter("vllm:prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self._sources = self._counters(
            "vllm:prompt_tokens_by_source", "Prompt tokens by where their KV came from.", "source", SOURCES
        )
        self._evicted = self._counter("kvmesh_kv_evicted_blocks", "Cached blocks that made room for others.")
        self._bytes = self._counters(
            "kvmesh_kv_transfer_bytes", "KV bytes received, by transport.", "transport", TRANSPORTS
        )
        self._sent = self._counter("kvmesh_kv_sent_bytes", "KV bytes sent to other workers.")
        self._overlapped = self._counter(
            "kvmesh_kv_transfer_overlap_bytes", "KV bytes received before the prefill that makes them ended."
        )
        self._transfers = self._counters("kvmesh_kv_transfers", "Fetches by how they ended.", "outcome", OUTCOMES)
        self._corrupt = self._counter("kvmesh_kv_corrupt", "Blocks whose digest did not match; each was dropped.")
        self._dropped = self._counter("kvmesh_kv_dropped", "Frames and blocks that were not accepted: stale, unknown.")
        self._unsealed = self._counters(
            "kvmesh_kv_unsealed", "Messages and connections that encryption refused.", "reason", UNSEALED
        )
        self._recomputed = self._counter(
            "kvmesh_recomputed_tokens", "Tokens computed here because blocks did not arrive."
        )
        self._refused = self._counters("kvmesh_refused_requests", "Requests handed back.", "code", REFUSALS)
        facts = {
            "block_size": str(info.layout.block_tokens),
            "num_gpu_blocks": str(info.total_blocks),
            "cache_dtype": info.layout.dtype,
            "version": __version__,
        }
        config = Gauge(
            "vllm:cache_config_info",
            "KV cache configuration; always 1.",
            (*self._labels, *facts),
            registry=self.registry,
        )
        config.labels(**self._labels, **facts).set(1)

    def stepped(self, event: Stepped) -> None:
        self._step_tokens.observe(event.output.num_scheduled_tokens)
        self._step_seconds.observe(event.seconds)
        self._generated.inc(len(event.output.tokens))
        self._evicted.inc(len(event.output.removed))

    def beaten(self, load: Load, transfers: TransferStats, jobs: int) -> None:
        """The engine's, the endpoint's and the role's state, at every beat."""
        self._jobs.set(jobs)
        self._running.set(load.running)
        self._waiting.set(load.waiting)
        self._fetching.set(load.fetching)
        self._held.set(load.held)
        self._usage.set(load.held_blocks / self._total_blocks)
        for state, count in zip(BLOCK_STATES, (load.free_blocks, load.cached_blocks, load.held_blocks), strict=True):
            self._blocks[state].set(count)
        kept = (transfers.fetching, transfers.serving, transfers.held_streams, transfers.slots)
        for what, count in zip(OPEN, kept, strict=True):
            self._open[what].set(count)
        self._transferred(transfers)

    def _transferred(self, now: TransferStats) -> None:
        before, self._seen = self._seen, now
        for transport, received in now.bytes_in.items():
            self._bytes[transport].inc(received - (before.bytes_in.get(transport, 0) if before else 0))
        self._sent.inc(sum(now.bytes_out.values()) - (sum(before.bytes_out.values()) if before else 0))
        self._corrupt.inc(now.corrupt - (before.corrupt if before else 0))
        self._dropped.inc(sum(now.dropped.values()) - (sum(before.dropped.values()) if before else 0))

        for reason, counter in self._unsealed.items():
            counter.inc(now.dropped.get(reason, 0) - (before.dropped.get(reason, 0) if before else 0))

    def prompt(self, report: PrefillReport) -> None:
        """Where a request's prompt came from."""
        shares = (report.computed_tokens, report.cached_tokens, report.fetched_tokens)
        for source, tokens in zip(SOURCES, shares, strict=True):
            self._sources[source].inc(tokens)
        self._prompt.inc(report.computed_tokens)
        self._queries.inc(sum(shares))
        self._hits.inc(report.cached_tokens)

    def fetched(self, event: FetchEnded, overlapped: int) -> None:
        """`overlapped`: bytes that were here before the first token was."""
        self._transfers[event.outcome if event.outcome in OUTCOMES else "refused"].inc()
        self._transfer_seconds.observe(event.seconds)
        self._overlapped.inc(overlapped)

    def recomputed(self, tokens: int) -> None:
        self._recomputed.inc(tokens)

    def refused(self, code: str) -> None:
        if code in REFUSALS:
            self._refused[code].inc()

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(name, text, tuple(self._labels), registry=self.registry).labels(**self._labels)

    def _counters(self, name: str, text: str, label: str, values: tuple[str, ...]) -> dict[str, Counter]:
        family = Counter(name, text, (*self._labels, label), registry=self.registry)
        return {v: family.labels(**self._labels, **{label: v}) for v in values}

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(name, text, tuple(self._labels), registry=self.registry).labels(**self._labels)

    def _gauges(self, name: str, text: str, label: str, values: tuple[str, ...]) -> dict[str, Gauge]:
        family = Gauge(name, text, (*self._labels, label), registry=self.registry)
        return {v: family.labels(**self._labels, **{label: v}) for v in values}

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(name, text, tuple(self._labels), registry=self.registry, buckets=buckets)
        return family.labels(**self._labels)
