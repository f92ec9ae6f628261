"""The pages of the KV pool: which are free, which are cached, which are held.

free ──allocate──▶ held ──release, nameless──▶ free
  ▲                 ▲ └──release, named──▶ cached ──evict (oldest release first)──▶ held
  └ at the start    └────────acquire─────────┘

free + cached + held == total, always.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from engine.cache.prefix_index import PrefixIndex
from engine.errors import IntegrityError
from mesh.blockhash import BlockHash


class BlockPool:
    """Reference counts over `num_blocks` pages, with a prefix index over those whose content has a name."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool of {num_blocks} blocks")
        self.num_blocks = num_blocks
        self.index = PrefixIndex()
        self._refs = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Unreferenced blocks whose content can still be found."""
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can still give."""
        return len(self._free) + len(self._cached)

    def refs(self, block: int) -> int:
        return self._refs[block]

    def allocate(self) -> int | None:
        """A nameless block held once: a free one, else the one cached longest; None when all are held."""
        if self._free:
            block = self._free.pop()
        elif self._cached:
            block, _ = self._cached.popitem(last=False)
            self.index.forget(block)
        else:
            return None
        self._refs[block] = 1
        return block

    def find(self, name: BlockHash) -> int | None:
        """The block of this content, held once more; None when there is none."""
        block = self.index.lookup(name)
        if block is not None:
            if self._refs[block] == 0:
                del self._cached[block]
            self._refs[block] += 1
        return block

    def register(self, block: int, name: BlockHash) -> None:
        """Names a held block: its content is complete and will not change while it has this name."""
        if self._refs[block] == 0 or self.index.name_of(block) is not None:
            raise IntegrityError(f"block {block} cannot be named: held {self._refs[block]} times")
        self.index.add(block, name)

    def release(self, block: int) -> None:
        """One holder fewer. The last one leaves a named block cached, any other free."""
        refs = self._refs[block] - 1
        if refs < 0:
            raise IntegrityError(f"block {block} is released but nobody holds it")
        self._refs[block] = refs
        if refs:
            return
        if self.index.name_of(block) is None or self.index.is_copy(block):
            self.index.forget(block)
            self._free.append(block)
        else:
            self._cached[block] = None

    def check(self, held: Mapping[int, int]) -> None:
        """Raises `IntegrityError` unless exactly the blocks in `held` are referenced, so many times each."""
        counted = [held.get(block, 0) for block in range(self.num_blocks)]
        if counted != self._refs:
            block = next(b for b in range(self.num_blocks) if counted[b] != self._refs[b])
            raise IntegrityError(f"block {block}: {self._refs[block]} references, {counted[block]} holders")
        free, cached, named = set(self._free), set(self._cached), self.index.named
        if len(free) != len(self._free) or free & cached:
            raise IntegrityError("a block is free twice, or free and cached")
        if lost := (free | cached) ^ {block for block, refs in enumerate(self._refs) if not refs}:
            raise IntegrityError(f"blocks {sorted(lost)} are lost, or free or cached though they are held")
        if wrong := (free & named) | (cached - named):
            raise IntegrityError(f"blocks {sorted(wrong)} are free with a name, or cached without one")
        if self.num_free + self.num_cached + self.num_held != self.num_blocks:
            raise IntegrityError("free + cached + held is not the total")
