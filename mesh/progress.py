"""What a starting process tells the launcher: JSON lines on the file descriptor `KVMESH_PROGRESS_FD`.

    {"kvmesh": "progress", "phase": "weights", "fraction": 0.4, "facts": {}}
    {"kvmesh": "progress", "phase": "ready", "fraction": 1.0, "facts": {"device": "cpu", "blocks": 512}}
    {"kvmesh": "failed", "message": "...", "exit_code": 3}

`ready` is the phase of a process that serves; its facts are for the start screen. `failed` is the last line of a
process that cannot start. A process that nobody launched says nothing.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

PROGRESS_FD = "KVMESH_PROGRESS_FD"
READY = "ready"
MAX_LINE_BYTES = 4096
"""At most PIPE_BUF on Linux, so that lines of several threads never mix."""
MAX_MESSAGE = 1000

Fact = str | int | float


@dataclass(frozen=True, slots=True)
class Phase:
    """A step of starting up, e.g. `import`, `weights`, `warm-up`, `ready`."""

    name: str
    fraction: float | None = None
    """Share of the phase that is done, 0 to 1; None when not known."""
    facts: Mapping[str, Fact] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failed:
    message: str
    exit_code: int


def report(phase: str, fraction: float | None = None, **facts: Fact) -> None:
    """Tells the launcher, if there is one; safe from any thread, never an error for the caller.

    The screen shows these facts of `ready`: device, dtype, blocks, block_tokens, max_model_len.
    """
    _write({"kvmesh": "progress", "phase": phase, "fraction": fraction, "facts": facts})


def report_failure(message: str, exit_code: int) -> bool:
    """True when the launcher has it and will say it; False when the caller must."""
    return _write({"kvmesh": "failed", "message": message[:MAX_MESSAGE], "exit_code": exit_code})


def parse_report(line: str) -> Phase | Failed | None:
    """The report in `line`, or None for anything else; never raises."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    match fields:
        case {"kvmesh": "progress", "phase": str(name), "facts": dict(facts)}:
            known = {k: v for k, v in facts.items() if type(v) in (str, int, float)}
            return Phase(name, _share(fields.get("fraction")), known)
        case {"kvmesh": "failed", "message": str(message), "exit_code": int(code)}:
            return Failed(message, code)
        case _:
            return None


def _write(line: dict[str, object]) -> bool:
    fd = os.environ.get(PROGRESS_FD, "")
    data = json.dumps(line, default=str).encode() + b"\n"
    if not fd.isdigit() or len(data) > MAX_LINE_BYTES:
        return False
    try:
        return os.write(int(fd), data) == len(data)
    except OSError:
        return False


def _share(value: object) -> float | None:
    if not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return min(1.0, max(0.0, float(value)))
