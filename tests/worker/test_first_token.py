"""The note that carries the first token."""

from __future__ import annotations

import msgpack
import pytest

from mesh.errors import BadFrame
from worker.firsttoken import FirstToken


@pytest.mark.parametrize("finish", [None, "stop"])
def test_a_first_token_survives_the_wire(finish: str | None) -> None:
    token = FirstToken(3, 128_000, finish)
    assert FirstToken.unpack(token.pack()) == token


@pytest.mark.parametrize(
    "payload",
    [b"", b"\xff", msgpack.packb((1, 2)), msgpack.packb(("a", 2, None)), msgpack.packb((1, 2, 3)), bytes(300)],
)
def test_anything_else_is_a_bad_frame(payload: bytes) -> None:
    with pytest.raises(BadFrame):
        FirstToken.unpack(payload)
