"""Memory of a CUDA device that another process can open, by a handle that is plain bytes.

The handle is what torch's storages are shared by (`cudaIpcMemHandle` and its bookkeeping), with the device's UUID,
since the two processes may count their devices differently, and the handle of an event. Copies are enqueued on a stream
of the slab's own. A writer records the event behind each write; a reader's stream waits for it. Not run yet: there was
no GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import msgpack
import numpy as np
import torch

from kvtransfer.transports.base import Payload, TransportFault
from kvtransfer.transports.pool import Bytes, fill

device: Any = torch.cuda
"""Which torch does not annotate."""
Done = Callable[[], bool]
"""Whether a copy that was begun is finished; not asked again once it was. Raises `RuntimeError`."""
_FIELDS: tuple[type, ...] = (str, bytes, bytes, int, int, bytes, int, bytes, bool)
"""Device, event, and what `_share_cuda_` gives after the device."""


class Slab(Protocol):
    """One range of device memory, own or opened."""

    @property
    def size(self) -> int: ...

    @property
    def handle(self) -> bytes: ...

    def write(self, at: int, parts: Sequence[Payload]) -> None:
        """Begins to copy `parts`, one after another; a `read` by whoever hears of it is after it."""

    def read(self, at: int, target: Bytes) -> Done:
        """Begins to fill `target`."""

    def close(self) -> None: ...


class Memory(Protocol):
    def own(self, size: int) -> Slab:
        """Raises `RuntimeError` when there is no room."""

    def open(self, handle: bytes) -> Slab:
        """Another process's slab. Raises `TransportFault`."""


class CudaMemory:
    """See `Memory`."""

    def __init__(self, where: torch.device) -> None:
        self._where = where

    def own(self, size: int) -> Slab:
        slab = torch.empty(size, dtype=torch.uint8, device=self._where)
        event = device.Event(interprocess=True)
        return CudaSlab(slab, event, _handle(slab, event))

    def open(self, handle: bytes) -> Slab:
        uuid, event_handle, *shared = decode(handle)
        for index in range(device.device_count()):
            if _uuid(index) == uuid:
                break
        else:
            raise TransportFault("the sender's device is not visible here")
        try:
            storage = torch.UntypedStorage._new_shared_cuda(index, *shared)
            event = device.Event.from_ipc_handle(torch.device("cuda", index), event_handle)
        except RuntimeError as error:
            raise TransportFault(str(error).partition("\n")[0]) from None
        slab = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)
        return CudaSlab(slab, event, handle)


def _uuid(index: int) -> str:
    return str(device.get_device_properties(index).uuid)


def _handle(slab: torch.Tensor, event: Any) -> bytes:
    index, *shared = cast(Any, slab.untyped_storage())._share_cuda_()
    packed: bytes = msgpack.packb([_uuid(index), event.ipc_handle(), *shared])
    return packed


def decode(handle: bytes) -> list[Any]:
    """The fields of a handle. Raises `TransportFault`."""
    try:
        fields = msgpack.unpackb(handle)
    except ValueError:
        raise TransportFault("not the handle of device memory") from None
    if not isinstance(fields, list) or [type(f) for f in fields] != list(_FIELDS):
        raise TransportFault("not the handle of device memory")
    return fields


class CudaSlab:
    """See `Slab`. Copies go through pinned buffers, so that they do not wait; torch keeps one until its copy ends."""

    def __init__(self, slab: torch.Tensor, event: Any, handle: bytes) -> None:
        self.handle = handle
        self.size = slab.numel()
        self._slab = slab
        self._event = event
        self._stream = device.Stream(slab.device)

    def write(self, at: int, parts: Sequence[Payload]) -> None:
        size = sum(len(part) for part in parts)
        buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        fill(buffer.numpy(), parts)
        with device.stream(self._stream):
            self._slab[at : at + size].copy_(buffer, non_blocking=True)
            self._event.record(self._stream)

    def read(self, at: int, target: Bytes) -> Done:
        buffer = torch.empty(len(target), dtype=torch.uint8, pin_memory=True)
        copied = device.Event()
        with device.stream(self._stream):
            self._event.wait(self._stream)
            buffer.copy_(self._slab[at : at + len(target)], non_blocking=True)
            copied.record(self._stream)

        def done() -> bool:
            if not copied.query():
                return False
            np.copyto(target, buffer.numpy())
            return True

        return done

    def close(self) -> None:
        self._stream.synchronize()  # what it still copies must not lose its memory
        self._slab = self._slab.new_empty(0)
