"""`kvmesh doctor`: whether this host is fit for kvmesh, how fast its links are, and which one a pair of workers uses.

Every link is tried with real blocks between two processes, digests checked, beside a memory copy of the same bytes.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from kvtransfer.doctor_fleet import Finding, exchanges
from kvtransfer.linktest import Pages, copy_once, link_times
from kvtransfer.pairing import NO_KEYS, Pair, pairs
from kvtransfer.transports import inline
from kvtransfer.transports.choice import GLOO, unfit
from kvtransfer.transports.shm import SHM_DIR
from mesh import environment, options
from mesh.errors import EXIT_ENVIRONMENT, StartupError
from mesh.keys import WORKER, load
from mesh.logs import redact
from mesh.settings import DoctorSettings
from mesh.store import check_store

BLOCK_KIB = 192
"""A block of 16 tokens of a small model; larger ones are faster."""
ROUNDS = 3
WANTED_SHM = 256 << 20
"""A worker takes 64 MiB or a fourth of what is free, whichever is less."""
WANTED_FILES = 4096
WHAT = {
    "cuda": "CUDA device memory",
    "shm": "shared memory",
    "zmq-ipc": "ZeroMQ over a Unix socket",
    "zmq-tcp": "ZeroMQ over tcp",
    "zmq-aes": "ZeroMQ over tcp, sealed (--keys)",
    "gloo": "gloo over loopback",
}
NAMES = {
    "cuda": "CUDA device memory (cuda)",
    "shm": "shared memory (shm)",
    "nccl": "NCCL (nccl)",
    "zmq": "ZeroMQ (zmq)",
}


@dataclass(frozen=True, slots=True)
class Link:
    """One way between two processes of this host."""

    route: str
    gb_per_s: float
    """0: it does not work."""
    of_copy: float
    """As a share of what one memory copy of the same bytes does."""
    failure: str = ""


def main(argv: Sequence[str]) -> int:
    """Raises `StartupError` for flags that are wrong; 8 when something that kvmesh needs is missing."""
    settings = options.parse(
        DoctorSettings, argv, prog="kvmesh doctor", description="Looks at this host and measures its links."
    )
    findings = [finding for look in _looks(settings) for finding in look()]
    say = _silently if settings.json else partial(print, flush=True)
    say(f"this host\n{_lines(findings)}\n")
    say(f"links between two processes of this host, {settings.mib} MiB in blocks of {BLOCK_KIB} KiB")
    links = []
    for link in measure(settings.mib, routes(settings)):
        say(f"  {_line(link)}")
        links.append(link)
    used = which(links, settings)
    say(f"\nwhat two workers use\n{_lines(used)}")
    fleet = exchanges(settings.url) if settings.url else []
    if fleet:
        say(f"\nwhat the workers of {redact(settings.url)} convert\n{_lines(fleet)}")
    if settings.json:
        parts: dict[str, Sequence[Finding | Link]] = {"host": findings, "links": links, "pairs": used, "fleet": fleet}
        print(json.dumps({name: [asdict(part) for part in found] for name, found in parts.items()}, indent=2))
    broken = any(f.state == "fail" for f in (*findings, *used, *fleet))
    return EXIT_ENVIRONMENT if broken else 0


def routes(settings: DoctorSettings) -> list[str]:
    """The links to try; `gloo`, which nobody needs, if it is named."""
    fit = [route for route in WHAT if not unfit(route, settings.device)]
    return [route for route in fit if route != GLOO or GLOO in settings.transport.split(",")]


def measure(mib: int, tried: Sequence[str]) -> Iterator[Link]:
    """The copy first, then every link; best of a few rounds."""
    pages: Pages = np.zeros((max(1, (mib << 10) // BLOCK_KIB), BLOCK_KIB << 10), dtype=np.uint8)
    source = np.ones_like(pages)
    size = pages.nbytes / 1e9
    copy = size / min(copy_once(source, pages) for _ in range(ROUNDS))
    yield Link("copy", copy, 1.0)
    for route in tried:
        try:
            speed = size / min(took.seconds for took in link_times(route, pages, ROUNDS))
        except (OSError, RuntimeError, StartupError) as error:
            yield Link(route, 0.0, 0.0, str(error))
        else:
            yield Link(route, speed, speed / copy)


def which(links: Sequence[Link], settings: DoctorSettings) -> list[Finding]:
    """The transport of a pair of workers, by where they are, and why no better one."""
    failures = {link.route: link.failure for link in links}
    order = [name.strip() for name in settings.transport.split(",")]
    found = pairs(failures, order=order, device=settings.device, sealed=bool(settings.keys))
    return [Finding(_state(pair, failures, settings), pair.text(NAMES)) for pair in found]


def _state(pair: Pair, failures: Mapping[str, str], settings: DoctorSettings) -> str:
    if not pair.used:
        return "note" if pair.instead_of[inline.NAME] == NO_KEYS else "fail"
    return "note" if any(failures.get(better) == why != "" for better, why in pair.instead_of.items()) else "ok"


def _looks(settings: DoctorSettings) -> list[Callable[[], Iterator[Finding]]]:
    looks = [_python, _compute, _memory, _shm, _files]
    if settings.store:
        looks.append(partial(_store, settings.store))
    if settings.keys:
        looks.append(partial(_keys, settings.keys))
    return looks


def _python() -> Iterator[Finding]:
    yield Finding("ok", f"Python {platform.python_version()}, torch {version('torch')}, pyzmq {version('pyzmq')}")
    try:
        environment.check()
    except StartupError as error:
        yield Finding("fail", str(error))


def _compute() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    if not torch.cuda.is_available():
        yield Finding("note", f"no CUDA device: workers compute on {cores} CPU cores")
        return
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        yield Finding("ok", f"cuda:{i} {properties.name}, {properties.total_memory / 2**30:.0f} GiB")


def _memory() -> Iterator[Finding]:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    total, free = (int(fields[name].split()[0]) / 2**20 for name in ("MemTotal", "MemAvailable"))
    yield Finding("ok", f"{free:.1f} of {total:.1f} GiB of memory are free")


def _shm() -> Iterator[Finding]:
    try:
        free = shutil.disk_usage(SHM_DIR).free
    except OSError as error:
        yield Finding("note", f"{SHM_DIR}: {error.strerror}; blocks go by ZeroMQ, which is slower")
        return
    text = f"{free / 2**20:.0f} MiB are free in {SHM_DIR}"
    if free < WANTED_SHM:
        yield Finding("note", f"{text}: little; containers get more with --shm-size=1g")
    else:
        yield Finding("ok", text)


def _files() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < WANTED_FILES:
        yield Finding("note", f"a process may open {soft} files; every client takes one (`ulimit -n`, at most {hard})")
    else:
        yield Finding("ok", f"a process may open {soft} files")


def _store(url: str) -> Iterator[Finding]:
    try:
        check_store(url)
    except StartupError as error:
        yield Finding("fail", str(error))
    else:
        yield Finding("ok", f"the store {redact(url)} answers")


def _keys(folder: str) -> Iterator[Finding]:
    try:
        load(folder, WORKER)
    except StartupError as error:
        yield Finding("fail", str(error))
    else:
        yield Finding("ok", f"the keys in {folder} are whole, and nobody else can read the secret ones")


def _silently(line: str) -> None:
    """JSON alone is printed."""


def _lines(findings: Sequence[Finding]) -> str:
    return "\n".join(f"  {f.state:<5} {f.text}" for f in findings)


def _line(link: Link) -> str:
    if link.failure:
        return f"{WHAT[link.route]:<34} does not work: {link.failure}"
    name = WHAT.get(link.route, "memory copy, the limit")
    return f"{name:<34} {link.gb_per_s:6.2f} GB/s {link.of_copy:6.0%}"
