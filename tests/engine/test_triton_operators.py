"""An engine on the Triton kernels generates what it does on plain torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.engine import Engine, EngineConfig
from engine.model import transformer
from engine.request import EngineRequest
from engine.runner import ModelRunner
from kernels.dispatch import TORCH
from kernels.triton.operators import TRITON
from mesh.params import SamplingParams
from tests.tiny_models import VOCAB, build
from tests.triton_interpreter import DEVICE

GREEDY = SamplingParams(max_tokens=3, temperature=0.0)
DRAWN = SamplingParams(max_tokens=3, temperature=0.8, top_p=0.9, seed=5)
LOGPROBS = SamplingParams(max_tokens=2, temperature=0.0, logprobs=1)
ROOT = b"r" * 16


def prompt(length: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(4)).tolist()


def generate(directory: Path) -> tuple[dict[str, list[int]], int]:
    """A long prompt in chunks beside two that are decoded, one of them drawn; then a prompt that is found in the prefix
    cache, and one with log-probabilities. The new tokens by request, and how many prompt tokens were found."""
    runner = ModelRunner.load(
        directory,
        device=str(DEVICE),
        dtype="auto",
        block_tokens=8,
        num_blocks=32,
        memory_utilization=0.9,
        max_model_len=0,
        max_num_batched_tokens=16,
    )
    engine = Engine(runner, EngineConfig(4, 16, 200))
    tokens: dict[str, list[int]] = {}
    for begins in (
        (("short", 3, GREEDY), ("drawn", 2, DRAWN), ("long", 37, GREEDY)),
        (("again", 33, GREEDY), ("logprobs", 4, LOGPROBS)),
    ):
        requests = [EngineRequest(key, prompt(length), length, params, ROOT) for key, length, params in begins]
        for request in requests:
            engine.add(request)
        while engine.has_work:
            for out in engine.step().tokens:
                tokens.setdefault(out.request.key, []).append(out.token)
    return tokens, requests[0].num_cached_tokens


@pytest.mark.parametrize("family", ["qwen3", "mistral"])
def test_tokens_equal_those_of_plain_torch(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = build(family, tmp_path, num_hidden_layers=2)
    monkeypatch.setattr(transformer, "operators", lambda *_, **__: TORCH)
    wanted = generate(directory)
    monkeypatch.setattr(transformer, "operators", lambda *_, **__: TRITON)
    assert generate(directory) == wanted
    assert wanted[1] == 32
    assert {key: len(tokens) for key, tokens in wanted[0].items()} == {
        "short": 3,
        "drawn": 3,
        "long": 3,
        "again": 3,
        "logprobs": 2,
    }
