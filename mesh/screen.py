"""The one screen that `kvmesh up` prints when the mesh serves."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mesh import __version__
from mesh.progress import Fact

DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True, slots=True)
class WorkerRow:
    """A worker as the screen shows it."""

    name: str
    role: str
    pid: int
    device: str
    facts: Mapping[str, Fact]


@dataclass(frozen=True, slots=True)
class MeshFacts:
    url: str
    model: str
    model_path: str
    store: str
    proxy_pid: int
    seconds: float
    workers: Sequence[WorkerRow]
    keyed: bool = False
    """Clients must send a key."""


def start_screen(mesh: MeshFacts) -> list[str]:
    """Lines of at most a terminal's width, but for the command to copy."""
    chat = "kvmesh chat" if mesh.url == DEFAULT_URL else f"kvmesh chat --url {mesh.url}"
    chat += " --api-key-file FILE" if mesh.keyed else ""
    key = " -H 'authorization: Bearer KEY'" if mesh.keyed else ""
    body = json.dumps(
        {"model": mesh.model, "messages": [{"role": "user", "content": "Hello"}], "stream": True},
        separators=(",", ":"),
    )
    return [
        "",
        f"kvmesh {__version__} is ready after {mesh.seconds:.1f} s",
        "",
        f"  api      {mesh.url}/v1  (pid {mesh.proxy_pid})",
        f"  model    {mesh.model}  ({mesh.model_path})",
        *_pools(mesh.workers),
        f"  store    {mesh.store}",
        "",
        f"  try      {chat} Hello",
        f"           curl -N {mesh.url}/v1/chat/completions -H 'content-type: application/json'{key} \\",
        f"             -d {shlex.quote(body)}",
        "  stop     Ctrl-C finishes what runs and stops; a second Ctrl-C stops at once",
        "",
    ]


def _pools(workers: Sequence[WorkerRow]) -> list[str]:
    return [
        f"  {'both' if w.role == 'both' else w.role:<8} {w.name}  (pid {w.pid})  {_capacity(w)}".rstrip()
        for w in workers
    ]


def _capacity(worker: WorkerRow) -> str:
    """Only what the worker told."""
    facts = worker.facts
    words = [str(facts.get("device", worker.device))]
    if "dtype" in facts:
        words.append(str(facts["dtype"]))
    if "blocks" in facts:
        size = f" of {facts['block_tokens']} tokens" if "block_tokens" in facts else ""
        words.append(f"{facts['blocks']} KV blocks{size}")
    if "max_model_len" in facts:
        words.append(f"context {facts['max_model_len']}")
    return ", ".join(words)
