"""The tokens that a client already has of one choice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Journal:
    """Tokens emitted so far; appending copies at most one chunk, whatever the length."""

    closed: tuple[tuple[int, ...], ...] = ()
    """Chunks of exactly `CHUNK` tokens."""
    tail: tuple[int, ...] = ()

    CHUNK = 256

    def __len__(self) -> int:
        return len(self.closed) * self.CHUNK + len(self.tail)

    def tokens(self) -> tuple[int, ...]:
        return tuple([t for chunk in self.closed for t in chunk]) + self.tail

    def at(self, index: int) -> int:
        chunk, offset = divmod(index, self.CHUNK)
        return self.closed[chunk][offset] if chunk < len(self.closed) else self.tail[offset]

    def extend(self, tokens: tuple[int, ...]) -> Journal:
        closed, tail = self.closed, self.tail + tokens
        while len(tail) >= self.CHUNK:
            closed, tail = (*closed, tail[: self.CHUNK]), tail[self.CHUNK :]
        return Journal(closed, tail)
