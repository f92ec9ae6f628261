"""The GPU benchmark, on a CPU: every part of it once, over a model of a few weights."""

from __future__ import annotations

import math
import time
from dataclasses import replace

import pytest
import torch

from benchmarks import h200
from benchmarks.h200 import Plan, llama_8b, main, measure
from engine.model import transformer
from kernels.triton.operators import TRITON
from tests.triton_interpreter import DEVICE

TINY = replace(
    llama_8b(),
    vocab_size=64,
    hidden_size=16,
    intermediate_size=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    windows=(0, 0),
)
PLAN = Plan(
    TINY,
    DEVICE,
    torch.float32,
    copy_bytes=1 << 12,
    product_size=8,
    attention=((2, 40),),
    decode_rows=(2,),
    decode_context=20,
    prefill=(24,),
    requests=2,
    prompt=6,
    output=4,
    check=20,
    repeats=1,
    rounds=1,
)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", ["h200"])
    assert main() == 2
    assert capsys.readouterr().err.strip() == h200.NO_DEVICE


def test_every_part_runs_after_ceilings_and_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, "operators", lambda *_, **__: TRITON)
    monkeypatch.setattr(h200, "peer_rows", lambda _: [["transformers", "", ""]])
    said: list[str] = []
    assert measure(PLAN, time.monotonic() + 1000, said.append) == 0
    assert said[0].startswith("ceilings: copy")
    assert said[1].startswith("relative error of attention")
    assert len(said) == 3, "nothing is left out"
    parts = ["paged decode attention 2 x 40", "decode step 2 x 20", "prefill 24", "kvmesh, 2 requests", "host gap"]
    assert all(part in said[2] for part in [*parts, "transformers"])


def test_nothing_is_timed_when_an_output_is_wrong_and_parts_without_time_are_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(h200, "check_attention", lambda *_: 0.0)
    said: list[str] = []
    monkeypatch.setattr(h200, "check_logits", lambda *_: 0.1)
    assert measure(PLAN, math.inf, said.append) == 1
    assert said[-1] == "wrong: more than 0.02; nothing is timed"
    monkeypatch.setattr(h200, "check_logits", lambda *_: 0.0)
    assert measure(PLAN, -math.inf, said.append) == 0
    assert "left out, no time: decode" in said


def test_weights_and_keys_of_llama_3_1_8b() -> None:
    plan = Plan(llama_8b(), DEVICE)
    assert h200.weight_count(plan.config) == pytest.approx(7.504e9, rel=1e-3)
    assert h200.kv_bytes(plan) == 131072
