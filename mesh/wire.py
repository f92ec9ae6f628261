"""Messages as bytes: frozen dataclasses to tagged MessagePack arrays and back, decoded by total functions.

A message class is a frozen dataclass whose fields are `int`, `float`, `bool`, `str`, `bytes`, `TokenIds`, another such
class, `X | None` or `tuple[X, ...]`. The coder of each class is built once from its annotations. Nothing but `BadFrame`
leaves `decode`, whatever the bytes; every length is bounded before anything is allocated for it.

There are two protocols, that of proxies and workers and that of KV endpoints, each with its own versions. A process
speaks a range of them and says which; two use the highest that both speak. The version is in every frame. A later one
only adds fields (`since`): in a frame of an earlier version they are left out, and take the value that they stood for
before they existed.
"""

from __future__ import annotations

import types
from array import array
from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from functools import partial
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import msgpack

from mesh.errors import BadFrame

KV_TAGS = 32
"""From this tag on, messages are of the KV protocol."""
MAX_FRAME_BYTES = 64 << 20
"""A control frame: 16 M tokens as int32 is far above any context we serve."""
MAX_ITEMS = 1 << 20
SCANNED_BYTES = 512
"""A longer frame is walked through once before anything is built from it: the parser makes room for each list as soon
as its length is read, and a thousand nested lists that only claim their items would take a thousand times the frame."""
MAX_STR_BYTES = 1 << 16

SCALARS = (int, bool, str, bytes)
"""Kinds of fields that msgpack gives as they are."""
TokenIds = Annotated[tuple[int, ...], "int32"]
"""Token ids; one int32 array on the wire."""


@dataclass(frozen=True, slots=True)
class Versions:
    """Of one protocol, that a process speaks."""

    lowest: int
    highest: int

    def common(self, other: Versions) -> int | None:
        """The highest that both speak."""
        version = min(self.highest, other.highest)
        return version if version >= max(self.lowest, other.lowest) else None

    def __str__(self) -> str:
        return f"{self.lowest} to {self.highest}"


CONTROL = Versions(5, 6)
KV = Versions(5, 6)
"""6 brought layouts that differ, and says what a process speaks; 5 is the first that is still understood."""


def since(*, control: int = 0, kv: int = 0, before: Any) -> dict[str, Any]:
    """The metadata of a field that exists from this version of a protocol on; `before` is what an earlier one means."""
    return {"since": {"control": control, "kv": kv}, "before": before}


M = TypeVar("M", bound=type)
Encoder = Callable[[Any], Any]
Decoder = Callable[[Any], Any]


@dataclass(frozen=True, slots=True)
class Envelope:
    """One received message; `sender` and `receiver` are incarnations (0: not known yet)."""

    sender: int
    receiver: int
    message: Any
    version: int
    """Of its protocol."""


class OtherVersion(BadFrame):
    """A frame in a version that this process does not speak."""


_by_tag: dict[int, tuple[type, dict[int, Decoder]]] = {}
_by_type: dict[type, tuple[int, int, dict[int, Encoder]]] = {}
"""Tag, the highest version, and the encoder of each."""
_OF_EVERY_VERSION: set[int] = set()
"""Tags of messages that never change."""


def message(tag: int, *, every_version: bool = False) -> Callable[[M], M]:
    """Class decorator: makes a frozen dataclass a top-level message with this tag.

    `every_version`: its form never changes, so that it is read whatever the version of its frame.
    """

    def register(cls: M) -> M:
        if tag in _by_tag:
            raise ValueError(f"tag {tag} is taken by {_by_tag[tag][0].__name__}")
        protocol, versions = ("kv", KV) if tag >= KV_TAGS else ("control", CONTROL)
        coders = {v: _coder(cls, protocol, v) for v in range(versions.lowest, versions.highest + 1)}
        _by_tag[tag] = (cls, {v: decoder for v, (_, decoder) in coders.items()})
        _by_type[cls] = (tag, versions.highest, {v: encoder for v, (encoder, _) in coders.items()})
        if every_version:
            _OF_EVERY_VERSION.add(tag)
        return cls

    return register


