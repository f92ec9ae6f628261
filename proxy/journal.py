"""The tokens that a client already has of one choice."""

from __future__ import annotations

from dataclasses import dataclass

CHUNK = 64


@dataclass(slots=True)
class Journal:
    """Tokens emitted so far; never changed, appending copies at most one chunk, whatever the length.

    Not frozen because one is made per token, which takes three times as long for a frozen class.
    """

    closed: tuple[tuple[int, ...], ...] = ()
    """Chunks of exactly `CHUNK` tokens."""
    tail: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.closed) * CHUNK + len(self.tail)

    def tokens(self) -> tuple[int, ...]:
        return tuple([t for chunk in self.closed for t in chunk]) + self.tail

    def at(self, index: int) -> int:
        chunk, offset = divmod(index, CHUNK)
        return self.closed[chunk][offset] if chunk < len(self.closed) else self.tail[offset]

    def extend(self, tokens: tuple[int, ...]) -> Journal:
        closed, tail = self.closed, self.tail + tokens
        while len(tail) >= CHUNK:
            closed, tail = (*closed, tail[:CHUNK]), tail[CHUNK:]
        return Journal(closed, tail)
