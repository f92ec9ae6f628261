"""Partly filled last blocks of prompts, by name, while the request that computed them holds the page."""

from __future__ import annotations

from engine.request import EngineRequest
from mesh.blockhash import BlockHash


class Tails:
    """A name may have several pages: one for each request with the same prompt."""

    def __init__(self) -> None:
        self._pages: dict[BlockHash, dict[str, tuple[int, int]]] = {}
        self._names: dict[str, BlockHash] = {}

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, request: EngineRequest) -> bool:
        return request.key in self._names

    def add(self, request: EngineRequest, name: BlockHash, block: int, valid_tokens: int) -> None:
        """The first `valid_tokens` positions of `block` are complete, whatever is written behind them."""
        self._names[request.key] = name
        self._pages.setdefault(name, {})[request.key] = (block, valid_tokens)

    def find(self, name: BlockHash) -> tuple[int, int] | None:
        """A page and its valid tokens."""
        pages = self._pages.get(name)
        return next(iter(pages.values())) if pages else None

    def leave(self, request: EngineRequest) -> None:
        """The request is about to give its pages back; does nothing when it has no tail here."""
        name = self._names.pop(request.key, None)
        if name is None:
            return
        del self._pages[name][request.key]
        if not self._pages[name]:
            del self._pages[name]
