"""Which transports an endpoint has, and which of them a transfer uses."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch.cuda import nccl

from kvtransfer.messages import Offer
from kvtransfer.transports import cuda, groups, inline, local, shm
from kvtransfer.transports.base import Transport, parcel_bytes
from kvtransfer.transports.collective import CollectiveTransport
from kvtransfer.transports.devicememory import CudaMemory
from mesh.curve import TCP, is_ipc, is_loopback
from mesh.errors import EXIT_USAGE, StartupError

log = logging.getLogger(__name__)

GLOO, NCCL = "gloo", "nccl"
NAMES = (local.NAME, cuda.NAME, shm.NAME, inline.NAME, NCCL, GLOO)
LOOPBACK = "127.0.0.1"


def open_transports(
    names: Sequence[str],
    *,
    host: str,
    block_bytes: int,
    exchange: local.Exchange | None,
    bind: str = "",
    device: str = "cpu",
) -> dict[str, Transport]:
    """By name, in order of preference; `zmq` is always there, as the last resort. Raises `StartupError`.

    `bind`: where the endpoint listens for fetches.
    """
    found: dict[str, Transport] = {}
    size = parcel_bytes(block_bytes)
    for name in names:
        if name not in NAMES:
            raise StartupError(f"unknown KV transport {name!r}; known are {', '.join(NAMES)}", EXIT_USAGE)
        if name == local.NAME and exchange is not None:
            found[name] = local.LocalTransport(exchange)
        elif name == shm.NAME:
            try:
                found[name] = shm.ShmTransport(host, size)
            except OSError as error:
                log.warning("no shared memory (%s): KV blocks go by ZeroMQ", error)
        elif name == inline.NAME:
            found[name] = inline.InlineTransport(size)
        elif why := unfit(name, device):
            log.warning("no KV transport %s: %s", name, why)
        elif name == cuda.NAME:
            try:
                found[name] = cuda.CudaTransport(CudaMemory(torch.device(device)), host, size)
            except OSError as error:
                log.warning("no KV transport %s: %s", name, error)
        elif name == NCCL:
            if not is_loopback(bind):
                log.warning("NCCL does not encrypt: KV blocks cross the network readable, and unproved")
            version = ".".join(map(str, nccl.version()))  # type: ignore[no-untyped-call]
            backend = groups.nccl(torch.device(device))
            found[name] = CollectiveTransport(backend, version, listening_host(bind), size)
        elif name == GLOO:
            if bind and not is_ipc(bind) and not is_loopback(bind):
                raise StartupError("gloo does not encrypt, so it is for workers on loopback or ipc", EXIT_USAGE)
            found[name] = CollectiveTransport(groups.gloo(), host, LOOPBACK, size)
    found.setdefault(inline.NAME, inline.InlineTransport(size))
    return found


def unfit(name: str, device: str) -> str:
    """Why a worker on `device` cannot use the transport `name`; empty: nothing is known against it."""
    if name in (cuda.NAME, NCCL) and not device.startswith("cuda"):
        return "it is for workers on CUDA devices"
    if name == NCCL and not dist.is_nccl_available():
        return "this torch has no NCCL"
    if name == GLOO and not dist.is_gloo_available():
        return "this torch has no gloo"
    return ""


def listening_host(bind: str) -> str:
    """Where others reach this endpoint, whatever the port."""
    found = TCP.fullmatch(bind)
    return found[1].strip("[]") if found is not None else LOOPBACK


def offers(transports: Mapping[str, Transport]) -> tuple[Offer, ...]:
    """What a fetcher says of itself."""
    return tuple(Offer(t.name, t.scope) for t in transports.values())


def choose(wanted: Sequence[Offer], transports: Mapping[str, Transport]) -> Transport:
    """The fetcher's most preferred transport that this holder shares with it."""
    for offer in wanted:
        mine = transports.get(offer.transport)
        if mine is not None and mine.scope == offer.scope:
            return mine
    return transports[inline.NAME]
