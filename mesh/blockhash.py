"""Names of KV blocks: a keyed BLAKE2b-128 chain over the tokens that they and everything before them hold.

A block's name depends on the model, the tenant's secret and every token up to the block's end, so equal names mean the
same content whoever computed it, and a name cannot be guessed across tenants. A partly filled block has a name too: the
hash of its parent and the tokens it holds so far.

What the bytes look like is no part of a name: workers of one fleet may keep them in unequal formats, and a fetcher
converts. The number of tokens per block is one by nature: chains over 16 and over 64 tokens have no name in common. A
worker keeps the names of its own block size alone, and whoever asks it for blocks computes those.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16
BlockHash = bytes


def root(model_digest: bytes, adapter: str = "", secret: bytes = b"", salt: str = "") -> bytes:
    """The chain's start. `secret` is the tenant's (server side); `salt` is the client's and can only narrow sharing."""
    h = blake2b(digest_size=HASH_BYTES, key=secret[:64], person=b"kvmesh-root")
    for part in (model_digest, adapter.encode(), salt.encode()):
        h.update(len(part).to_bytes(4, "little"))
        h.update(part)
    return h.digest()


def block_hash(parent: bytes, tokens: Sequence[int]) -> BlockHash:
    """The name of the block that follows `parent` and holds `tokens` (a full block, or the tail's first tokens)."""
    return blake2b(array("i", tokens).tobytes(), digest_size=HASH_BYTES, key=parent).digest()


def chain(start: bytes, tokens: Sequence[int], block_tokens: int) -> list[BlockHash]:
    """The names of all full blocks of `tokens`, in order; `start` is `root(...)` or the last known block's name."""
    hashes: list[BlockHash] = []
    parent = start
    for i in range(0, len(tokens) - block_tokens + 1, block_tokens):
        parent = block_hash(parent, tokens[i : i + block_tokens])
        hashes.append(parent)
    return hashes


def cut(start: bytes, tokens: Sequence[int], block_tokens: int) -> list[tuple[BlockHash, int]]:
    """Name and number of tokens of every block of `tokens`, the partly filled last one included."""
    blocks = [(name, block_tokens) for name in chain(start, tokens, block_tokens)]
    rest = len(tokens) % block_tokens
    if rest:
        parent = blocks[-1][0] if blocks else start
        blocks.append((block_hash(parent, tokens[len(tokens) - rest :]), rest))
    return blocks
