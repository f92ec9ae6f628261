"""Log lines: for people on a terminal, JSON otherwise; one line per record, secrets removed.

A JSON line has `ts` (seconds since the epoch), `level`, `logger`, `msg`, `worker`, and what the call passed as
`extra={"fields": {...}}`, e.g. `request_id`.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

SECRETS = (
    (re.compile(r"(?<=://)([^/@\s:]*):[^/@\s]+(?=@)"), r"\1:***"),
    (re.compile(r"(?i)\b(bearer\s+)[\w.~+/=-]+"), r"\1***"),
    (
        re.compile(
            r"""(?ix)\b((?:[\w-]*[_-])?(?:api[_-]?key|password|passwd|secret|(?:auth|access|refresh|bearer)[_-]?token|authorization)
            ["']?\s*[=:]\s*["']?)(?!bearer\b)[^\s"',;&}]{4,}"""
        ),
        r"\1***",
    ),
    (re.compile(r"\bsk-[\w-]{8,}"), "sk-***"),
)
"""URLs' passwords, bearer tokens, `key = value` pairs with a secret's name, OpenAI-style keys."""

LEVEL_COLOURS = {"debug": "2", "warning": "33", "error": "31", "critical": "31"}
NAME_COLOURS = ("36", "35", "34", "32", "33")
"""ANSI colours; a worker keeps its own."""


def redact(text: str) -> str:
    """`text` without the secrets we know the form of."""
    for pattern, replacement in SECRETS:
        text = pattern.sub(replacement, text)
    return text


class JsonFormatter(logging.Formatter):
    """One JSON object per record."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        super().__init__()
        self._fields = dict(fields)

    def format(self, record: logging.LogRecord) -> str:
        return json.dumps(_entry(record, self._fields, self), default=str)


class HumanFormatter(logging.Formatter):
    """One line per record, a traceback below it."""

    def __init__(self, fields: Mapping[str, Any], colour: bool) -> None:
        super().__init__()
        self._fields = dict(fields)
        self._colour = colour

    def format(self, record: logging.LogRecord) -> str:
        return render(_entry(record, self._fields, self), self._colour)


def setup(level: str, worker: str, stream: TextIO | None = None) -> None:
    """Sends every logger's records to `stream` (stderr); each line names `worker`, this process."""
    out = sys.stderr if stream is None else stream
    fields = {"worker": worker}
    handler = logging.StreamHandler(out)
    handler.setFormatter(HumanFormatter(fields, colour=True) if out.isatty() else JsonFormatter(fields))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)


def parse_line(line: str) -> dict[str, Any] | None:
    """The entry of a JSON log line, or None when `line` is something else; never raises."""
    if not line.startswith("{"):
        return None
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("msg"), str) else None


def render(entry: Mapping[str, Any], colour: bool) -> str:
    """`entry` as a line for people: time, worker, message, the fields that remain, a traceback below."""
    level = str(entry.get("level", "info"))
    at = entry.get("ts")
    clock = time.strftime("%H:%M:%S", time.localtime(at if isinstance(at, int | float) else time.time()))
    name = str(entry.get("worker") or entry.get("logger") or "kvmesh")
    shown = ("ts", "level", "logger", "msg", "worker", "role", "exc")
    extra = " ".join(f"{k}={v}" for k, v in entry.items() if k not in shown)
    words = [
        _paint(clock, "2", colour),
        _paint(f"{name:<10}", NAME_COLOURS[sum(name.encode()) % len(NAME_COLOURS)], colour),
        *([_paint(level.upper(), LEVEL_COLOURS[level], colour)] if level in LEVEL_COLOURS else []),
        str(entry.get("msg", "")),
        *([_paint(extra, "2", colour)] if extra else []),
    ]
    return " ".join(words) + (f"\n{entry['exc']}" if entry.get("exc") else "")


def _paint(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text


def _entry(record: logging.LogRecord, fields: Mapping[str, Any], formatter: logging.Formatter) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "ts": round(record.created, 3),
        "level": record.levelname.lower(),
        "logger": record.name,
        "msg": redact(record.getMessage()),
        **fields,
    }
    for name, value in getattr(record, "fields", {}).items():
        entry[name] = redact(value) if isinstance(value, str) else value
    if record.exc_info:
        entry["exc"] = redact(formatter.formatException(record.exc_info))
    return entry
