"""The digest that the receiver checks before a block is anything but bytes."""

from __future__ import annotations

import struct

import xxhash

from kvtransfer.messages import BlockHeader

DIGEST_BYTES = 16
_IDENTITY = struct.Struct("<16sqQQq16sqq")


def digest(
    transfer_id: bytes,
    attempt: int,
    holder: int,
    fetcher: int,
    index: int,
    name: bytes,
    valid_tokens: int,
    payload: bytes | memoryview,
) -> bytes:
    """xxh3-128 over who sends what to whom, and the bytes themselves.

    It guards against accidents (a flipped bit, a slot that was reused, a block of another transfer, attempt or
    process life), not against a peer that lies: it has no key.
    """
    h = xxhash.xxh3_128(
        _IDENTITY.pack(transfer_id, attempt, holder, fetcher, index, name, valid_tokens, len(payload))
    )
    h.update(payload)
    return bytes(h.digest())


def is_intact(
    header: BlockHeader,
    transfer_id: bytes,
    attempt: int,
    holder: int,
    fetcher: int,
    payload: bytes | memoryview,
) -> bool:
    """Whether `payload` is what `header` says; total, whatever a hostile header holds."""
    try:
        expected = digest(
            transfer_id, attempt, holder, fetcher, header.index, header.name, header.valid_tokens, payload
        )
    except struct.error:  # a field that is no number of its width
        return False
    return header.length == len(payload) and expected == header.digest
