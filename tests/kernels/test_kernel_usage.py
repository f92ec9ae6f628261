"""What the Triton kernels take of a Hopper multiprocessor, compiled without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

pytest.importorskip("triton")

from benchmarks.kernels import Usage, report, resource_usage

FITS = Usage("attend_tile", "32/8x128 page 16", 8, 160, 0, 98560, "24 wgmma.mma_async")


@pytest.mark.timeout(600)
def test_no_kernel_spills_on_sm_90() -> None:
    """In a process of its own: in this one Triton interprets."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in done.stdout.splitlines() if "|" in line]
    products = {(kernel, shape): product for kernel, shape, *_, product in rows}
    for shape in ("32/8x128 page 16", "32/8x128 page 64", "14/2x64 page 16", "32/8x64 page 64"):
        assert "wgmma" in products["attend_tile", shape]
        assert "mma.sync" in products["attend_split", shape]
    assert {kernel for kernel, _ in products} >= {
        "combine",
        "rotate_and_write",
        "rms_norm",
        "silu_and_mul",
        "draw",
        "copy",
    }


def test_a_spill_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert report([FITS]) == 0
    assert report([FITS, replace(FITS, kernel="attend_split", spilled=8)]) == 1
    assert "spills registers: attend_split (32/8x128 page 16)" in capsys.readouterr().err


def test_registers_and_stack_are_read() -> None:
    assert resource_usage(" Function f:\n  REG:255 STACK:240 SHARED:0") == (255, 240)
    with pytest.raises(ValueError, match="no resource usage"):
        resource_usage("nothing")
