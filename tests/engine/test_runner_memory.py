"""How the KV pool is sized."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine import memory
from engine.memory import CPU_POOL_BLOCKS, CPU_POOL_BYTES, check_weights, count_blocks, free_bytes, is_roomy
from mesh.errors import EXIT_MEMORY, StartupError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MIB = 1 << 20


def test_what_fits_is_used() -> None:
    assert count_blocks(0, MIB, 100 * MIB + 5, CPU) == 100
    assert count_blocks(7, MIB, 100 * MIB, CPU) == 7


def test_a_cpu_pool_is_capped_by_bytes_and_blocks_unless_asked_for() -> None:
    assert count_blocks(0, MIB, 1 << 40, CPU) == CPU_POOL_BYTES // MIB
    assert count_blocks(0, 64, 1 << 40, CPU) == CPU_POOL_BLOCKS
    assert count_blocks(0, MIB, 1 << 40, GPU) == 1 << 20
    assert count_blocks(9 << 10, MIB, 1 << 40, CPU) == 9 << 10


@pytest.mark.parametrize(("wanted", "free"), [(0, MIB), (0, -5), (0, 2 * MIB - 1), (11, 10 * MIB)])
def test_too_little_memory_is_refused(wanted: int, free: int) -> None:
    with pytest.raises(StartupError, match=r"KV blocks need .* MiB, but only .* MiB") as caught:
        count_blocks(wanted, MIB, free, CPU)
    assert caught.value.exit_code == EXIT_MEMORY


def test_weights_must_fit() -> None:
    check_weights(4 * MIB, 4 * MIB)
    with pytest.raises(StartupError, match=r"the weights need 4\.0 MiB"):
        check_weights(4 * MIB, 4 * MIB - 1)


def test_free_memory_respects_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    host = free_bytes(CPU, 1.0)
    assert host > 0
    (tmp_path / "memory.max").write_text(f"{10 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{9 * MIB}\n")
    (tmp_path / "memory.stat").write_text(f"anon {4 * MIB}\ninactive_file {3 * MIB}\nactive_file {2 * MIB}\n")
    assert free_bytes(CPU, 0.5) == 3 * MIB
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU, 1.0) > 100 * MIB


def test_weights_are_kept_twice_where_a_pool_fits_beside_them() -> None:
    assert is_roomy(4 * MIB, 12 * MIB)
    assert not is_roomy(4 * MIB, 12 * MIB - 1)
