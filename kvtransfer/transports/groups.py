"""Groups of two ranks, over gloo or NCCL: how one is built, what it moves, and how it ends.

    store   one TCPStore per holder, at an address of its own choosing; a group is a random prefix in it
    rank 0  the holder, which only sends; rank 1 the fetcher, which only receives

Groups are objects of their own and not torch's default group, so a worker is in as many as it has peers, and one that
breaks is thrown away. Every call here may wait, for a time that its group was given: threads of `pairs` make them.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C import _distributed_c10d as c10d

from kvtransfer.transports.base import TransportFault

WAIT_S = 4.0
"""To join a group in all, and for each parcel: under the protocol's `ANSWER_S`, because what a holder says next waits
behind a parcel that is still landing."""
MIN_WAIT_S = 0.01
NCCL_POLL_S = 0.0002
SENDER, RECEIVER, RANKS = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Backend:
    """What differs between gloo and NCCL."""

    name: str
    device: torch.device
    exact: bool
    """A receive must be as long as its send. gloo takes a shorter one, and ends the process on a longer one."""
    build: Callable[[c10d.Store, int, str, float], Any]
    """One of torch's process groups. Raises `RuntimeError`, after so many seconds at the latest."""
    finish: Callable[[c10d.Work, float], None]
    """Waits until a send or receive is done; raises `RuntimeError`, after so many seconds at the latest."""


def gloo() -> Backend:
    return Backend("gloo", torch.device("cpu"), False, _build_gloo, _finish_gloo)


def nccl(device: torch.device) -> Backend:
    return Backend("nccl", device, True, _build_nccl, _finish_nccl)


def _build_gloo(store: c10d.Store, rank: int, host: str, wait_s: float) -> Any:
    options = c10d.ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # its stub calls it Options
    options._timeout = timedelta(seconds=wait_s)
    options._devices = [c10d.ProcessGroupGloo.create_device(hostname=host)]
    return c10d.ProcessGroupGloo(store, rank, RANKS, options)


def _finish_gloo(work: c10d.Work, wait_s: float) -> None:
    work.wait(timedelta(seconds=wait_s))


def _build_nccl(store: c10d.Store, rank: int, host: str, wait_s: float) -> Any:
    """NCCL sets itself up with the first send, for which torch has no limit: if the peer dies just then, the pair fails
    in time, but its thread stays."""
    # Else torch's watchdog ends the whole process when a peer dies.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    return c10d.ProcessGroupNCCL(store, rank, RANKS, c10d.ProcessGroupNCCL.Options())


def _finish_nccl(work: c10d.Work, wait_s: float) -> None:
    """`wait` would only order streams, and for ever if the peer is gone."""
    limit = time.monotonic() + wait_s
    while not work.is_completed():
        if time.monotonic() > limit:
            raise RuntimeError("the peer neither sends nor receives")
        time.sleep(NCCL_POLL_S)
    work.wait()


class Group:
    """One group, joined. Used by one thread."""

    def __init__(self, backend: Backend, address: str, name: str, rank: int, own_host: str, wait_s: float) -> None:
        """Joins; raises `RuntimeError` when the other rank does not within `wait_s`."""
        limit = time.monotonic() + wait_s
        host, port = address.rsplit(":", 1)
        timeout = timedelta(seconds=wait_s)
        # A connection of its own: one store's calls wait for each other.
        store = c10d.TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timeout)
        self._backend = backend
        self._wait_s = wait_s
        left = max(MIN_WAIT_S, limit - time.monotonic())
        store.set_timeout(timedelta(seconds=left))
        self._group = backend.build(c10d.PrefixStore(name, store), rank, own_host, left)

    def send(self, parcel: Tensor) -> None:
        self._backend.finish(self._group.send([parcel.to(self._backend.device)], RECEIVER, 0), self._wait_s)

    def receive(self, buffer: Tensor, size: int) -> None:
        """`size` bytes into the beginning of `buffer`."""
        room = buffer[:size] if self._backend.exact else buffer
        landing = room if self._backend.device.type == "cpu" else torch.empty_like(room, device=self._backend.device)
        self._backend.finish(self._group.recv([landing], SENDER, 0), self._wait_s)
        if landing is not room:
            room.copy_(landing)

    def abort(self) -> None:
        """Ends it, whatever the other rank does."""
        self._group.abort()


class Meeting:
    """The store in which the groups of one holder are built; listens on `host` alone."""

    def __init__(self, host: str) -> None:
        """Raises `OSError` or `RuntimeError`."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.create_server((host, 0), family=family) as listener:
            port = listener.getsockname()[1]
            timeout = timedelta(seconds=WAIT_S)
            self._store = c10d.TCPStore(
                host,
                port,
                is_master=True,
                wait_for_workers=False,
                timeout=timeout,
                master_listen_fd=listener.detach(),
            )
        self.address = f"{host}:{port}"


def check_address(address: str) -> None:
    """Raises `TransportFault` for what is not HOST:PORT."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise TransportFault("not the address of a store")
