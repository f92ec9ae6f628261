"""From settings to a running worker process: load the model, measure it, open the sockets, run the role."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import zmq

from engine.engine import Engine, EngineConfig
from engine.request import EngineRequest
from engine.runner import ModelRunner
from engine.sim_engine import SimRunner
from kvtransfer.endpoint import KvEndpoint
from mesh import environment, host, logs, options, startup
from mesh.curve import check_address
from mesh.errors import EXIT_WORKER, StartupError
from mesh.keys import WORKER
from mesh.keys import load as load_keys
from mesh.messages import BlockEvents, WorkerInfo
from mesh.metrics import MetricsServer
from mesh.modeldir import model_names
from mesh.params import SamplingParams
from mesh.progress import report
from mesh.residency import open_publisher
from mesh.settings import WorkerSettings
from mesh.tokenizer import Tokenizer
from worker.grammars import Grammars
from worker.metrics import WorkerMetrics
from worker.process import Station, WorkerProcess
from worker.role import Parts, Role

log = logging.getLogger(__name__)

CPU_STEP_TOKENS = 512
"""A CPU computes so many prompt tokens of a small model in about a third of a second: the longest a decoding
neighbour should wait when one process serves both."""
CUDA_STEP_TOKENS = 8192
WARM_UP_TOKENS = 256
WARM_UP_DECODED = 3
"""TorchScript watches the first step and optimises in the second, which together take a second on a slow core."""
MIN_STEP_BOUND_S = 5.0
"""A step that is merely slow (a page fault storm, a noisy neighbour) must not count as hung."""
STEP_BOUND_FACTOR = 20
STACK_BYTES = 8 << 20
"""Of every thread. Grammars are compiled by recursion; the proxy lets those through that need a quarter of this."""
SWITCH_INTERVAL_S = 0.0002
"""The I/O thread gives the interpreter lock up at every socket call and must get it back from the step loop's thread;
with Python's default of 5 ms, a turn of twenty calls could take a tenth of a second."""


def run(role: str, make_role: Callable[[Parts], Role]) -> None:
    """The `main` of every worker module; ends the process."""
    code = startup.run(f"kvmesh serve {role}", lambda: serve(read_settings(role), make_role))
    logging.shutdown()
    sys.stdout.flush()
    os._exit(code)  # torch's and zmq's exit handlers can wait on threads that have nothing left to say


def read_settings(role: str) -> WorkerSettings:
    """The command line; the module decides the role, except that a decode worker may be `both`."""
    settings = options.parse(WorkerSettings, sys.argv[1:], prog=f"python -m {role}")
    if role == "prefill" or settings.role != "both":
        settings = replace(settings, role=role)
    if not settings.worker_id:
        settings = replace(settings, worker_id=f"{settings.role}-{os.getpid()}")
    logs.setup(settings.log_level, settings.worker_id)
    environment.check()
    return settings


