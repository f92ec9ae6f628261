"""Settings of every process and command: frozen, complete before anything starts; each field is one flag.

`metadata` holds the flag's help and limits, which `mesh/options.py` reads; type and default are the field's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

LOG_LEVELS = ("debug", "info", "warning", "error")
MAX_PORT = 65535


def _flag(help: str, default: Any, **more: Any) -> Any:
    return field(default=default, metadata={"help": help, **more})


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """One prefill, decode or both worker."""

    model: str = _flag("Hugging Face model directory", "", positional=True)
    role: str = _flag("what this worker does", "both", choices=("prefill", "decode", "both"))
    worker_id: str = _flag("name kept over restarts, e.g. prefill-0", "")
    proxy: tuple[str, ...] = _flag("control address of a proxy (repeatable)", ("tcp://127.0.0.1:7400",))
    kv_bind: str = _flag("where other workers fetch KV blocks: ipc://PATH or tcp://HOST:PORT", "tcp://127.0.0.1:0")
    keys: str = _flag(
        "directory of the fleet's keys (`kvmesh keys DIR`): every tcp socket between processes is encrypted", ""
    )
    transport: str = _flag(
        "KV transports in order of preference, of cuda (device memory, CUDA workers of one host), shm, nccl (CUDA "
        "workers, not encrypted), gloo (as nccl, on CPU: for tests), zmq (always there)",
        "shm,zmq",
    )
    store: str = _flag("where residency lives: memory or redis://HOST:PORT/DB", "memory")
    device: str = _flag("cpu or cuda[:N]", "cpu")
    dtype: str = _flag("number format", "auto", choices=("auto", "float32", "bfloat16", "float16"))
    threads: int = _flag("torch threads on CPU (0: chosen)", 0, minimum=0)
    block_tokens: int = _flag("tokens per KV block", 16, minimum=1)
    kv_blocks: int = _flag("KV blocks (0: sized from memory)", 0, minimum=0)
    gpu_memory_utilization: float = _flag(
        "share of the device's (CPU: free) memory to use", 0.9, above=0.0, maximum=1.0
    )
    max_model_len: int = _flag("longest prompt + output in tokens (0: the model's)", 0, minimum=0)
    max_num_seqs: int = _flag("requests running at once", 256, minimum=1)
    max_num_batched_tokens: int = _flag("token budget of one step (0: chosen by role and device)", 0, minimum=0)
    engine: str = _flag("model, or sim: no weights, a cost model's time", "model", choices=("model", "sim"))
    sim_step_s: float = _flag("--engine sim: seconds of one step", 0.001, minimum=0.0)
    sim_prefill_token_s: float = _flag("--engine sim: seconds per prompt token", 0.00002, minimum=0.0)
    served_model_name: tuple[str, ...] = _flag(
        "name clients use; repeatable: the first is the model's, the others its aliases "
        "(default: the directory's name)",
        (),
    )
    metrics_bind: str = _flag("HOST:PORT of /metrics and /health; empty: none", "127.0.0.1:0")
    drain_timeout: float = _flag("seconds to finish running requests on SIGTERM", 30.0, minimum=0.0)
    log_level: str = _flag("least severe lines to print", "info", choices=LOG_LEVELS)


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """One proxy."""

    model: str = _flag("model directory (tokenizer and chat template; no weights are read)", "", positional=True)
    host: str = _flag("address to listen on", "127.0.0.1")
    port: int = _flag("HTTP port", 8000, minimum=0, maximum=MAX_PORT)
    control: str = _flag("control address that workers dial: ipc://PATH or tcp://HOST:PORT", "tcp://127.0.0.1:7400")
    keys: str = _flag(
        "directory of the fleet's keys (`kvmesh keys DIR`): every tcp socket between processes is encrypted", ""
    )
    store: str = _flag("where residency and stored responses live: memory or redis://HOST:PORT/DB", "memory")
    served_model_name: tuple[str, ...] = _flag(
        "name clients use; repeatable: the first is the model's, the others its aliases "
        "(default: the directory's name)",
        (),
    )
    scheduling_policy: str = _flag(
        "fcfs: in order of arrival; priority: a request's `priority` first", "fcfs", choices=("fcfs", "priority")
    )
    reasoning_parser: str = _flag(
        "how the model writes what it thinks before it answers: auto (by its chat template), none, or a name such as "
        "think, qwen3, deepseek_r1, mistral",
        "auto",
    )
    tool_call_parser: str = _flag(
        "how the model writes tool calls: auto (by its chat template) or a name such as hermes, "
        "llama3_json, qwen3_coder",
        "auto",
    )
    api_key_file: str = _flag("file with an API key per line, of which clients must send one (default: none)", "")
    tenants: str = _flag("TOML file of tenants: their keys, models and limits (default: none)", "")
    max_body_bytes: int = _flag("largest request body", 10 << 20, minimum=1)
    max_concurrent_requests: int = _flag("requests in flight; more get 503", 2048, minimum=1)
    request_timeout: float = _flag("seconds one request may take", 600.0, above=0.0)
    response_ttl: int = _flag("seconds that /v1/responses keeps a response", 3600, minimum=1)
    disaggregate_above: int = _flag(
        "uncached prompt tokens from which a prefill worker computes the prompt (-1: by measured cost)",
        -1,
        minimum=-1,
    )
    log_level: str = _flag("least severe lines to print", "info", choices=LOG_LEVELS)


@dataclass(frozen=True, slots=True)
class UpSettings:
    """`kvmesh up`: how many of what; everything else is the proxy's and the workers' own settings."""

    model: str = _flag("Hugging Face model directory (default: the bundled demo model)", "", positional=True)
    prefill: int = _flag("prefill workers (default: 1, or 0 with --both)", -1, minimum=-1, maximum=256)
    decode: int = _flag("decode workers (default: 1, or 0 with --both)", -1, minimum=-1, maximum=256)
    both: int = _flag("workers that prefill and decode", 0, minimum=0, maximum=256)
    store: str = _flag(
        "auto (KVMESH_STORE, else an embedded server if installed, else memory), memory or redis://HOST:PORT/DB",
        "auto",
    )


@dataclass(frozen=True, slots=True)
class ChatSettings:
    """`kvmesh chat`."""

    message: tuple[str, ...] = _flag("one message; none: a conversation", (), positional=True)
    url: str = _flag("the server", "http://127.0.0.1:8000")
    model: str = _flag("model name (default: the first that the server lists)", "")
    api_key_file: str = _flag("file whose first line is the API key to send", "")
    system: str = _flag("system message", "")
    max_tokens: int = _flag("longest answer in tokens", 512, minimum=1)
    temperature: float = _flag("0 is greedy, -1 what the model's generation_config.json says", -1.0, minimum=-1.0)
    quiet: bool = _flag("print the answer alone", False)


@dataclass(frozen=True, slots=True)
class CompleteSettings:
    """`kvmesh complete`."""

    prompt: tuple[str, ...] = _flag("text to continue; none: standard input", (), positional=True)
    url: str = _flag("the server", "http://127.0.0.1:8000")
    model: str = _flag("model name (default: the first that the server lists)", "")
    api_key_file: str = _flag("file whose first line is the API key to send", "")
    max_tokens: int = _flag("longest continuation in tokens", 64, minimum=1)
    temperature: float = _flag("0 is greedy", 0.0, minimum=0.0)
    quiet: bool = _flag("print the continuation alone", False)


@dataclass(frozen=True, slots=True)
class DoctorSettings:
    """`kvmesh doctor`."""

    store: str = _flag("a store to ask: redis://HOST:PORT/DB", "")
    keys: str = _flag("directory of the fleet's keys, to look at them too", "")
    transport: str = _flag("the workers' --transport: which of the links they would use", "shm,zmq")
    device: str = _flag("the workers' --device", "cpu")
    url: str = _flag("a proxy, to say what its workers convert as they exchange KV blocks: http://HOST:PORT", "")
    mib: int = _flag("how much each link moves per round", 64, minimum=1, maximum=4096)
    json: bool = _flag("print one JSON object", False)
