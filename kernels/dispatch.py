"""Which implementation of the operators serves a device: the only place that decides."""

from __future__ import annotations

import importlib
import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from kernels import attention, linear, norm, ragged, sampling
from kernels.attention import AttentionMetadata
from kernels.operators import Operators

TRITON_DTYPES = (torch.bfloat16, torch.float16)
"""What the kernels' tiles are made for: twice as wide, they would not fit a multiprocessor's shared memory."""

TORCH: Operators[AttentionMetadata] = Operators(
    metadata_builder=ragged.metadata_builder,
    make_linear=linear.make_linear,
    make_gated_linear=linear.make_gated_linear,
    rms_norm=norm.rms_norm,
    rms_norm_=norm.rms_norm_,
    rotate_and_write=attention.rotate_and_write,
    paged_attention=attention.paged_attention,
    draw=sampling.draw,
)

FRUGAL = replace(
    TORCH,
    make_linear=partial(linear.make_linear, roomy=False),
    make_gated_linear=partial(linear.make_gated_linear, roomy=False),
)
"""Without a second copy of weights for steps of one or two rows."""

log = logging.getLogger("kvmesh.kernels")


def operators(device: torch.device, dtype: torch.dtype, *, roomy: bool = True) -> Operators[Any]:
    """Triton kernels on CUDA devices, plain torch elsewhere. `roomy`: memory may be spent for speed."""
    if device.type != "cuda" or dtype not in TRITON_DTYPES:
        return TORCH if roomy else FRUGAL
    try:
        # Not imported above: a CPU worker would pay 70 MiB and a third of a second for what it never uses.
        found: Operators[Any] = importlib.import_module("kernels.triton.operators").TRITON
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        log.warning("triton is not installed: plain torch operators serve %s, several times slower", device)
        return TORCH
    return found
