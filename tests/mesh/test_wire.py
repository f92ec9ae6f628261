"""Control messages on the wire: every message survives, and no bytes but a message's are one."""

from __future__ import annotations

import random
import tracemalloc
import types
from typing import Any, Union, get_args, get_origin, get_type_hints

import msgpack
import pytest

from mesh import messages, wire
from mesh.errors import BadFrame
from mesh.wire import TokenIds, decode, encode

MESSAGES = [cls for cls, _ in wire._by_tag.values() if cls.__module__ == messages.__name__]


def filled(kind: Any, chance: random.Random) -> Any:
    """A random value of a message's field."""
    if kind == TokenIds:
        return tuple(chance.randrange(-(2**31), 2**31) for _ in range(chance.randrange(5)))
    simple: dict[Any, Any] = {
        int: chance.choice((0, -1, 2**63, 2**64 - 1, -(2**63), chance.randrange(1000))),
        float: chance.choice((0.0, -0.0, 1e300, float("inf"), chance.random())),
        bool: chance.random() < 0.5,
        str: chance.choice(("", "é🙂\x00", "x" * 300)),
        bytes: chance.randbytes(chance.choice((0, 16, 300))),
    }
    if kind in simple:
        return simple[kind]
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return filled(args[0], chance) if chance.random() < 0.7 else None
    if origin is tuple and args[1:] == (Ellipsis,):
        return tuple(filled(args[0], chance) for _ in range(chance.randrange(4)))
    if origin is tuple:
        return tuple(filled(a, chance) for a in args)
    hints = get_type_hints(kind, include_extras=True)
    return kind(**{name: filled(hint, chance) for name, hint in hints.items()})


def mutated(frame: bytes, chance: random.Random) -> bytes:
    """`frame` with some of its bytes changed, cut, doubled or torn out."""
    data = bytearray(frame)
    for _ in range(chance.randrange(1, 4)):
        at = chance.randrange(len(data) + 1)
        match chance.randrange(4):
            case 0:
                del data[at:]
            case 1:
                data[at:at] = chance.randbytes(chance.randrange(1, 5))
            case 2:
                del data[at : at + chance.randrange(1, 9)]
            case _:
                data[at : at + 1] = chance.randbytes(1)
    return bytes(data)


def test_all_messages_are_here() -> None:
    assert {cls.__name__ for cls in MESSAGES} >= {"Register", "Beat", "Prefill", "Decode", "Abort", "TokenBatch"}


@pytest.mark.parametrize("cls", MESSAGES)
def test_every_message_survives_the_wire(cls: type) -> None:
    chance = random.Random(cls.__name__)
    for _ in range(50):
        message = filled(cls, chance)
        envelope = decode(encode(message, 7, 9))
        assert (envelope.sender, envelope.receiver) == (7, 9)
        assert envelope.message == message
        assert type(envelope.message) is cls


@pytest.mark.parametrize("cls", MESSAGES)
def test_changed_bytes_are_another_message_or_a_bad_frame(cls: type) -> None:
    """Whatever decodes is a whole message: encoding it again gives the same message."""
    chance = random.Random(cls.__name__)
    for _ in range(200):
        frame = mutated(encode(filled(cls, chance), 1), chance)
        try:
            envelope = decode(frame)
        except BadFrame:
            continue
        # By form, not by value: a mutated float may be NaN, which equals nothing.
        again = encode(envelope.message, envelope.sender, envelope.receiver)
        assert repr(decode(again)) == repr(envelope)


def test_noise_is_a_bad_frame() -> None:
    chance = random.Random(1)
    for _ in range(3000):
        with pytest.raises(BadFrame):
            decode(chance.randbytes(chance.randrange(60)))


@pytest.mark.parametrize("value", [None, True, 1, "x", b"x", [], [1], [[]] * 5, {"a": 1}, 1.5])
@pytest.mark.parametrize("cls", MESSAGES)
def test_a_body_of_another_form_is_a_bad_frame(cls: type, value: object) -> None:
    tag = wire._by_type[cls][0]
    with pytest.raises(BadFrame):
        decode(msgpack.packb([wire.CONTROL.highest, tag, 0, 0, value]))


@pytest.mark.parametrize(
    "outer",
    [
        [wire.CONTROL.highest + 1, 4, 0, 0, ["p"]],
        [wire.CONTROL.highest, 999, 0, 0, ["p"]],
        [wire.CONTROL.highest, [], 0, 0, ["p"]],
        [wire.CONTROL.highest, 4, "0", 0, ["p"]],
        [wire.CONTROL.highest, 4, True, 0, ["p"]],
        [wire.CONTROL.highest, 4, 0, 0],
        [wire.CONTROL.highest, 4, 0, 0, ["p"], 0],
        [wire.CONTROL.highest, 4, 0, 0, ["p", "q"]],
        {"a": 1},
    ],
)
def test_an_envelope_of_another_form_is_a_bad_frame(outer: object) -> None:
    assert decode(msgpack.packb([wire.CONTROL.highest, 4, 0, 0, ["p"]])).message == messages.ProxyBeat("p")
    with pytest.raises(BadFrame):
        decode(msgpack.packb(outer))


def test_another_protocol_is_named() -> None:
    with pytest.raises(
        BadFrame, match=f"control protocol {wire.CONTROL.highest + 1}; this process speaks {wire.CONTROL}"
    ):
        decode(msgpack.packb([wire.CONTROL.highest + 1, 4, 0, 0, ["p"]]))


@pytest.mark.parametrize(
    "frame",
    [
        b"\xdd\xff\xff\xff\xff",
        b"\xdb\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
        b"\x91" * 100_000,
        b"\xc1",
        b"",
    ],
)
def test_a_frame_that_promises_too_much_is_refused(frame: bytes) -> None:
    with pytest.raises(BadFrame):
        decode(frame)


def test_a_frame_over_the_limit_is_not_read() -> None:
    with pytest.raises(BadFrame, match="over the limit"):
        decode(memoryview(bytes(wire.MAX_FRAME_BYTES + 1)))


def test_half_a_token_is_refused() -> None:
    chance = random.Random(2)
    message = filled(messages.Prefill, chance)
    outer = msgpack.unpackb(encode(message, 1))
    outer[4][2] = b"\x00" * 5
    with pytest.raises(BadFrame):
        decode(msgpack.packb(outer))


@pytest.mark.parametrize(("items", "depth"), [(5000, 1000), (20_000, 300), (1 << 20, 100)])
def test_lists_that_only_claim_their_items_take_no_memory(items: int, depth: int) -> None:
    frame = (b"\xdd" + items.to_bytes(4, "big")) * depth + bytes(items)

    def peak() -> int:
        tracemalloc.start()
        with pytest.raises(BadFrame):
            decode(frame)
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    # what decoding takes is always the same, but threads that other tests left may take some at the same time
    assert min(peak() for _ in range(3)) < (1 << 18) + 2 * len(frame)
