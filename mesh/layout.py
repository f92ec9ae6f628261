"""The form of one KV block's bytes, which peers compare field by field before any byte moves.

A worker that fetches converts: it knows the holder's layout, checks the bytes in that layout, and writes them into its
own pages in its own. So two layouts are equal, convertible, or refused by the name of a field.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from mesh.wire import since

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "uint8": 1}
FLOATS = ("float32", "bfloat16", "float16", "float8_e4m3fn")
"""Each of these can be had from each other, rounded to the nearest and never beyond the largest finite value."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What one worker can do with another's blocks."""

    refused: str = ""
    """The first field by which they are of no use to it, with both values."""
    conversions: tuple[str, ...] = ()
    """What it converts as it takes them in: each field that differs, with both values."""

    @property
    def equal(self) -> bool:
        return not self.refused and not self.conversions


@dataclass(frozen=True, slots=True)
class KvLayout:
    """A block is one contiguous range of bytes, of `shape` in row-major order."""

    layers: int
    kv_heads: int
    """Of the model."""
    head_dim: int
    block_tokens: int
    dtype: str
    tp: int = field(default=1, metadata=since(control=6, kv=6, before=1))
    """Tensor-parallel degree: into how many slices the heads are cut. Above `kv_heads`, several ranks have the same."""
    rank: int = field(default=0, metadata=since(control=6, kv=6, before=0))
    """Which of these slices is here."""

    @property
    def heads(self) -> range:
        """The model's KV heads that are here."""
        first = self.rank * self.kv_heads // self.tp
        return range(first, first + max(1, self.kv_heads // self.tp))

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """`[layers, 2, heads, block_tokens, head_dim]`; 2: keys, values."""
        return self.layers, 2, len(self.heads), self.block_tokens, self.head_dim

    @property
    def token_bytes(self) -> int:
        """Of one position in all layers."""
        return self.layers * 2 * len(self.heads) * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_tokens

    def difference(self, other: KvLayout) -> str:
        """The first field in which they differ, with both values; empty when they are equal."""
        names = [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]
        return f"{names[0]} is {getattr(self, names[0])}, not {getattr(other, names[0])}" if names else ""

    def taking(self, other: KvLayout) -> Comparison:
        """What it takes to bring blocks of `other` into pages of this layout; total, whatever `other` says."""
        fault = other._fault()
        if fault:
            return Comparison(fault)
        for name in ("layers", "kv_heads", "head_dim"):
            if getattr(self, name) != getattr(other, name):
                return Comparison(self._both(name, other))
        if self.dtype != other.dtype and not {self.dtype, other.dtype} <= set(FLOATS):
            return Comparison(self._both("dtype", other))
        if self.heads.start >= other.heads.stop or other.heads.start >= self.heads.stop:
            return Comparison(f"rank {other.rank} of {other.tp} -> {self.rank} of {self.tp}: no head in common")
        names = [n for n in ("block_tokens", "dtype", "tp") if getattr(self, n) != getattr(other, n)]
        return Comparison("", tuple(self._both(n, other) for n in names))

    def _both(self, name: str, other: KvLayout) -> str:
        return f"{name} {getattr(other, name)} -> {getattr(self, name)}"

    def _fault(self) -> str:
        """The field that makes this no layout of anything; empty when all are sound."""
        if self.dtype not in DTYPE_BYTES:
            return f"dtype {self.dtype[:32]!r} is not known"
        for name in ("layers", "kv_heads", "head_dim", "block_tokens", "tp"):
            if getattr(self, name) < 1:
                return f"{name} {getattr(self, name)}"
        if not 0 <= self.rank < self.tp:
            return f"rank {self.rank} of {self.tp}"
        if self.kv_heads % self.tp and self.tp % self.kv_heads:
            return f"tp {self.tp} does not cut {self.kv_heads} heads evenly"
        return ""
