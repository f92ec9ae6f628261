"""What the workers of a running fleet convert as they exchange KV blocks, by the proxy's /metrics."""

from __future__ import annotations

import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, fields

from prometheus_client.parser import text_string_to_metric_families

from mesh.layout import KvLayout

METRIC = "kvmesh_worker_layout"
TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    state: str
    """`ok`, `note` (it works, and could be better), `fail`."""
    text: str


def exchanges(url: str) -> list[Finding]:
    """One line for each pair of unequal workers, in the direction in which blocks travel, or one for all."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/metrics", timeout=TIMEOUT_S) as answer:
            workers = list(layouts(answer.read().decode()))
    except (OSError, ValueError) as error:
        return [Finding("fail", f"the fleet's layouts are not known: {error}")]
    found = []
    for holder, there in workers:
        for fetcher, here in workers:
            comparison = here.taking(there)
            if fetcher == holder or comparison.equal:
                continue
            if comparison.refused:
                found.append(Finding("fail", f"{holder} to {fetcher}: no blocks, {comparison.refused}"))
            else:
                found.append(Finding("note", f"{holder} to {fetcher}: {', '.join(comparison.conversions)}"))
    return found or [Finding("ok", f"{len(workers)} workers, none has to convert")]


def layouts(metrics: str) -> Iterator[tuple[str, KvLayout]]:
    """The id and layout of every worker in the text of a proxy's /metrics. Raises `ValueError`."""
    for family in text_string_to_metric_families(metrics):
        for sample in family.samples if family.name == METRIC else ():
            try:
                values = [sample.labels[f.name] for f in fields(KvLayout)]
            except KeyError as error:
                raise ValueError(f"{METRIC} has no {error}") from None
            numbers = [v if f.name == "dtype" else int(v) for f, v in zip(fields(KvLayout), values, strict=True)]
            yield sample.labels["worker"], KvLayout(*numbers)  # type: ignore[arg-type]
