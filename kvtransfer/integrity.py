"""The digests that a receiver checks before a frame is a message and bytes are a block.

They guard against accidents (a flipped bit, a slot that was reused, a block of another transfer, attempt or process
life), not against a peer that lies: they have no key.
"""

from __future__ import annotations

import struct
from typing import Any

import xxhash

from kvtransfer.messages import BlockHeader
from mesh.errors import BadFrame
from mesh.wire import Envelope, decode, encode

DIGEST_BYTES = 16
SEAL_BYTES = 8
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
    """xxh3-128 over who sends what to whom, and the bytes themselves."""
    identity = _IDENTITY.pack(transfer_id, attempt, holder, fetcher, index, name, valid_tokens, len(payload))
    return bytes(xxhash.xxh3_128_digest(identity + xxhash.xxh3_128_digest(payload)))


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


def seal(message: Any, sender: int, receiver: int, version: int = 0) -> bytes:
    """The control frame of `message`: ZeroMQ and loopback TCP deliver damaged frames as they are. `version`: as in
    `encode`."""
    frame = encode(message, sender, receiver, version)
    return frame + bytes(xxhash.xxh3_64_digest(frame))


def unseal(frame: bytes | memoryview) -> Envelope:
    """The message in `frame`; raises `BadFrame` and nothing else."""
    body, trailer = frame[:-SEAL_BYTES], frame[-SEAL_BYTES:]
    if xxhash.xxh3_64_digest(body) != trailer:
        raise BadFrame("the frame was damaged on its way")
    return decode(body)
