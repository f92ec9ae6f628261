"""What a person or a log collector sees of a launched mesh: log lines, a progress line, the start screen.

On a terminal, lines are coloured and the progress line is redrawn in place; otherwise every line is one JSON object.
Log lines go to stderr, the start screen to stdout.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Sequence
from typing import Any, TextIO

from mesh.logs import parse_line, redact, render

CLEAR_LINE = "\r\x1b[K"
MIN_REDRAW_S = 0.05


class Console:
    def __init__(self, out: TextIO, log: TextIO) -> None:
        self._out = out
        self._log = log
        self._tty = log.isatty()
        self._status = ""
        self._drawn_at = 0.0

    @property
    def draws(self) -> bool:
        """There is a progress line that shows what processes are doing."""
        return self._tty

    def line(self, worker: str, text: str) -> None:
        """A line that a process printed: one of our JSON log lines, or anything."""
        entry = parse_line(text)
        if entry is None:
            entry = {"ts": round(time.time(), 3), "level": "info", "worker": worker, "msg": redact(text)}
        self._write({**entry, "worker": worker})

    def note(self, level: str, text: str) -> None:
        """A line of the launcher's own."""
        self._write({"ts": round(time.time(), 3), "level": level, "worker": "kvmesh", "msg": redact(text)})

    def status(self, text: str) -> None:
        """The progress line; only a terminal shows it."""
        now = time.monotonic()
        if not self._tty or text == self._status or now - self._drawn_at < MIN_REDRAW_S:
            return
        self._status, self._drawn_at = text, now
        self._draw()

    def screen(self, lines: Sequence[str]) -> None:
        """The start screen, in place of the progress line."""
        self.clear()
        _write(self._out, "\n".join(lines) + "\n")

    def fail(self, message: str) -> None:
        """The last line, plain in every case: it is what a person or a script looks for."""
        self.clear()
        _write(self._log, f"kvmesh: {redact(message)}\n")

    def clear(self) -> None:
        if self._status:
            self._status = ""
            self._draw()

    def _write(self, entry: dict[str, Any]) -> None:
        if self._tty:
            _write(self._log, CLEAR_LINE * bool(self._status) + render(entry, colour=True) + "\n" + self._status)
        else:
            _write(self._log, json.dumps(entry, default=str) + "\n")

    def _draw(self) -> None:
        if self._tty:
            _write(self._log, CLEAR_LINE + self._status)


def _write(stream: TextIO, text: str) -> None:
    """A reader that has left must not end the mesh."""
    with contextlib.suppress(OSError):
        stream.write(text)
        stream.flush()
