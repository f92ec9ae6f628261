"""How many KV blocks a device has room for."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from engine.model.config import ModelConfig
from mesh.errors import EXIT_MEMORY, StartupError

MIN_BLOCKS = 2
"""One to read and one to write: with less, not even two short requests could follow each other's blocks."""
CPU_POOL_BYTES = 4 << 30
"""Largest pool that is sized by itself on a CPU: several workers usually share the host, each sees the same free
memory, and pages are only taken from the system as they come into use. `--kv-blocks` goes beyond."""
CPU_POOL_BLOCKS = 1 << 16
"""Likewise for tiny models, whose blocks are small but cost bookkeeping each: a million tokens at 16 per block."""
ROOMY = 3
"""Times the weights: themselves, a second copy, and a pool as large."""
CGROUP = Path("/sys/fs/cgroup")


def free_bytes(device: torch.device, utilization: float) -> int:
    """Bytes that may still be used: of a CPU's free memory the share `utilization`, of a GPU's whole memory that
    share less what is taken."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(total * utilization) - (total - free)
    return int(_free_host_bytes() * utilization)


def count_blocks(wanted: int, block_bytes: int, free: int, device: torch.device) -> int:
    """The pool's size in blocks: `wanted`, or (0) what fits into `free` bytes.

    Raises `StartupError` with `EXIT_MEMORY` when `wanted` blocks, or the fewest a pool can work with, do not fit.
    """
    fits = max(0, free) // block_bytes
    if wanted:
        if wanted > fits:
            raise _no_memory(f"{wanted} KV blocks need {_mib(wanted * block_bytes)}", free)
        return wanted
    if fits < MIN_BLOCKS:
        raise _no_memory(f"{MIN_BLOCKS} KV blocks need {_mib(MIN_BLOCKS * block_bytes)}", free)
    if device.type == "cuda":
        return fits
    return max(MIN_BLOCKS, min(fits, CPU_POOL_BYTES // block_bytes, CPU_POOL_BLOCKS))


def check_weights(size: int, free: int) -> None:
    """Raises `StartupError` with `EXIT_MEMORY` when weights of `size` bytes cannot fit into `free`."""
    if size > free:
        raise _no_memory(f"the weights need {_mib(size)}", free)


def is_roomy(weights: int, free: int) -> bool:
    """Whether weights of that many bytes may be kept twice in `free`."""
    return ROOMY * weights <= free


def activation_bytes(config: ModelConfig, num_tokens: int, itemsize: int) -> int:
    """Peak memory of one step over `num_tokens`: a layer's widest tensors, and logits for as many rows as sample."""
    heads = config.num_heads + 2 * config.num_kv_heads
    width = 3 * config.intermediate_size + 4 * config.hidden_size + 3 * heads * config.head_dim
    logits = min(num_tokens, 256) * config.vocab_size * (itemsize + 2 * 4)
    return num_tokens * width * itemsize + logits


def _no_memory(what: str, free: int) -> StartupError:
    return StartupError(f"{what}, but only {_mib(max(0, free))} of memory are free for it", EXIT_MEMORY)


def _mib(size: int) -> str:
    return f"{size / (1 << 20):,.1f} MiB"


def _free_host_bytes() -> int:
    """What the system could give without swapping, within the container's limit."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        free = _fields(Path("/proc/meminfo"))["MemAvailable:"] << 10
        limit = int((CGROUP / "memory.max").read_text())
        # Cached files count as used, and the weights were just read; the system drops them for us.
        stat = _fields(CGROUP / "memory.stat")
        used = int((CGROUP / "memory.current").read_text()) - stat["inactive_file"] - stat["active_file"]
        free = min(free, limit - used)
    except (OSError, ValueError, KeyError):
        # No such file, or "max" for a limit: what is known so far holds.
        pass
    return max(0, free)


def _fields(path: Path) -> dict[str, int]:
    """A file of lines that begin with a name and a whole number."""
    lines = (line.split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) >= 2}
