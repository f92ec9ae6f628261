"""Which worker holds which block: the proxy's own table, which every look-up is answered from.

A block is known by the first 8 bytes of its name. Two names that share them would only misroute a request
(workers compare all 16), which at 10 million blocks happens with a probability of 3 in a million.

Each incarnation of a worker has a slot, one bit in the holders' mask of every block it holds. A dead worker
costs O(1): its slot leaves the mask of live slots. A slot is given out again only after `scrub` has passed
over the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from proxy.routing.place import Place

SHARDS = 256
"""Small dictionaries: growing one, or scrubbing one, never takes more than a few milliseconds."""
SCRUB_NAMES = 4096
"""Names looked at in one call of `scrub`: under a millisecond."""
MAX_NAMES = 16_000_000
"""Names in the table, about 1.6 GB of memory; above it new ones are not learnt."""


@dataclass(frozen=True, slots=True)
class BlockChange:
    """What became or ceased to be reusable on one worker; names are their first 8 bytes as an integer."""

    seq: int
    reset: bool
    """These are all the blocks that the worker holds."""
    stored: Sequence[int]
    removed: Sequence[int]


class ResidencyIndex(Protocol):
    """What the router asks."""

    def apply(self, worker: Place, change: BlockChange) -> bool:
        """False: changes before this one were missed, so the worker's entries were dropped first."""

    def retire(self, worker: Place) -> None:
        """The incarnation is over."""

    def longest(self, names: Sequence[int]) -> dict[Place, int]:
        """How many of `names`, from the first on, each worker holds; workers that hold none are left out."""

    def __len__(self) -> int:
        """Blocks that are known."""

    def scrub(self) -> None:
        """A small piece of housekeeping; called a few times per second."""


def short_names(hashes: Iterable[bytes]) -> list[int]:
    """The table's names of blocks."""
    return [int.from_bytes(h[:8], "little") for h in hashes]


@dataclass(slots=True, eq=False)
class _Slot:
    bit: int
    """`1 << slot`: shared by all entries, so that a block with one holder costs no integer of its own."""
    seq: int


class LocalResidency:
    """`ResidencyIndex` in this process's memory."""

    def __init__(self, max_names: int = MAX_NAMES) -> None:
        self._max_names = max_names
        self._shards: list[dict[int, int]] = [{} for _ in range(SHARDS)]
        self._names = 0
        self._slots: dict[Place, _Slot] = {}
        self._places: dict[int, Place] = {}
        """Bit -> worker, live slots only."""
        self._live = 0
        self._retired = 0
        """Bits whose entries are still to be scrubbed."""
        self._scrubbing = 0
        """Of these, the bits that this pass clears."""
        self._next_shard = 0
        self._free: list[int] = []
        self._next_slot = 0
        self._fences: dict[str, int] = {}

    def __len__(self) -> int:
        """Names in the table, dead ones that wait for the scrubber included."""
        return self._names

    def apply(self, worker: Place, change: BlockChange) -> bool:
        if worker.incarnation < self._fences.get(worker.worker_id, 0):
            return True
        slot = self._slots.get(worker)
        whole = True
        if slot is None:
            self._retire_older(worker)
            slot = self._open(worker, change.seq)
        elif change.reset or change.seq != slot.seq + 1:
            whole = change.reset or change.seq <= slot.seq
            if change.reset or not whole:
                self._close(worker)
                slot = self._open(worker, change.seq)
        slot.seq = max(slot.seq, change.seq)
        self._store(slot, change.stored)
        self._remove(slot, change.removed)
        return whole

    def _store(self, slot: _Slot, names: Sequence[int]) -> None:
        bit, shards = slot.bit, self._shards
        for name in names:
            shard = shards[name & 255]
            holders = shard.get(name)
            if holders is None:
                if self._names >= self._max_names:
                    return
                shard[name] = bit
                self._names += 1
            elif not holders & bit:
                shard[name] = holders | bit

    def _remove(self, slot: _Slot, names: Sequence[int]) -> None:
        bit, shards = slot.bit, self._shards
        for name in names:
            shard = shards[name & 255]
            holders = shard.get(name, 0)
            if holders == bit:
                del shard[name]
                self._names -= 1
            elif holders & bit:
                shard[name] = holders & ~bit

    def retire(self, worker: Place) -> None:
        self._fences[worker.worker_id] = max(self._fences.get(worker.worker_id, 0), worker.incarnation)
        if worker in self._slots:
            self._close(worker)

    def longest(self, names: Sequence[int]) -> dict[Place, int]:
        found: dict[Place, int] = {}
        shards, holders = self._shards, self._live
        depth = 0
        for name in names:
            still = holders & shards[name & 255].get(name, 0)
            if still != holders:
                self._leave(found, holders ^ still, depth)
                holders = still
                if not still:
                    return found
            depth += 1
        self._leave(found, holders, depth)
        return found

    def _leave(self, found: dict[Place, int], bits: int, depth: int) -> None:
        """Notes the workers whose prefix ends at `depth`."""
        if depth == 0:
            return
        while bits:
            bit = bits & -bits
            found[self._places[bit]] = depth
            bits ^= bit

    def scrub(self) -> None:
        """Clears some shards of retired bits; after the last one their slots can be given out again."""
        if not self._scrubbing:
            if not self._retired:
                return
            self._scrubbing, self._next_shard = self._retired, 0
        seen = 0
        while seen < SCRUB_NAMES and self._next_shard < SHARDS:
            seen += len(self._shards[self._next_shard])
            self._scrub_shard(self._shards[self._next_shard], self._scrubbing)
            self._next_shard += 1
        if self._next_shard == SHARDS:
            dead, self._scrubbing = self._scrubbing, 0
            self._retired &= ~dead
            self._free.extend(n for n in range(dead.bit_length()) if dead >> n & 1)

    def _scrub_shard(self, shard: dict[int, int], dead: int) -> None:
        for name, holders in [(n, h) for n, h in shard.items() if h & dead]:
            if holders & ~dead:
                shard[name] = holders & ~dead
            else:
                del shard[name]
                self._names -= 1

    def _open(self, worker: Place, seq: int) -> _Slot:
        if self._free:
            number = self._free.pop()
        else:
            number, self._next_slot = self._next_slot, self._next_slot + 1
        slot = _Slot(1 << number, seq)
        self._slots[worker] = slot
        self._places[slot.bit] = worker
        self._live |= slot.bit
        return slot

    def _close(self, worker: Place) -> None:
        slot = self._slots.pop(worker)
        del self._places[slot.bit]
        self._live &= ~slot.bit
        self._retired |= slot.bit

    def _retire_older(self, worker: Place) -> None:
        self._fences[worker.worker_id] = worker.incarnation
        for place in [p for p in self._slots if p.worker_id == worker.worker_id]:
            self._close(place)
