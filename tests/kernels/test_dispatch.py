"""Which operators serve which device."""

from __future__ import annotations

import importlib
import logging
import subprocess
import sys

import pytest
import torch

from kernels.dispatch import TORCH, operators
from tests.triton_interpreter import interpreter_works

CUDA = torch.device("cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_torch_serves_a_cpu(dtype: torch.dtype) -> None:
    assert operators(torch.device("cpu"), dtype) is TORCH


def test_triton_serves_cuda_in_half_precision() -> None:
    triton = importlib.import_module("kernels.triton.operators").TRITON
    assert operators(CUDA, torch.bfloat16) is triton
    assert operators(CUDA, torch.float16) is triton
    assert operators(CUDA, torch.float32) is TORCH


def test_without_triton_torch_serves_cuda_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def without(name: str) -> None:
        def import_module(_: str) -> None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(importlib, "import_module", import_module)

    without("triton")
    with caplog.at_level(logging.WARNING, "kvmesh.kernels"):
        assert operators(CUDA, torch.bfloat16) is TORCH
    assert [record.getMessage() for record in caplog.records] == [
        "triton is not installed: plain torch operators serve cuda, several times slower"
    ]
    without("kernels.triton.operators")
    with pytest.raises(ModuleNotFoundError):
        operators(CUDA, torch.bfloat16)


def test_a_cpu_worker_does_not_import_triton() -> None:
    code = "import sys, torch, kernels.dispatch as d; d.operators(torch.device('cpu'), torch.float32)"
    subprocess.run([sys.executable, "-c", f"{code}; sys.exit('triton' in sys.modules)"], check=True)


def test_the_interpreter_needs_triton_3_8_or_numpy_below_2_4() -> None:
    assert not interpreter_works("3.6.0", "2.4.1")
    assert interpreter_works("3.6.0", "2.3.5")
    assert interpreter_works("3.8.0", "2.4.1")
    assert interpreter_works("3.10.1+git123", "2.10.0")
