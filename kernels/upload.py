"""Arrays of the host onto a device, without waiting for it."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """`values` on `device`. A copy from pinned memory is one more item in the device's queue; from any other, the host
    would wait for all before it. Torch keeps pinned memory, and hands it out again once its copy is done."""
    tensor = torch.from_numpy(values)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
