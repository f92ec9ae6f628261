"""Production's bounds, scaled to blocks of some bytes: with the real ones a window or a parcel would never be full."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import decode.role
import kvtransfer.fetcher
import kvtransfer.holder
import kvtransfer.holding_state
import kvtransfer.pace
import prefill.role
import proxy.routing.placement
import proxy.routing.router
import worker.steploop
from mesh.wire import Envelope
from proxy.routing.router import Policy
from tests.simulation.oracle import Violation
from tests.simulation.worker_host import BEAT_S

FETCH_ABOVE = 8
"""Tokens that another worker has more, from which on they are fetched from it; production's 256 would never be."""
HANDOFF_S = -1e-9
"""Computing takes no time here by a worker's own clock; a fetch takes less, or it would never be chosen."""
BLOCK_S = 0.001
"""For a block, until it was measured: less than the way there and back, so that some fetches are shared."""
LOGGERS = ("proxy", "worker", "decode", "prefill", "kvtransfer", "engine", "mesh")


class _Alarm(logging.Handler):
    """An exception that production survives and logs is a violation here."""

    def emit(self, record: logging.LogRecord) -> None:
        raise Violation(f"logged: {record.getMessage()}: {record.exc_info and record.exc_info[1]!r}")


@contextmanager
def replaced(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """For a while, attributes of modules and classes are others: (owner, name, value)."""
    before = [(owner, name, vars(owner)[name]) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)


def _wary(unseal: Callable[[bytes | memoryview], Envelope], damaged: Collection[bytes]) -> Callable[..., Envelope]:
    def watched(frame: bytes | memoryview) -> Envelope:
        envelope = unseal(frame)
        if bytes(frame) in damaged:
            raise Violation(f"a damaged {type(envelope.message).__name__} is believed")
        return envelope

    return watched


@contextmanager
def tiny(chance: random.Random, block_bytes: int, damaged: Collection[bytes]) -> Iterator[None]:
    """Windows, parcels, memory and recompute limits of some blocks; transfer ids from the seed; errors are loud, and so
    is belief in a frame that was `damaged`."""
    window, parcel = chance.choice((2, 4, 8)), chance.choice((1, 2, 4)) * block_bytes
    recompute = chance.choice((0, 8, 2048))
    alarm = _Alarm(logging.ERROR)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    with replaced(
        (kvtransfer.fetcher, "unseal", _wary(vars(kvtransfer.fetcher)["unseal"], damaged)),
        (kvtransfer.holder, "unseal", _wary(vars(kvtransfer.holder)["unseal"], damaged)),
        (kvtransfer.fetcher, "window_blocks", lambda _: window),
        (kvtransfer.holder, "parcel_bytes", lambda _: parcel),
        (kvtransfer.holding_state, "READY_BYTES", 16 * block_bytes),
        (proxy.routing.router, "RECOMPUTE_TOKENS", recompute),
        (proxy.routing.router, "HANDOFF_S", HANDOFF_S),
        (proxy.routing.placement, "Policy", partial(Policy, fetch_above=FETCH_ABOVE)),
        (worker.steploop, "BEAT_EVERY_S", BEAT_S),
        (kvtransfer.pace, "SHARED_BYTES_PER_S", block_bytes / BLOCK_S),
        (kvtransfer.pace, "MEASURED_BYTES", 4 * block_bytes),
        (decode.role, "new_transfer_id", lambda: chance.randbytes(16)),
        (prefill.role, "new_transfer_id", lambda: chance.randbytes(16)),
    ):
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
                logger.addHandler(alarm)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
                logger.removeHandler(alarm)
