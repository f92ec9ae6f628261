"""`kvmesh serve ROLE …`: becomes one process of a mesh, after everything that can be checked has been."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh import environment, options
from mesh.errors import EXIT_MODEL, EXIT_USAGE, StartupError
from mesh.launcher import child_environment, modules
from mesh.modeldir import check_model_dir
from mesh.settings import ProxySettings, WorkerSettings
from mesh.store import check_store


@dataclass(frozen=True, slots=True)
class Served:
    """A kind of process that `serve` starts."""

    module: str
    settings: type
    description: str


SERVED = {
    "proxy": Served("proxy", ProxySettings, "One proxy: the OpenAI-compatible door."),
    "prefill": Served("prefill", WorkerSettings, "One prefill worker: prompts in, first token and KV blocks out."),
    "decode": Served("decode", WorkerSettings, "One decode worker: KV blocks and a first token in, tokens out."),
    "both": Served("decode", WorkerSettings, "One worker that computes its prompts itself."),
}
USAGE = "usage: kvmesh serve {proxy|prefill|decode|both} [FLAGS] MODEL_DIR\n\n" + "".join(
    f"  {name:<9}{served.description}\n" for name, served in SERVED.items()
)


def main(argv: Sequence[str]) -> int:
    """Replaces this process; returns only for help. Raises `StartupError`."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE + "\n`kvmesh serve ROLE --help` lists the flags.")
        return 0 if argv else EXIT_USAGE
    command = command_line(argv[0], argv[1:])
    os.execve(command[0], command, child_environment(os.environ))


def command_line(role: str, argv: Sequence[str]) -> list[str]:
    """The program and its flags. Raises `StartupError`."""
    if role not in SERVED:
        raise StartupError(f"{role!r} is nothing to serve; give one of {', '.join(SERVED)}", EXIT_USAGE)
    served = SERVED[role]
    fixed: dict[str, Any] = {"role": role} if served.settings is WorkerSettings else {}
    group = options.Group(served.settings, hidden=tuple(fixed))
    (values,) = options.parse_groups((group,), argv, prog=f"kvmesh serve {role}", description=served.description)
    settings = served.settings(**values, **fixed)
    environment.check()
    if not settings.model:
        raise StartupError(f"give the model's directory: kvmesh serve {role} MODEL_DIR", EXIT_MODEL)
    check_model_dir(Path(settings.model))
    check_store(settings.store)
    return [*modules(served.module)[served.module], *options.to_argv(settings, always=tuple(fixed))]
