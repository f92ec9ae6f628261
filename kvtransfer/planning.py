"""Which of several holders is asked for which block, so that the last one is in soonest.

What few holders have is given out first, so that those who have everything are left to whom they alone can serve. The
blocks that the same holders have are cut into as few runs as that allows: a second holder is asked only where it
shortens the wait, and each gets a run in order, which its pages and parcels like best.

Sets of blocks are bits of an integer, as everywhere in the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

from kvtransfer.protocol import bits, mask_of

WORTH = 0.05
"""One more holder is asked only if that shortens the wait by this part: it costs both sides a transfer."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What asking one holder costs now."""

    ready_s: float
    """Until its first block can be on its way: the round trip, its load, the bytes that are queued before."""
    block_s: float
    """For each block of it; above 0."""


@dataclass(frozen=True, slots=True)
class Lane:
    """One holder as the plan sees it."""

    has: int
    """What it is thought to have."""
    cost: Cost
    spare: bool = False
    """Asked only for what no other has: it has better things to do than to send what others can."""


def assign(wanted: int, lanes: Sequence[Lane]) -> list[int]:
    """For each lane the blocks to ask it for. Each block is with one lane that has it; what none has is with none."""
    shares = [0] * len(lanes)
    ready = [lane.cost.ready_s for lane in lanes]
    for who, mask in sorted(_groups(wanted, lanes), key=lambda group: (len(group[0]), group[0])):
        for number, count in _counts(mask.bit_count(), who, ready, lanes):
            run = mask_of(islice(bits(mask), count))
            mask &= ~run
            shares[number] |= run
            ready[number] += count * lanes[number].cost.block_s
    return shares


def _groups(wanted: int, lanes: Sequence[Lane]) -> list[tuple[tuple[int, ...], int]]:
    """The blocks that somebody has, by who may be asked for them."""
    groups: list[tuple[tuple[int, ...], int]] = [((), wanted)]
    for number, lane in enumerate(lanes):
        split = []
        for who, mask in groups:
            split += [((*who, number), mask & lane.has), (who, mask & ~lane.has)]
        groups = [group for group in split if group[1]]
    return [(_preferred(who, lanes), mask) for who, mask in groups if who]


def _preferred(who: tuple[int, ...], lanes: Sequence[Lane]) -> tuple[int, ...]:
    return tuple(n for n in who if not lanes[n].spare) or who


def _counts(count: int, who: Sequence[int], ready: Sequence[float], lanes: Sequence[Lane]) -> list[tuple[int, int]]:
    """How many of `count` blocks each lane brings, the fastest first."""

    def alone(n: int) -> float:
        return ready[n] + count * lanes[n].cost.block_s

    used = [min(who, key=lambda n: (alone(n), n))]
    end = alone(used[0])
    for n in sorted(set(who) - set(used), key=lambda n: (ready[n], n)):
        sooner = _end(count, [*used, n], ready, lanes)
        if ready[n] + lanes[n].cost.block_s < end and sooner < (1 - WORTH) * end:
            used.append(n)
            end = sooner
    counts = {n: max(0, int((end - ready[n]) / lanes[n].cost.block_s)) for n in used}
    for _ in range(count - sum(counts.values())):
        next_one = min(used, key=lambda n: (ready[n] + (counts[n] + 1) * lanes[n].cost.block_s, n))
        counts[next_one] += 1
    return [(n, k) for n, k in counts.items() if k]


def _end(count: int, used: Sequence[int], ready: Sequence[float], lanes: Sequence[Lane]) -> float:
    """When these lanes are done if all of them are done at once."""
    speeds = [1 / lanes[n].cost.block_s for n in used]
    return (count + sum(ready[n] * speed for n, speed in zip(used, speeds, strict=True))) / sum(speeds)