def encode(msg: Any, sender: int, receiver: int = 0, version: int = 0) -> bytes:
    """The frame of `msg`; `sender` and `receiver` are the two processes' incarnations. `version` 0: the highest."""
    tag, highest, encoders = _by_type[type(msg)]
    version = version or highest
    packed: bytes = msgpack.packb((version, tag, sender, receiver, encoders[version](msg)))
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
        version, tag, sender, receiver, body = outer
        if _int(tag) in _OF_EVERY_VERSION:
            version = CONTROL.highest
        protocol, versions = ("KV", KV) if tag >= KV_TAGS else ("control", CONTROL)
        if not versions.lowest <= _int(version) <= versions.highest:
            raise OtherVersion(f"{protocol} protocol {version}; this process speaks {versions}")
        decoder = _by_tag[tag][1][version]
        return Envelope(_int(sender), _int(receiver), decoder(body), version)
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


def _coder_of(kind: Any, protocol: str, version: int) -> tuple[Encoder, Decoder]:
    if kind == TokenIds:
        return _encode_tokens, _decode_tokens
    if kind in SCALARS:
        return _same, _exactly(kind)
    if kind is float:
        return _same, _float
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType) and len(args) == 2 and args[1] is type(None):
        inner_encode, inner_decode = _coder_of(args[0], protocol, version)
        return (
            lambda v: None if v is None else inner_encode(v),
            lambda v: None if v is None else inner_decode(v),
        )
    if origin is tuple and len(args) == 2 and args[1] is Ellipsis:
        item_encode, item_decode = _coder_of(args[0], protocol, version)

        def decode_items(value: Any) -> tuple[Any, ...]:
            if type(value) is not tuple:
                raise BadFrame("a list is missing")
            return tuple([item_decode(v) for v in value])

        return lambda v: [item_encode(i) for i in v], decode_items
    if origin is tuple:
        parts = [_coder_of(a, protocol, version) for a in args]

        def decode_parts(value: Any) -> tuple[Any, ...]:
            if type(value) is not tuple or len(value) != len(parts):
                raise BadFrame("a tuple of another length")
            return tuple(decode(v) for (_, decode), v in zip(parts, value, strict=True))

        return lambda v: [encode(i) for (encode, _), i in zip(parts, v, strict=True)], decode_parts
    return _coder(kind, protocol, version)


def _coder(cls: Any, protocol: str, version: int) -> tuple[Encoder, Decoder]:
    hints = get_type_hints(cls, include_extras=True)
    known = [f for f in fields(cls) if _since(f, protocol) <= version]
    coders = [_coder_of(hints[f.name], protocol, version) for f in known]
    pairs = [(f.name, encode) for f, (encode, _) in zip(known, coders, strict=True)]
    decoders = [decode for _, decode in coders]
    before = {f.name: f.metadata["before"] for f in fields(cls) if f not in known}
    make = partial(cls, **before) if before else cls

    kinds = tuple(hints[f.name] for f in known)
    if all(kind in SCALARS for kind in kinds):  # as most that is sent per block: one comparison for all fields

        def decode_scalars(value: Any) -> Any:
            if type(value) is not tuple or tuple(map(type, value)) != kinds:
                raise BadFrame(f"{cls.__name__}: {', '.join(k.__name__ for k in kinds)} expected")
            return make(*value)

        return lambda msg: [getattr(msg, n) for n, _ in pairs], decode_scalars

    def decode_fields(value: Any) -> Any:
        if type(value) is not tuple or len(value) != len(decoders):
            raise BadFrame(f"{cls.__name__}: wrong number of fields")
        return make(*[d(v) for d, v in zip(decoders, value, strict=True)])

    return lambda msg: [encode(getattr(msg, n)) for n, encode in pairs], decode_fields


def _since(one: Field[Any], protocol: str) -> int:
    version: int = one.metadata.get("since", {}).get(protocol, 0)
    return version
