"""How every benchmark here measures: short steps, gated by run-queue delay, contenders in turn, ratios with spread.

A shared machine lends its cores to others; `/proc/self/task/*/schedstat` says for how long this process's threads
were runnable but did not run. A step that waited for more than `MAX_DELAY` of its wall time is left out.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

MAX_DELAY = 0.05
MIN_SAMPLES = 3
"""With fewer clean samples the figure falls back to the quietest ones and says so."""


def run_delay_s() -> float:
    """Seconds for which this process's threads have waited on a run queue so far."""
    waited = 0
    for task in Path("/proc/self/task").iterdir():
        try:
            waited += int((task / "schedstat").read_text().split()[1])
        except OSError:  # the thread ended meanwhile
            continue
    return waited / 1e9


Mark = tuple[float, float]
"""A moment, and for how long the process's threads had waited for a core until then; seconds."""


def now_and_delay() -> Mark:
    return time.perf_counter(), run_delay_s()


@dataclass(slots=True)
class Samples:
    """Wall times of equal steps with the share of each that was spent waiting for a core."""

    seconds: list[float] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)

    def time(self, step: Callable[[], T]) -> T:
        before = now_and_delay()
        result = step()
        self.add(before, now_and_delay())
        return result

    def add(self, before: Mark, after: Mark) -> None:
        self.seconds.append(after[0] - before[0])
        self.delays.append((after[1] - before[1]) / (after[0] - before[0]))

    def drop_last(self) -> None:
        self.seconds.pop()
        self.delays.pop()

    def extend(self, other: Samples, first: int) -> None:
        """Takes the samples of `other` from number `first` on."""
        self.seconds += other.seconds[first:]
        self.delays += other.delays[first:]

    @property
    def clean(self) -> list[float]:
        good = [s for s, d in zip(self.seconds, self.delays, strict=True) if d <= MAX_DELAY]
        if len(good) >= MIN_SAMPLES:
            return good
        quietest = sorted(zip(self.delays, self.seconds, strict=True))[:MIN_SAMPLES]
        return [s for _, s in quietest]

    @property
    def is_clean(self) -> bool:
        """Enough steps had a core to themselves."""
        return sum(d <= MAX_DELAY for d in self.delays) >= MIN_SAMPLES

    @property
    def median(self) -> float:
        return statistics.median(self.clean)


def machine() -> str:
    """One line that says where a figure was measured."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return f"{os.cpu_count()} cores {model}, Python {platform.python_version()}, load {os.getloadavg()[0]:.1f}"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in [header, *rows]]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)