def serve(settings: WorkerSettings, make_role: Callable[[Parts], Role]) -> int:
    """Runs one worker until it is drained; returns its exit code. Raises `StartupError`."""
    began = time.monotonic()
    keys = load_keys(settings.keys, WORKER)
    for address in settings.proxy:
        check_address("--proxy", address, keys)
    check_address("--kv-bind", settings.kv_bind, keys)
    set_threads(settings.threads)
    threading.stack_size(STACK_BYTES)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    grammars = Grammars(lambda: Tokenizer.load(settings.model))
    runner = load_runner(settings)
    budget = settings.max_num_batched_tokens or (CPU_STEP_TOKENS if settings.device == "cpu" else CUDA_STEP_TOKENS)
    engine = Engine(runner, EngineConfig(settings.max_num_seqs, budget, runner.max_model_len))
    max_model_len = engine.capacity_tokens
    report("warm-up")
    step_bound = warm_up(engine, budget)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    incarnation = time.time_ns()
    kv = KvEndpoint(
        context=context,
        bind=settings.kv_bind,
        worker_id=settings.worker_id,
        incarnation=incarnation,
        host=host.identity(),
        layout=runner.layout,
        transports=tuple(t.strip() for t in settings.transport.split(",") if t.strip()),
        clock=time.monotonic,
        keys=keys,
        device=settings.device,
    )
    info = WorkerInfo(
        worker_id=settings.worker_id,
        incarnation=incarnation,
        role=settings.role,
        kv_address=kv.address,
        host=host.identity(),
        pid=os.getpid(),
        model=model_names(Path(settings.model), settings.served_model_name)[0],
        model_digest=runner.digest,
        layout=runner.layout,
        total_blocks=runner.num_blocks,
        max_model_len=max_model_len,
        max_num_seqs=settings.max_num_seqs,
        max_num_batched_tokens=budget,
        step_bound_s=step_bound,
    )
    metrics = WorkerMetrics(info)
    server = MetricsServer(settings.metrics_bind)
    processes: list[WorkerProcess] = []

    def publish_directly(events: BlockEvents) -> None:
        for process in processes:
            process.publish(events)

    publisher = open_publisher(settings.store, info, publish_directly)
    process = WorkerProcess(
        Station(info, engine, kv, publisher, metrics, grammars, settings.proxy, settings.drain_timeout, keys),
        context,
        make_role,
    )
    processes.append(process)
    server.start(metrics.registry, process.health)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: process.drain())
    report(
        "ready",
        1.0,
        device=settings.device,
        dtype=runner.layout.dtype,
        blocks=runner.num_blocks,
        block_tokens=runner.layout.block_tokens,
        max_model_len=max_model_len,
        metrics=server.address,
    )
    log.info(
        "%s ready in %.1f s: %d blocks of %d tokens, %d-token steps",
        settings.worker_id,
        time.monotonic() - began,
        runner.num_blocks,
        runner.layout.block_tokens,
        budget,
    )
    code = process.run()
    server.close()
    return code


def load_runner(settings: WorkerSettings) -> ModelRunner | SimRunner:
    if settings.engine == "sim":
        return SimRunner.from_settings(settings)
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise StartupError("--device cuda: this machine has no usable CUDA device", EXIT_WORKER)
    return ModelRunner.load(
        Path(settings.model),
        device=settings.device,
        dtype=settings.dtype,
        block_tokens=settings.block_tokens,
        num_blocks=settings.kv_blocks,
        memory_utilization=settings.gpu_memory_utilization,
        max_model_len=settings.max_model_len,
        max_num_batched_tokens=settings.max_num_batched_tokens or CPU_STEP_TOKENS,
        max_num_seqs=settings.max_num_seqs,
        progress=report,
    )


def set_threads(threads: int) -> None:
    """One torch thread where cores are few: two spinning threads on a busy core are slower than one."""
    cores = os.cpu_count() or 1
    torch.set_num_threads(threads or max(1, cores // 2))


def warm_up(engine: Engine, budget: int) -> float:
    """Computes some tokens and one prompt, so that the first client pays for no lazy set-up; returns a step's bound."""
    _compute(engine, 1, WARM_UP_DECODED)
    tokens = min(WARM_UP_TOKENS, budget, engine.capacity_tokens - 1)
    began = time.monotonic()
    _compute(engine, max(1, tokens), 1)
    per_token = (time.monotonic() - began) / max(1, tokens)
    return max(MIN_STEP_BOUND_S, STEP_BOUND_FACTOR * per_token * budget)


def _compute(engine: Engine, num_tokens: int, new: int) -> None:
    params = SamplingParams(max_tokens=min(new, engine.capacity_tokens - num_tokens), temperature=0.0)
    engine.add(EngineRequest("warm-up", [1] * num_tokens, num_tokens, params, secrets.token_bytes(16)))
    while engine.has_work:
        engine.step()
