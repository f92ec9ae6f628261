"""What each Triton kernel takes of a Hopper multiprocessor: registers, spilled bytes and shared memory, without a GPU.

    python -m benchmarks.kernels

The functions that launch the kernels are called with a model's shapes and tensors that have no memory, and Triton
compiles for sm_90 whatever they would have launched. Exits with 1 when a kernel spills registers to memory. What the
figures mean for speed is only known on a device.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.measure import table
from kernels.triton.activation import silu_and_mul
from kernels.triton.attention import paged_attention
from kernels.triton.blocks import copy_blocks, gather_blocks
from kernels.triton.metadata import PagedMetadata
from kernels.triton.norm import add_rms_norm, rms_norm
from kernels.triton.rotary import rotate_and_write
from kernels.triton.sampling import FIELDS, draw_packed

HOPPER = GPUTarget("cuda", 90, 32)
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DTYPE = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Usage:
    """Of one compiled kernel."""

    kernel: str
    shape: str
    warps: int
    registers: int
    """Per thread, of 255."""
    spilled: int
    """Bytes per thread that lie in memory for want of registers."""
    shared: int
    """Bytes per program."""
    products: str
    """Instructions that multiply matrices: `wgmma` are those that only Hopper has."""


@dataclass(frozen=True, slots=True)
class Model:
    """The shape of one model's attention."""

    heads: int
    kv_heads: int
    dim: int
    block_tokens: int
    window: int = 0

    def __str__(self) -> str:
        window = f" window {self.window}" if self.window else ""
        return f"{self.heads}/{self.kv_heads}x{self.dim} page {self.block_tokens}{window}"


MODELS = (
    Model(32, 8, 128, 16),
    Model(32, 8, 128, 64),
    Model(14, 2, 64, 16),
    Model(32, 8, 64, 64),
    Model(32, 32, 128, 16),
    Model(32, 8, 128, 16, window=4096),
)
"""Llama 3.1 8B twice, Qwen2.5 0.5B, Llama 3.2 1B, Llama 2 7B, Mistral 7B v0.1."""
HIDDEN, INNER, VOCAB = 4096, 14336, 128256


class NoDevice:
    """As much of a driver as compiling asks for."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return HOPPER


def compile_instead_of_launching() -> list[Any]:
    """From now on, and for good; the list grows by what launches compile."""
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        compiled.append(run(self, *args, grid=grid, warmup=True, **options))

    driver.set_active(NoDevice())
    JITFunction.run = compile_only
    return compiled


def usage(kernel: Any, shape: str) -> Usage:
    """What the compiled `kernel` takes, as its machine code declares it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([CUOBJDUMP, "-res-usage", file.name], check=True, capture_output=True, text=True)
    registers, stack = resource_usage(done.stdout)
    code = kernel.asm["ptx"]
    products = [f"{code.count(name + '.')} {name}" for name in ("wgmma.mma_async", "mma.sync") if f"{name}." in code]
    return Usage(
        kernel=kernel.metadata.name.lstrip("_"),
        shape=shape,
        warps=kernel.metadata.num_warps,
        registers=registers,
        spilled=stack,
        shared=kernel.metadata.shared,
        products=", ".join(products),
    )


def resource_usage(text: str) -> tuple[int, int]:
    """Registers and stack bytes of `cuobjdump -res-usage`. A Triton kernel has no use for a stack but spilling."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"no resource usage in {text!r}")
    return int(found[1]), int(found[2])


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ints(*shape: int) -> Tensor:
    return empty(*shape, dtype=torch.int32)


def metadata(model: Model, decode_rows: int, tiles: int, splits: int) -> PagedMetadata:
    return PagedMetadata(
        positions=ints(64),
        slots=ints(64),
        row_starts=ints(9),
        kv_tokens=ints(8),
        tables=ints(8, 256),
        tile_rows=ints(tiles),
        tile_starts=ints(tiles),
        tile_queries=128 // (model.heads // model.kv_heads),
        decode_rows=decode_rows,
        splits={model.window: splits},
    )


def launches() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kernel in the forms that serving uses, with the name of its shape."""
    for model in MODELS:
        pool = empty(1024, 32, 2, model.kv_heads, model.block_tokens, model.dim)
        q, kv_heads = empty(64, model.heads, model.dim), model.kv_heads
        for rows, tiles, splits in ((8, 0, 1), (8, 0, 9), (0, 4, 0)):
            step = metadata(model, rows, tiles, splits)
            yield str(model), partial(paged_attention, q, pool, 0, step, model.window)
        qkv = empty(64, model.heads + 2 * kv_heads, model.dim)
        cos = empty(64, 1, model.dim)
        yield str(model), partial(rotate_and_write, qkv, cos, cos, pool, 0, step)
    x, weight, blocks = empty(64, HIDDEN), empty(HIDDEN), empty(8, dtype=torch.int64)
    yield f"{HIDDEN}", partial(rms_norm, x, weight, 1e-6)
    yield f"{HIDDEN} + residual", partial(add_rms_norm, x, x, weight, 1e-6)
    yield "40x128", partial(rms_norm, empty(64, 48, 128)[:, :40], empty(40, 128), 1e-6)
    yield f"{INNER}", partial(silu_and_mul, empty(64, 2 * INNER))
    logits, numbers = empty(1, VOCAB, dtype=torch.float32), empty(1, FIELDS, dtype=torch.float64)
    yield f"{VOCAB}", partial(draw_packed, logits, numbers)
    yield "gather", partial(gather_blocks, pool, blocks)
    yield "copy", partial(copy_blocks, pool, blocks, blocks)


def measure() -> list[Usage]:
    compiled = compile_instead_of_launching()
    found = []
    for shape, launch in launches():
        launch()
        found += [usage(kernel, shape) for kernel in compiled]
        compiled.clear()
    return list(dict.fromkeys(found))


def report(found: Sequence[Usage]) -> int:
    """Prints the table; 1 when something spills."""
    print(f"triton {triton.__version__}, {DTYPE}, sm_{HOPPER.arch}\n")
    rows = [[str(value) for value in astuple(u)] for u in found]
    print(table(["kernel", "shape", "warps", "registers", "spilled bytes", "shared bytes", "matrix products"], rows))
    spilling = [f"{u.kernel} ({u.shape})" for u in found if u.spilled]
    if spilling:
        print(f"\nspills registers: {', '.join(spilling)}", file=sys.stderr)
    return 1 if spilling else 0


def main() -> int:
    return report(measure())


if __name__ == "__main__":
    sys.exit(main())
