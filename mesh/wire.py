"""Messages as bytes: frozen dataclasses to tagged MessagePack arrays and back, decoded by total functions.

A message class is a frozen dataclass whose fields are `int`, `float`, `bool`, `str`, `bytes`, `TokenIds`, another such
class, `X | None` or `tuple[X, ...]`. The coder of each class is built once from its annotations. Nothing but `BadFrame`
leaves `decode`, whatever the bytes; every length is bounded before anything is allocated for it.
"""

from __future__ import annotations

import types
from array import array
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgpack

from mesh.errors import BadFrame

PROTOCOL = 5
MAX_FRAME_BYTES = 64 << 20
"""A control frame: 16 M tokens as int32 is far above any context we serve."""
MAX_ITEMS = 1 << 20
SCANNED_BYTES = 512
"""A longer frame is walked through once before anything is built from it: the parser makes room for each list as soon
as its length is read, and a thousand nested lists that only claim their items would take a thousand times the frame."""
MAX_STR_BYTES = 1 << 16

TokenIds = Annotated[tuple[int, ...], "int32"]
"""Token ids; one int32 array on the wire."""

M = TypeVar("M", bound=type)
Encoder = Callable[[Any], Any]
Decoder = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Envelope:
    """One received message; `sender` and `receiver` are incarnations (0: not known yet)."""

    sender: int
    receiver: int
    message: Any


_by_tag: dict[int, tuple[type, Decoder]] = {}
_by_type: dict[type, tuple[int, Encoder]] = {}


def message(tag: int) -> Callable[[M], M]:
    """Class decorator: makes a frozen dataclass a top-level message with this tag."""

    def register(cls: M) -> M:
        if tag in _by_tag:
            raise ValueError(f"tag {tag} is taken by {_by_tag[tag][0].__name__}")
        encoder, decoder = _coder(cls)
        _by_tag[tag] = (cls, decoder)
        _by_type[cls] = (tag, encoder)
        return cls

    return register


def encode(msg: Any, sender: int, receiver: int = 0) -> bytes:
    """The frame of `msg`; `sender` and `receiver` are the two processes' incarnations."""
    tag, encoder = _by_type[type(msg)]
    packed: bytes = msgpack.packb((PROTOCOL, tag, sender, receiver, encoder(msg)))
    return packed


def decode(frame: bytes | memoryview) -> Envelope:
    """The message in `frame`; raises `BadFrame` and nothing else."""
    if len(frame) > MAX_FRAME_BYTES:
        raise BadFrame(f"a frame of {len(frame)} bytes is over the limit of {MAX_FRAME_BYTES}")
    try:
        if len(frame) > SCANNED_BYTES:
            scanner = msgpack.Unpacker(read_size=len(frame), max_buffer_size=MAX_FRAME_BYTES)
            scanner.feed(frame)
            scanner.skip()  # raises unless every item is there
        outer = msgpack.unpackb(
            frame,
            use_list=False,
            strict_map_key=True,
            max_map_len=0,
            max_ext_len=0,
            max_array_len=MAX_ITEMS,
            max_str_len=MAX_STR_BYTES,
            max_bin_len=MAX_FRAME_BYTES,
        )
        protocol, tag, sender, receiver, body = outer
        if protocol != PROTOCOL:
            raise BadFrame(f"protocol {protocol!r}; this process speaks {PROTOCOL}")
        _, decoder = _by_tag[tag]
        return Envelope(_int(sender), _int(receiver), decoder(body))
    except BadFrame:
        raise
    except Exception as error:  # whatever a hostile frame provokes is one kind of refusal
        raise BadFrame(f"not a message: {type(error).__name__}") from None


def _int(value: Any) -> int:
    if type(value) is not int:
        raise BadFrame("an integer is missing")
    return value


def _same(value: Any) -> Any:
    return value


def _exactly(kind: type) -> Decoder:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise BadFrame(f"{kind.__name__} expected, {type(value).__name__} found")
        return value

    return check


def _float(value: Any) -> float:
    if type(value) not in (float, int):
        raise BadFrame(f"float expected, {type(value).__name__} found")
    return float(value)


def _encode_tokens(value: tuple[int, ...]) -> bytes:
    return array("i", value).tobytes()


def _decode_tokens(value: Any) -> tuple[int, ...]:
    if type(value) is not bytes or len(value) % 4:
        raise BadFrame("token ids expected")
    ids = array("i")
    ids.frombytes(value)
    return tuple(ids)


def _coder_of(kind: Any) -> tuple[Encoder, Decoder]:
    if kind == TokenIds:
        return _encode_tokens, _decode_tokens
    if kind in (int, bool, str, bytes):
        return _same, _exactly(kind)
    if kind is float:
        return _same, _float
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType) and len(args) == 2 and args[1] is type(None):
        inner_encode, inner_decode = _coder_of(args[0])
        return (
            lambda v: None if v is None else inner_encode(v),
            lambda v: None if v is None else inner_decode(v),
        )
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        item_encode, item_decode = _coder_of(args[0])

        def decode_items(value: Any) -> tuple[Any, ...]:
            if type(value) is not tuple:
                raise BadFrame("a list is missing")
            return tuple([item_decode(v) for v in value])

        return lambda v: [item_encode(i) for i in v], decode_items
    if origin is tuple:
        parts = [_coder_of(a) for a in args]

        def decode_parts(value: Any) -> tuple[Any, ...]:
            if type(value) is not tuple or len(value) != len(parts):
                raise BadFrame("a tuple of another length")
            return tuple(decode(v) for (_, decode), v in zip(parts, value, strict=True))

        return lambda v: [encode(i) for (encode, _), i in zip(parts, v, strict=True)], decode_parts
    return _coder(kind)


def _coder(cls: Any) -> tuple[Encoder, Decoder]:
    hints = get_type_hints(cls, include_extras=True)
    names = [f.name for f in fields(cls)]
    coders = [_coder_of(hints[n]) for n in names]
    pairs = [(n, encode) for n, (encode, _) in zip(names, coders, strict=True)]
    decoders = [decode for _, decode in coders]

    def decode_fields(value: Any) -> Any:
        if type(value) is not tuple or len(value) != len(decoders):
            raise BadFrame(f"{cls.__name__}: wrong number of fields")
        return cls(*[d(v) for d, v in zip(decoders, value, strict=True)])

    return lambda msg: [encode(getattr(msg, n)) for n, encode in pairs], decode_fields
