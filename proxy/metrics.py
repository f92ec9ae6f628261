"""What the proxy measures of requests: the user-facing families, under the names that vLLM gave them.

Nothing is observed while tokens flow: a request collects its own times and hands them over when it ends.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client import generate_latest as classic_text
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS_TYPE
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_text
from prometheus_client.registry import Collector

from mesh.messages import PrefillReport

CLASSIC_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# fmt: off
TTFT_S = (
    .001, .005, .01, .02, .04, .06, .08, .1, .15, .2, .25, .3, .4, .5, .75, 1, 1.5, 2, 2.5, 5, 7.5, 10, 20, 40, 80,
    160, 640, 2560,
)
ITL_S = (
    .001, .002, .004, .006, .008, .01, .015, .02, .025, .03, .04, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5, 5,
    7.5, 10, 20, 40, 80,
)
PHASE_S = (
    .001, .005, .01, .025, .05, .1, .2, .3, .5, .8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960,
    1920, 7680,
)
# fmt: on
TOKENS = tuple(m * 10**e for e in range(6) for m in (1, 2, 5))
CHOICES = (1, 2, 5, 10, 20)
OUTCOMES = ("stop", "length", "abort", "error")
REJECTIONS = ("max_num_queued_reqs", "no_capacity", "draining", "quota")
METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH"})


@dataclass(slots=True, eq=False)
class RequestRecord:
    """Times and counts of one HTTP request that generates; seconds of one monotonic clock."""

    arrived: float
    n: int = 1
    max_tokens: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    first_token: float | None = None
    last_token: float | None = None
    gaps: list[float] = field(default_factory=list)
    """Between tokens that were sent one after the other, per choice."""
    outcomes: list[str] = field(default_factory=list)
    """One of `OUTCOMES` per choice."""
    reports: Sequence[PrefillReport] = ()


class GapHistogram(Collector):
    """The one family that gets a value per token: the library's histogram would take longer than sending it."""

    def __init__(self, model_name: str) -> None:
        self._model = model_name
        self._counts = [0] * (len(ITL_S) + 1)
        self._sum = 0.0

    def observe(self, gaps: Sequence[float]) -> None:
        counts = self._counts
        for gap in gaps:
            counts[bisect_left(ITL_S, gap)] += 1
        self._sum += sum(gaps)

    def collect(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            "vllm:inter_token_latency_seconds", "Between a choice's tokens.", labels=("model_name",)
        )
        bounds = [*map(str, map(float, ITL_S)), "+Inf"]
        family.add_metric([self._model], list(zip(bounds, accumulate(self._counts), strict=True)), self._sum)
        yield family


class ProxyMetrics:
    """All families of the proxy's API; every label value is known from the start, so absent means zero."""

    def __init__(self, model_name: str, registry: CollectorRegistry | None = None) -> None:
        self.registry = registry or CollectorRegistry()
        """Other parts of the proxy register here; one scrape shows all."""
        self._model = model_name
        self._ttft = self._histogram("time_to_first_token_seconds", "From request to first token.", TTFT_S)
        self._itl = GapHistogram(model_name)
        self.registry.register(self._itl)
        self._tpot = self._histogram(
            "request_time_per_output_token_seconds", "Mean time per token after the first.", ITL_S
        )
        self._e2e = self._histogram("e2e_request_latency_seconds", "From request to last token.", PHASE_S)
        self._queue = self._histogram("request_queue_time_seconds", "Waiting at workers.", PHASE_S)
        self._prefill = self._histogram("request_prefill_time_seconds", "Computing the prompt.", PHASE_S)
        self._decode = self._histogram("request_decode_time_seconds", "First to last token.", PHASE_S)
        self._prompt = self._histogram("request_prompt_tokens", "Prompt tokens of a request.", TOKENS)
        self._output = self._histogram("request_generation_tokens", "Tokens generated for a request.", TOKENS)
        self._max = self._histogram("request_params_max_tokens", "max_tokens of a request.", TOKENS)
        self._n = self._histogram("request_params_n", "Choices of a request.", CHOICES)
        self._success = Counter(
            "vllm:request_success_total",
            "Choices by the way they ended.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._rejections = Counter(
            "vllm:admission_rejections_total",
            "Requests refused before any work.",
            ("model_name", "reason"),
            registry=self.registry,
        )
        self._tenant_tokens = Counter(
            "kvmesh:tenant_tokens_total",
            "Tokens of a tenant's prompts and answers.",
            ("model_name", "tenant", "kind"),
            registry=self.registry,
        )
        for outcome in OUTCOMES:
            self._success.labels(model_name, outcome)
        for reason in REJECTIONS:
            self._rejections.labels(model_name, reason)
        http = ("handler", "method", "status")
        self._http = Counter("http_requests_total", "HTTP requests by route.", http, registry=self.registry)
        self._http_duration = Histogram(
            "http_request_duration_seconds",
            "Until the last byte of the answer.",
            ("handler", "method"),
            buckets=PHASE_S,
            registry=self.registry,
        )

    def observe(self, record: RequestRecord, tenant: str) -> None:
        """A request that reached the dispatcher has ended, in whatever way. `tenant`: a name that the operator gave,
        empty where there are none."""
        if tenant:
            self._tenant_tokens.labels(self._model, tenant, "prompt").inc(record.prompt_tokens)
            self._tenant_tokens.labels(self._model, tenant, "completion").inc(record.completion_tokens)
        for outcome in record.outcomes:
            self._success.labels(self._model, outcome).inc()
        self._n.observe(record.n)
        self._max.observe(record.max_tokens)
        self._prompt.observe(record.prompt_tokens)
        self._output.observe(record.completion_tokens)
        if record.reports:
            self._queue.observe(sum(r.queue_s for r in record.reports))
            self._prefill.observe(sum(r.compute_s for r in record.reports))
        if record.first_token is None or record.last_token is None:
            return
        self._ttft.observe(record.first_token - record.arrived)
        self._e2e.observe(record.last_token - record.arrived)
        decode_s = record.last_token - record.first_token
        self._decode.observe(decode_s)
        if record.gaps:
            self._tpot.observe(sum(record.gaps) / len(record.gaps))
        self._itl.observe(record.gaps)

    def observe_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """`status` 499: the client left before the answer was complete."""
        method = method if method in METHODS else "OTHER"
        family = "499" if status == 499 else f"{status // 100}xx"
        self._http.labels(handler, method, family).inc()
        self._http_duration.labels(handler, method).observe(seconds)

    def count_rejection(self, reason: str) -> None:
        """`reason`: one of `REJECTIONS`."""
        self._rejections.labels(self._model, reason).inc()

    def render(self, accept: str) -> tuple[bytes, str]:
        """The exposition and its content type, in the format that the `Accept` header asks for."""
        if "application/openmetrics-text" in accept:
            # Without this escaping the library turns `vllm:` into `vllm_` for every Prometheus 2.x.
            text: bytes = openmetrics_text(self.registry, escaping="allow-utf-8")  # type: ignore[no-untyped-call]
            return text, OPENMETRICS_TYPE
        return classic_text(self.registry), CLASSIC_TYPE

    def _histogram(self, name: str, help: str, buckets: Sequence[float]) -> Histogram:
        family = Histogram(f"vllm:{name}", help, ("model_name",), buckets=tuple(buckets), registry=self.registry)
        child: Histogram = family.labels(self._model)
        return child
