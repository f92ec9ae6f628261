"""Which block holds the content of which name, and what changed about it."""

from __future__ import annotations

from collections.abc import Set

from mesh.blockhash import BlockHash


class PrefixIndex:
    """Names of full blocks. Several blocks may hold the same content; `lookup` answers with the oldest of them.

    The events are net changes since `take_events`: a name is in at most one of the two lists, so it does not matter
    in which order a reader applies them.
    """

    def __init__(self) -> None:
        self._block: dict[BlockHash, int] = {}
        self._copies: dict[BlockHash, list[int]] = {}
        self._name: dict[int, BlockHash] = {}
        self._stored: dict[BlockHash, None] = {}
        self._removed: dict[BlockHash, None] = {}

    def __len__(self) -> int:
        return len(self._block)

    def lookup(self, name: BlockHash) -> int | None:
        """A block with this content."""
        return self._block.get(name)

    def name_of(self, block: int) -> BlockHash | None:
        """The block's name, None when it has none."""
        return self._name.get(block)

    @property
    def named(self) -> Set[int]:
        """The blocks that have a name."""
        return self._name.keys()

    def is_copy(self, block: int) -> bool:
        """Another block answers for the same name."""
        name = self._name.get(block)
        return name is not None and self._block[name] != block

    def add(self, block: int, name: BlockHash) -> None:
        """Says that `block`, nameless until now, holds the content of `name`."""
        self._name[block] = name
        if name in self._block:
            self._copies.setdefault(name, []).append(block)
            return
        self._block[name] = block
        if name in self._removed:
            del self._removed[name]
        else:
            self._stored[name] = None

    def forget(self, block: int) -> None:
        """Says that `block` is about to hold something else; does nothing for a nameless one."""
        name = self._name.pop(block, None)
        if name is None:
            return
        copies = self._copies.get(name)
        if copies is not None:
            if self._block[name] == block:
                self._block[name] = copies.pop(0)
            else:
                copies.remove(block)
            if not copies:
                del self._copies[name]
            return
        del self._block[name]
        if name in self._stored:
            del self._stored[name]
        else:
            self._removed[name] = None

    def names(self) -> tuple[BlockHash, ...]:
        """Everything that can be found now, oldest first."""
        return tuple(self._block)

    def take_events(self) -> tuple[tuple[BlockHash, ...], tuple[BlockHash, ...]]:
        """Names stored and names removed since the last call."""
        if not self._stored and not self._removed:
            return (), ()
        events = tuple(self._stored), tuple(self._removed)
        self._stored.clear()
        self._removed.clear()
        return events
