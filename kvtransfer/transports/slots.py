"""Which slots of a segment are free, and the sequence number under which each was last written.

A slot's number is odd while its sender writes and even when it is whole. The message names the number that it was
written under, and the receiver finds it both before and after its copy or has nothing: so a sender may take a slot back
at any time.
"""

from __future__ import annotations


class Slots:
    """The sender's side."""

    def __init__(self, count: int) -> None:
        self._seqs = [0] * count
        self._free = list(range(count))

    def begin(self) -> tuple[int, int] | None:
        """A free slot and the even number to write it under (the odd one below says: not yet); None: all are taken."""
        if not self._free:
            return None
        slot = self._free.pop()
        self._seqs[slot] += 2
        return slot, self._seqs[slot]

    def reclaim(self, slot: int, seq: int) -> None:
        """Frees `slot` if it is still what was written under `seq`."""
        if 0 <= slot < len(self._seqs) and self._seqs[slot] == seq:
            self._free.append(slot)
            self._seqs[slot] = seq + 2  # a second reclaim of the same parcel finds another number
