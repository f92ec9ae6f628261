"""The name of one life of one worker."""

from __future__ import annotations

from typing import NamedTuple


class Place(NamedTuple):
    """A worker's id and incarnation: equal exactly when it is the same process."""

    worker_id: str
    incarnation: int
