"""`kvmesh up`: one proxy, its workers and its store as processes of this host.

Everything that can be checked without loading anything is checked first: flags, model directory, port, store. Then
all processes start at once, in a private directory (mode 0700) that holds their sockets.
"""

from __future__ import annotations

import errno
import http.client
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mesh import environment, options
from mesh.console import Console
from mesh.errors import EXIT_PORT, EXIT_USAGE, StartupError
from mesh.lifecycle import Kind, Lifecycle
from mesh.modeldir import DEMO_MODEL, check_model_dir, model_names
from mesh.screen import MeshFacts, WorkerRow, start_screen
from mesh.settings import ProxySettings, UpSettings, WorkerSettings
from mesh.store import Store, choose_store
from mesh.supervisor import Program, Supervisor

ROOT = Path(__file__).resolve().parents[1]
DOOR_SECONDS = 1.0
"""A proxy on this host that answers later than that is asked again."""
MAX_SOCKET_PATH = 100
"""Of 107 bytes that the kernel allows, less what ZeroMQ may add."""
LONGEST_SOCKET_NAME = len("/kvmesh-12345678/prefill-255.kv")
NVIDIA_DEVICES = Path("/proc/driver/nvidia/gpus")
MODULES = {"prefill": "prefill", "decode": "decode", "both": "decode"}
"""Which program plays a role."""
LOAD_TIME_DEFAULTS = {"TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
WORKER_LOAD_TIME_DEFAULTS = {
    "OMP_WAIT_POLICY": "PASSIVE",  # idle OpenMP threads sleep instead of taking a neighbour's core
    # Huge pages for torch's tensors, and for what FBGEMM and oneDNN keep: weights are read up to a fifth faster.
    "THP_MEM_ALLOC_ENABLE": "1",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}


@dataclass(frozen=True, slots=True)
class Launch:
    """Complete settings of one mesh."""

    proxy: ProxySettings
    workers: tuple[WorkerSettings, ...]
    store: Store


def main(argv: Sequence[str], commands: Mapping[str, Sequence[str]] | None = None) -> int:
    """Runs until the mesh is stopped; returns its exit code. Raises `StartupError`.

    `commands` are the programs in place of our modules `proxy`, `prefill` and `decode`.
    """
    up, proxy, worker = parse(argv)
    environment.check()
    model = Path(up.model) if up.model else DEMO_MODEL
    check_model_dir(model)
    port = free_port(proxy.host, proxy.port)
    with runtime_dir() as runtime:
        store = choose_store(up.store, os.environ, runtime)
        proxy = replace(proxy, model=str(model), port=port, store=store.url, control=f"ipc://{runtime}/control")
        workers = plan_workers(up, replace(worker, model=str(model), store=store.url), proxy.control, runtime)
        return supervise(Launch(proxy, workers, store), commands or modules("proxy", *MODULES.values()))


def parse(
    argv: Sequence[str], environ: Mapping[str, str] | None = None
) -> tuple[UpSettings, ProxySettings, WorkerSettings]:
    """The command line: how many, and the settings that all workers or the proxy share."""
    groups = (
        options.Group(UpSettings, "what to start"),
        options.Group(ProxySettings, "proxy", hidden=("model", "control", "keys", "store")),
        options.Group(
            WorkerSettings,
            "every worker",
            hidden=("model", "role", "worker_id", "proxy", "kv_bind", "keys", "store", "metrics_bind"),
        ),
    )
    up, proxy, worker = options.parse_groups(
        groups,
        argv,
        prog="kvmesh up",
        description="Serve a model through a prefill pool and a decode pool on this host.",
        environ=environ,
    )
    return _counted(UpSettings(**up)), ProxySettings(**proxy), WorkerSettings(**worker)


def _counted(up: UpSettings) -> UpSettings:
    """With the numbers of workers that -1 stands for."""
    usual = 0 if up.both else 1
    up = replace(
        up,
        prefill=usual if up.prefill < 0 else up.prefill,
        decode=usual if up.decode < 0 else up.decode,
    )
    if up.decode + up.both == 0:
        raise StartupError("nobody would decode: give --decode or --both at least 1", EXIT_USAGE)
    return up


def plan_workers(up: UpSettings, shared: WorkerSettings, control: str, runtime: Path) -> tuple[WorkerSettings, ...]:
    """One settings per worker: its name, sockets, device, threads and share of the memory."""
    roles = ["prefill"] * up.prefill + ["decode"] * up.decode + ["both"] * up.both
    numbers = [roles[:i].count(role) for i, role in enumerate(roles)]
    devices = [_device(shared.device, i) for i in range(len(roles))]
    threads = shared.threads or max(1, len(os.sched_getaffinity(0)) // len(roles))
    return tuple(
        replace(
            shared,
            role=role,
            worker_id=f"{role}-{number}",
            proxy=(control,),
            kv_bind=f"ipc://{runtime}/{role}-{number}.kv",
            device=device,
            threads=threads,
            # Workers that share a device share its memory: each measures what is free before the others take theirs.
            gpu_memory_utilization=shared.gpu_memory_utilization / devices.count(device),
        )
        for role, number, device in zip(roles, numbers, devices, strict=True)
    )


def _device(device: str, worker: int) -> str:
    """`cuda` means all GPUs in turn."""
    if device != "cuda":
        return device
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        count = len([d for d in visible.split(",") if d])
    else:
        count = len(list(NVIDIA_DEVICES.iterdir())) if NVIDIA_DEVICES.is_dir() else 1
    return f"cuda:{worker % max(1, count)}"


def modules(*names: str) -> dict[str, tuple[str, ...]]:
    """How to start each module; `-P` keeps a folder of the same name in the user's directory out of it."""
    return {name: (sys.executable, "-P", "-m", name) for name in names}


def supervise(launch: Launch, commands: Mapping[str, Sequence[str]]) -> int:
    """Starts `commands[module]` with each member's flags and stays until the mesh ends; returns the exit code."""
    members = [*([("store", Kind.STORE)] if launch.store.command else []), ("proxy", Kind.PROXY)]
    members += [(w.worker_id, Kind.WORKER) for w in launch.workers]
    supervisor = Supervisor(
        {program.name: program for program in programs(launch, commands)},
        Lifecycle(members, drain_timeout=max(w.drain_timeout for w in launch.workers)),
        Console(sys.stdout, sys.stderr),
        door_open=lambda: door_open(launch.proxy),
        screen=lambda running: start_screen(mesh_facts(launch, running)),
    )
    return supervisor.run()


def programs(launch: Launch, commands: Mapping[str, Sequence[str]]) -> list[Program]:
    """The members of the mesh as command lines and environments."""
    environ = child_environment(os.environ)
    proxy = (*commands["proxy"], *options.to_argv(launch.proxy))
    found = [Program("store", launch.store.command, environ)] if launch.store.command else []
    found.append(Program("proxy", proxy, environ))
    for worker in launch.workers:
        argv = (*commands[MODULES[worker.role]], *options.to_argv(worker, always=("role",)))
        numeric = {**WORKER_LOAD_TIME_DEFAULTS, **environ, "OMP_NUM_THREADS": str(worker.threads)}
        found.append(Program(worker.worker_id, argv, numeric))
    return found


def child_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Ours, less the flags that became arguments, plus what numeric libraries read when they are loaded."""
    own = options.environment_without_flags(environ, (UpSettings, ProxySettings, WorkerSettings))
    path = os.pathsep.join([str(ROOT), *filter(None, [environ.get("PYTHONPATH")])])
    return {**LOAD_TIME_DEFAULTS, **own, "PYTHONPATH": path}


def mesh_facts(launch: Launch, supervisor: Supervisor) -> MeshFacts:
    pids = supervisor.pids
    workers = [
        WorkerRow(w.worker_id, w.role, pids[w.worker_id], w.device, supervisor.facts(w.worker_id))
        for w in launch.workers
    ]
    model = Path(launch.proxy.model)
    return MeshFacts(
        url=base_url(launch.proxy),
        model=model_names(model, launch.proxy.served_model_name)[0],
        model_path=str(model),
        store=launch.store.description,
        proxy_pid=pids["proxy"],
        seconds=time.monotonic() - supervisor.started,
        workers=workers,
        keyed=bool(launch.proxy.api_key_file or launch.proxy.tenants),
    )


def base_url(proxy: ProxySettings) -> str:
    """Where a client on this host reaches the proxy."""
    host = _local(proxy.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{proxy.port}"


def _local(host: str) -> str:
    return {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def door_open(proxy: ProxySettings) -> bool:
    """The proxy says that a request would find its workers."""
    connection = http.client.HTTPConnection(_local(proxy.host), proxy.port, timeout=DOOR_SECONDS)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Raises `StartupError` when the proxy could not listen there."""
    try:
        family, kind, protocol, _, address = _addresses(host, port)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            chosen: int = probe.getsockname()[1]
            return chosen
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            message = f"port {port} of {host} is in use; stop what listens there, or give another --port"
        else:
            message = f"cannot listen on {host}:{port}: {error.strerror or error}"
        raise StartupError(message, EXIT_PORT) from None


def _addresses(host: str, port: int) -> list[Any]:
    return socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)


@contextmanager
def runtime_dir() -> Iterator[Path]:
    """A directory that only this user can enter, removed at the end; short enough for socket paths."""
    place = tempfile.gettempdir()
    if len(place) + LONGEST_SOCKET_NAME > MAX_SOCKET_PATH:
        place = "/tmp"
    path = tempfile.mkdtemp(prefix="kvmesh-", dir=place)
    try:
        yield Path(path)
    finally:
        shutil.rmtree(path, ignore_errors=True)
