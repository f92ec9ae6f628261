"""Settings of every process: frozen, complete before anything starts, each field one command-line flag.

`metadata["help"]` is the flag's help; the field's type and default are the flag's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


def _flag(help: str, default: Any, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """One prefill, decode or both worker."""

    model: str = _flag("Hugging Face model directory", "", positional=True)
    role: str = _flag("what this worker does", "both", choices=("prefill", "decode", "both"))
    worker_id: str = _flag("name kept over restarts, e.g. prefill-0", "")
    proxy: tuple[str, ...] = _flag("control address of a proxy (repeatable)", ("tcp://127.0.0.1:7400",))
    kv_bind: str = _flag(
        "where other workers fetch KV blocks: ipc://PATH or tcp://HOST:PORT", "tcp://127.0.0.1:0"
    )
    transport: str = _flag("KV transports in order of preference: shm, zmq", "shm,zmq")
    store: str = _flag("where residency lives: memory or redis://HOST:PORT/DB", "memory")
    device: str = _flag("cpu or cuda[:N]", "cpu")
    dtype: str = _flag("auto, float32, bfloat16 or float16", "auto")
    threads: int = _flag("torch threads on CPU (0: chosen)", 0)
    block_tokens: int = _flag("tokens per KV block", 16)
    kv_blocks: int = _flag("KV blocks (0: sized from memory)", 0)
    gpu_memory_utilization: float = _flag("share of the device's (CPU: free) memory to use", 0.9)
    max_model_len: int = _flag("longest prompt + output in tokens (0: the model's)", 0)
    max_num_seqs: int = _flag("requests running at once", 256)
    max_num_batched_tokens: int = _flag("token budget of one step (0: chosen by role and device)", 0)
    engine: str = _flag("model, or sim: no weights, a cost model's time", "model", choices=("model", "sim"))
    served_model_name: str = _flag("name clients use (default: the directory's name)", "")
    metrics_bind: str = _flag("HOST:PORT of /metrics and /health; empty: none", "127.0.0.1:0")
    drain_timeout: float = _flag("seconds to finish running requests on SIGTERM", 30.0)
    log_level: str = _flag("debug, info, warning or error", "info")


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """One proxy."""

    model: str = _flag("model directory (tokenizer and chat template; no weights are read)", "", positional=True)
    host: str = _flag("address to listen on", "127.0.0.1")
    port: int = _flag("HTTP port", 8000)
    control: str = _flag("control address that workers dial: ipc://PATH or tcp://HOST:PORT", "tcp://127.0.0.1:7400")
    store: str = _flag("where residency lives: memory or redis://HOST:PORT/DB", "memory")
    served_model_name: str = _flag("name clients use (default: the directory's name)", "")
    max_body_bytes: int = _flag("largest request body", 10 << 20)
    max_concurrent_requests: int = _flag("requests in flight; more get 503", 2048)
    request_timeout: float = _flag("seconds one request may take", 600.0)
    disaggregate_above: int = _flag(
        "uncached prompt tokens from which a prefill worker computes the prompt (-1: by measured cost)", -1
    )
    log_level: str = _flag("debug, info, warning or error", "info")
