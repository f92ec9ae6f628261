"""Protocol versions on the wire: frames of the version before are understood and written as that version wrote them."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest

from kvtransfer.messages import Fetch, Offer
from kvtransfer.protocol import Wanted
from mesh import wire
from mesh.errors import BadFrame
from mesh.layout import KvLayout
from mesh.messages import FIRST, Decode, OtherVersions, Peer, Register, Welcome, WorkerInfo
from mesh.params import SamplingParams
from mesh.wire import CONTROL, KV, OtherVersion, Versions, decode, encode

BEFORE = CONTROL.highest - 1
LAYOUT = KvLayout(2, 4, 8, 16, "bfloat16")
INFO = WorkerInfo("w", 3, "decode", "ipc:///w", "host", 12, "tiny", b"digest", LAYOUT, 8, 64, 4, 16, 5.0)
PEER = Peer("p", 4, "ipc:///p", "host", LAYOUT)
WRITTEN_BEFORE: list[tuple[Any, list[Any]]] = [
    (
        Register(INFO, 2),
        [
            ["w", 3, "decode", "ipc:///w", "host", 12, "tiny", b"digest", [2, 4, 8, 16, "bfloat16"], 8, 64, 4, 16, 5.0],
            2,
        ],
    ),
    (Welcome("proxy", 10.0), ["proxy", 10.0]),
    (
        Fetch(b"t" * 16, 1, 0, "s", LAYOUT, (Offer("zmq", ""),), (Wanted(3, b"n" * 16, 16),), 4, 0, 5.0),
        [b"t" * 16, 1, 0, "s", [2, 4, 8, 16, "bfloat16"], [["zmq", ""]], [[3, b"n" * 16, 16]], 4, 0, 5.0],
    ),
]
"""A message and its body as the release before wrote it, field by field."""


@pytest.mark.parametrize(
    ("mine", "theirs", "common"),
    [
        ((5, 6), (5, 6), 6),
        ((5, 6), (5, 5), 5),
        ((5, 6), (6, 9), 6),
        ((5, 6), (1, 5), 5),
        ((5, 6), (7, 8), None),
        ((5, 6), (1, 4), None),
        ((5, 6), (9, 1), None),
    ],
)
def test_the_highest_common_version(mine: tuple[int, int], theirs: tuple[int, int], common: int | None) -> None:
    assert Versions(*mine).common(Versions(*theirs)) == common
    assert Versions(*theirs).common(Versions(*mine)) == common


@pytest.mark.parametrize(("message", "body"), WRITTEN_BEFORE)
def test_a_message_is_written_as_the_version_before_wrote_it(message: Any, body: list[Any]) -> None:
    version, tag, sender, receiver, written = msgpack.unpackb(encode(message, 7, 9, BEFORE))
    assert (version, sender, receiver, written) == (BEFORE, 7, 9, body)
    assert tag == wire._by_type[type(message)][0]


@pytest.mark.parametrize(("message", "body"), WRITTEN_BEFORE)
def test_a_message_of_the_version_before_is_understood(message: Any, body: list[Any]) -> None:
    tag = wire._by_type[type(message)][0]
    envelope = decode(msgpack.packb([BEFORE, tag, 7, 9, body]))
    assert (envelope.sender, envelope.receiver, envelope.version) == (7, 9, BEFORE)
    assert type(envelope.message) is type(message)
    with pytest.raises(BadFrame):
        decode(msgpack.packb([CONTROL.highest, tag, 7, 9, body]))


def test_what_was_not_said_before_is_what_it_stood_for() -> None:
    register = decode(encode(Register(INFO), 3, version=BEFORE)).message
    assert (register.worker.control, register.worker.kv) == (FIRST, FIRST)
    assert register.worker.layout == LAYOUT
    message = Decode("r", 1, (1,), 1, SamplingParams(max_tokens=1), b"root", 5.0, PEER, (), 9)
    source = decode(encode(message, 1, version=BEFORE)).message.source
    assert (source.worker_id, source.layout, source.kv) == ("p", None, FIRST)
    assert decode(encode(message, 1)).message == message


def test_every_version_is_said_in_a_welcome_and_a_registration() -> None:
    assert decode(encode(Welcome("p", 1.0), 1)).message.control == CONTROL
    assert decode(encode(Register(INFO), 1)).message.worker.kv == KV


@pytest.mark.parametrize("version", [0, -1, BEFORE - 1, CONTROL.highest + 1, 2**64 - 1])
def test_another_version_is_refused_in_one_sentence(version: int) -> None:
    with pytest.raises(OtherVersion, match=f"^control protocol {version}; this process speaks 5 to 6$"):
        decode(msgpack.packb([version, 1, 0, 0, "a body of whatever form"]))
    with pytest.raises(OtherVersion, match=f"^KV protocol {version}; this process speaks 5 to 6$"):
        decode(msgpack.packb([version, 32, 0, 0, None]))


@pytest.mark.parametrize("version", [1, CONTROL.highest, 99])
def test_what_a_process_speaks_is_understood_in_any_version(version: int) -> None:
    frame = msgpack.packb([version, 12, 7, 9, [[1, 3]]])
    assert decode(frame).message == OtherVersions(Versions(1, 3))
