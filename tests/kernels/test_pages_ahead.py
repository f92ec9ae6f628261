"""Memory of a pool that is there before it is written."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kernels import pages_ahead
from kernels.blocks import allocate_pool
from kernels.pages_ahead import PagesAhead

MIB = 1 << 20
BLOCK_SHAPE = (2, 2, 2, 16, 1024)  # 512 KiB in float32
pytestmark = pytest.mark.skipif(
    tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (5, 14), reason="Linux before 5.14 cannot do it"
)


@pytest.fixture
def pool() -> Tensor:
    return allocate_pool((64, *BLOCK_SHAPE), torch.float32, torch.device("cpu"))


def taken(pool: Tensor) -> int:
    """Bytes of the pool that the system has handed out: `mmap` gave it a mapping, or a part of one, of its own."""
    there, total = pool.data_ptr(), 0
    for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
        start, stop = (int(edge, 16) for edge in mapping.split(" ", 1)[0].split("-"))
        if start <= there < stop:
            found = re.search(r"Rss: +(\d+) kB", mapping)
            assert found is not None
            total += int(found[1]) << 10
    return total


def test_a_small_pool_is_taken_whole_and_keeps_what_it_holds(pool: Tensor) -> None:
    pool[3] = 7.0
    before = taken(pool)
    ahead = PagesAhead(pool)
    ahead.wait()
    assert taken(pool) - before >= pool.nbytes - 4 * MIB
    assert (pool[3] == 7.0).all()
    assert (pool[4] == 0.0).all()


def test_memory_is_taken_as_blocks_are_reached(pool: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_ahead, "AHEAD_BYTES", 8 * MIB)
    monkeypatch.setattr(pages_ahead, "PIECE_BYTES", MIB)
    untouched = taken(pool)
    ahead = PagesAhead(pool)
    ahead.wait()
    first = taken(pool) - untouched
    assert 8 * MIB <= first <= 12 * MIB  # whole huge pages
    ahead.reach(4)
    ahead.wait()
    assert taken(pool) - untouched == first
    ahead.reach(20)
    ahead.wait()
    assert taken(pool) - untouched >= first + 4 * MIB
    ahead.reach(63)
    ahead.wait()
    assert taken(pool) - untouched >= first + 4 * MIB


def test_where_the_system_refuses_nothing_is_lost(pool: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages_ahead, "MADV_POPULATE_WRITE", 9999)
    ahead = PagesAhead(pool)
    ahead.wait()
    pool[63] = 1.0
    assert (pool[63] == 1.0).all()
