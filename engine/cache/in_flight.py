"""Names of blocks that somebody is about to have, so that nobody computes them a second time."""

from __future__ import annotations

from collections.abc import Iterable

from engine.request import EngineRequest
from mesh.blockhash import BlockHash


class InFlight:
    """Full blocks that a RUNNING request computes or a FETCHING one awaits, each with its requests."""

    def __init__(self) -> None:
        self._requests: dict[BlockHash, dict[str, tuple[int, int]]] = {}
        self._names: dict[str, dict[BlockHash, None]] = {}

    def __len__(self) -> int:
        return len(self._requests)

    def begin(self, request: EngineRequest, names: Iterable[BlockHash]) -> None:
        """`request` is to complete these blocks."""
        mine = self._names.setdefault(request.key, {})
        for name in names:
            mine[name] = None
            self._requests.setdefault(name, {})[request.key] = request.order
        if not mine:
            del self._names[request.key]

    def done(self, request: EngineRequest, name: BlockHash) -> None:
        """`request` has completed the block (or it was never its own)."""
        mine = self._names.get(request.key)
        if mine is not None and name in mine:
            del mine[name]
            self._drop(request.key, name)
            if not mine:
                del self._names[request.key]

    def leave(self, request: EngineRequest) -> None:
        """`request` completes nothing any more."""
        for name in self._names.pop(request.key, ()):
            self._drop(request.key, name)

    def ahead_of(self, request: EngineRequest, name: BlockHash) -> bool:
        """A request before `request` is about to have the block."""
        requests = self._requests.get(name)
        return requests is not None and min(requests.values()) < request.order

    def _drop(self, key: str, name: BlockHash) -> None:
        requests = self._requests[name]
        del requests[key]
        if not requests:
            del self._requests[name]
