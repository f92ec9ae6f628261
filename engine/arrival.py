"""Requests in order: what becomes a batch or is preempted is found by priority, and among equals by age."""

from __future__ import annotations

from collections.abc import Iterator

from engine.request import EngineRequest


class ArrivalQueue:
    """Requests by key, iterated in their `order`: the oldest first, unless priorities differ. Add and remove are O(1).

    A request that comes back (preempted, fetched) takes its old place, and one of a higher priority overtakes: the
    next iteration sorts, which is linear because all others are in order. Do not add or remove while iterating;
    `snapshot` is for that.
    """

    __slots__ = ("_by_key", "_in_order", "_youngest")

    def __init__(self) -> None:
        self._by_key: dict[str, EngineRequest] = {}
        self._youngest = (0, 0)
        """The last one's order, while all are in order."""
        self._in_order = True

    def add(self, request: EngineRequest) -> None:
        """Adds it, or does nothing when it is there."""
        if request.key in self._by_key:
            return
        self._by_key[request.key] = request
        if not self._by_key or request.order >= self._youngest:
            self._youngest = request.order
        else:
            self._in_order = False

    def discard(self, request: EngineRequest) -> None:
        """Removes it if it is there."""
        self._by_key.pop(request.key, None)

    def snapshot(self) -> list[EngineRequest]:
        """A copy, oldest first."""
        self._sort()
        return list(self._by_key.values())

    def __iter__(self) -> Iterator[EngineRequest]:
        self._sort()
        return iter(self._by_key.values())

    def __reversed__(self) -> Iterator[EngineRequest]:
        self._sort()
        return reversed(self._by_key.values())

    def __contains__(self, request: EngineRequest) -> bool:
        return request.key in self._by_key

    def __len__(self) -> int:
        return len(self._by_key)

    def _sort(self) -> None:
        if not self._in_order:
            in_order = sorted(self._by_key.items(), key=lambda item: item[1].order)
            self._by_key = dict(in_order)
            self._in_order = True
            if in_order:
                self._youngest = in_order[-1][1].order
