"""What is true: the tokens of every request, and the bytes of every block that anybody may have."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.sim_engine import CHAIN, MASK, expected_tokens, splitmix64
from mesh import blockhash

VOCAB = 251


class Violation(BaseException):
    """Something that must never happen did. No `Exception`: production survives those, and this must get through."""


def answer(prompt: Sequence[int], max_tokens: int, stops: Sequence[int] = ()) -> list[int]:
    """All tokens that the request's client gets."""
    tokens = expected_tokens(prompt, max_tokens, VOCAB)
    last = next((i for i, token in enumerate(tokens) if token in stops), max_tokens - 1)
    return tokens[: last + 1]


class Oracle:
    """Knows what the undisturbed engine would compute; by plain loops, without pages."""

    def __init__(self, sizes: Sequence[int], root: bytes) -> None:
        """`sizes`: of the fleet's blocks, in tokens."""
        self._sizes = sizes
        self._root = root
        self._blocks: dict[tuple[bytes, int], bytes] = {}
        """By name and size: the first block of a small size has the name of a larger one's beginning."""

    def learn(self, tokens: Sequence[int]) -> None:
        """Every block of this text, full or partly filled at any token."""
        for size in self._sizes:
            self._learn(tokens, size)

    def _learn(self, tokens: Sequence[int], size: int) -> None:
        parent, value = self._root, 0
        page = np.zeros(size, np.uint64)
        for position, token in enumerate(tokens):
            value = (CHAIN * value + splitmix64(token)) & MASK
            within = position % size
            page[within] = value
            page[within + 1 :] = 0
            name = blockhash.block_hash(parent, tokens[position - within : position + 1])
            self._blocks[name, page.nbytes] = page.tobytes()
            if within == size - 1:
                parent = name

    def check(self, name: bytes, payload: bytes | memoryview, what: str) -> None:
        """Raises `Violation` unless the block of this name has these bytes."""
        known = self._blocks.get((name, len(payload)))
        if known is None:
            raise Violation(f"{what}: a block that no request has, {name.hex()[:8]}")
        if known != bytes(payload):
            raise Violation(f"{what}: wrong bytes for block {name.hex()[:8]}")
