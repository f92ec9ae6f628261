"""The form of one KV block's bytes, which peers compare before any byte moves."""

from __future__ import annotations

from dataclasses import dataclass

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "uint8": 1}


@dataclass(frozen=True, slots=True)
class KvLayout:
    """A block is one contiguous range of bytes, `[layers, 2, kv_heads, block_tokens, head_dim]` in row-major order."""

    layers: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: str

    @property
    def block_bytes(self) -> int:
        return self.layers * 2 * self.kv_heads * self.block_tokens * self.head_dim * DTYPE_BYTES[self.dtype]

    def refused_field(self, other: KvLayout) -> str | None:
        """The first field by which two layouts cannot exchange blocks, or None when they can."""
        for name in ("layers", "kv_heads", "head_dim", "block_tokens", "dtype"):
            if getattr(self, name) != getattr(other, name):
                return name
        return None
