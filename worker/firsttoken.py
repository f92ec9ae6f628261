"""The note that a prefill worker leaves on a stream: the first token, for the decode worker to go on from."""

from __future__ import annotations

from dataclasses import dataclass

import msgpack

from mesh.errors import BadFrame

MAX_NOTE_BYTES = 256


@dataclass(frozen=True, slots=True)
class FirstToken:
    index: int
    token: int
    finish: str | None

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb((self.index, self.token, self.finish))
        return packed

    @staticmethod
    def unpack(payload: bytes) -> FirstToken:
        """Raises `BadFrame` and nothing else."""
        try:
            if len(payload) > MAX_NOTE_BYTES:
                raise BadFrame("a note over its limit")
            index, token, finish = msgpack.unpackb(payload, use_list=False)
        except Exception as error:
            raise BadFrame(f"not a first token: {type(error).__name__}") from None
        if type(index) is not int or type(token) is not int or not (finish is None or type(finish) is str):
            raise BadFrame("not a first token")
        return FirstToken(index, token, finish)
