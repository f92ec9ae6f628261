"""Recorders in place of the step loop, the KV endpoint and a proxy link; a clock that stands still until moved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from kvtransfer.endpoint import KvEndpoint
from mesh.layout import KvLayout
from mesh.messages import Decode, KvHolder, Peer, Prefill, WorkerInfo
from mesh.params import SamplingParams
from worker.links import ProxyLink
from worker.metrics import WorkerMetrics
from worker.role import Parts, Replies
from worker.steploop import StepLoop

LAYOUT = KvLayout(layers=1, kv_heads=1, head_dim=4, block_tokens=4, dtype="uint8")
SOURCE = Peer("prefill-0", 7, "ipc:///nowhere", "host", LAYOUT)


@dataclass(slots=True)
class Recorder:
    """Any method call is noted as `(name, positional arguments)`."""

    calls: list[tuple[Any, ...]] = field(default_factory=list)
    layout: KvLayout = LAYOUT

    def __getattr__(self, name: str) -> Callable[..., None]:
        def call(*arguments: Any, **_: Any) -> None:
            self.calls.append((name, *arguments))

        return call

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [call[1:] for call in self.calls if call[0] == name]


@dataclass(slots=True, eq=False)
class Link:
    sent: list[Any] = field(default_factory=list)

    def send(self, message: Any) -> None:
        self.sent.append(message)


@dataclass(slots=True)
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass(slots=True)
class Bench:
    """A role's surroundings."""

    loop: Recorder = field(default_factory=Recorder)
    kv: Recorder = field(default_factory=Recorder)
    clock: Clock = field(default_factory=Clock)
    link: Link = field(default_factory=Link)
    replies: Replies = field(default_factory=Replies)
    metrics: WorkerMetrics = field(default_factory=lambda: WorkerMetrics(info()))

    def counted(self, name: str, **labels: str) -> float | None:
        common = {"model_name": "m", "engine": "w", "role": "decode"}
        return self.metrics.registry.get_sample_value(name, common | labels)

    @property
    def parts(self) -> Parts:
        return Parts(cast(StepLoop, self.loop), cast(KvEndpoint, self.kv), self.replies, self.metrics, 64, self.clock)

    @property
    def proxy(self) -> ProxyLink:
        return cast(ProxyLink, self.link)


def info() -> WorkerInfo:
    return WorkerInfo("w", 1, "decode", "", "host", 0, "m", b"", LAYOUT, 8, 64, 4, 16, 5.0)


def decode_message(
    tokens: int = 10,
    attempt: int = 1,
    *,
    source: Peer | None = SOURCE,
    holders: tuple[KvHolder, ...] = (),
    limit: int = 4,
) -> Decode:
    prompt = tuple(range(tokens))
    params = SamplingParams(max_tokens=8)
    return Decode("r", attempt, prompt, tokens, params, b"root", 60.0, source, holders, limit)


DECODE = Peer("decode-0", 9, "", "host", LAYOUT)
OTHER = Peer("decode-1", 10, "", "host", LAYOUT)


def prefill_message(tokens: int = 10, attempt: int = 1, *, holders: tuple[KvHolder, ...] = ()) -> Prefill:
    params = SamplingParams(max_tokens=8)
    return Prefill("r", attempt, tuple(range(tokens)), tokens, params, b"root", 60.0, holders)
