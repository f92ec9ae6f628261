"""Whether Triton kernels can run here; importing this skips a module of tests where they cannot."""

from __future__ import annotations

import numpy
import pytest
import torch

triton = pytest.importorskip("triton")


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def interpreter_works(triton_version: str, numpy_version: str) -> bool:
    """Triton below 3.8 makes a loop's bounds numbers in a way that numpy 2.4 refuses."""
    return _version(triton_version) >= (3, 8) or _version(numpy_version) < (2, 4)


INTERPRETED: bool = triton.knobs.runtime.interpret
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")

if INTERPRETED and not interpreter_works(triton.__version__, numpy.__version__):
    pytest.skip(
        f"triton {triton.__version__} does not interpret with numpy {numpy.__version__}", allow_module_level=True
    )
