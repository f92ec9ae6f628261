"""Digests and frames: every field counts, and every flipped bit is found."""

from __future__ import annotations

import random

import pytest

from kvtransfer.integrity import digest, is_intact, seal, unseal
from kvtransfer.messages import BlockHeader, Fetch, Note, Offer
from mesh.errors import BadFrame
from tests.kvtransfer.pairs import LAYOUT, content, name, transfer_id, wanted

IDENTITY = (transfer_id(1), 2, 7, 9, 3, name(3), 4)
PAYLOAD = content(name(3))


@pytest.mark.parametrize(
    ("field", "other"),
    list(enumerate([transfer_id(2), 3, 8, 10, 4, name(4), 3])),
    ids=["transfer", "attempt", "holder", "fetcher", "index", "name", "valid_tokens"],
)
def test_every_identity_field_is_part_of_the_digest(field: int, other: bytes | int) -> None:
    changed = (*IDENTITY[:field], other, *IDENTITY[field + 1 :])
    assert digest(*changed, PAYLOAD) != digest(*IDENTITY, PAYLOAD)  # type: ignore[arg-type, call-arg]


def test_every_bit_of_the_payload_is_part_of_the_digest() -> None:
    whole = digest(*IDENTITY, PAYLOAD)
    for bit in range(0, len(PAYLOAD) * 8, 7):
        damaged = bytearray(PAYLOAD)
        damaged[bit // 8] ^= 1 << bit % 8
        assert digest(*IDENTITY, bytes(damaged)) != whole


def test_a_memoryview_has_the_digest_of_its_bytes() -> None:
    assert digest(*IDENTITY, memoryview(PAYLOAD)) == digest(*IDENTITY, PAYLOAD)


def test_the_check_is_total() -> None:
    good = BlockHeader(3, name(3), 4, len(PAYLOAD), digest(*IDENTITY, PAYLOAD))
    head = (transfer_id(1), 2, 7, 9)
    assert is_intact(good, *head, PAYLOAD)
    assert not is_intact(BlockHeader(3, name(3), 4, 1, good.digest), *head, PAYLOAD)
    assert not is_intact(BlockHeader(1 << 70, name(3), 4, len(PAYLOAD), good.digest), *head, PAYLOAD)
    assert not is_intact(good, transfer_id(1), -(1 << 70), 7, 9, PAYLOAD)


def test_frames_come_back_as_they_went() -> None:
    fetch = Fetch(transfer_id(1), 2, 0, "r#1", LAYOUT, (Offer("zmq", ""),), wanted(range(5)), 4, 0, 1.5)
    envelope = unseal(seal(fetch, 9, 7))
    assert (envelope.sender, envelope.receiver, envelope.message) == (9, 7, fetch)


def test_every_flipped_bit_of_a_control_frame_is_found() -> None:
    frame = seal(Note(transfer_id(1), 1, 0, b"first token"), 7, 9)
    for bit in range(len(frame) * 8):
        damaged = bytearray(frame)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(BadFrame):
            unseal(bytes(damaged))


def test_random_bytes_are_a_bad_frame_and_nothing_else() -> None:
    chance = random.Random(1)
    for _ in range(500):
        with pytest.raises(BadFrame):
            unseal(chance.randbytes(chance.randrange(60)))
