"""A decoding step that is compiled says what the same step says in Python, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.model.config import ModelConfig
from engine.model.transformer import Decoder
from engine.model.weights import Checkpoint
from kernels import products, ragged
from kernels.attention import AttentionMetadata, Workspace
from kernels.blocks import allocate_pool
from kernels.linear import can_pack
from kernels.ragged import build_metadata
from tests.tiny_models import VOCAB, build

CPU = torch.device("cpu")
BLOCK_TOKENS = 8
LENGTHS = (3, 9, 9, 30, 31, 75)
WINDOWS = {
    "use_sliding_window": True,
    "sliding_window": 13,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}


class Case:
    """A model and rows of these lengths, whose keys and values so far are noise."""

    def __init__(self, directory: Path, dtype: torch.dtype, lengths: tuple[int, ...]) -> None:
        self.config = ModelConfig.load(directory)
        self.model = Decoder(self.config, Checkpoint(directory), CPU, dtype)
        self.lengths = lengths
        sizes = [-(-length // BLOCK_TOKENS) for length in lengths]
        pages = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(1)).tolist()
        self.tables = [[pages.pop() for _ in range(size)] for size in sizes]
        shape = (sum(sizes), self.config.num_layers, 2, self.config.num_kv_heads, BLOCK_TOKENS, self.config.head_dim)
        self.pool = allocate_pool(shape, dtype, CPU)
        self.pool.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(2)))
        self.tokens = torch.randint(0, VOCAB, (len(lengths),), generator=torch.Generator().manual_seed(3))

    def metadata(self, queries: list[int]) -> AttentionMetadata:
        workspace = Workspace(self.pool.dtype, CPU)
        return build_metadata(queries, self.lengths, self.tables, self.pool, set(self.config.windows), workspace)

    @torch.inference_mode()
    def step(self) -> tuple[Tensor, Tensor]:
        """Hidden states and the pool after a step of one token per row."""
        pool = self.pool.clone()
        return self.model.forward(self.tokens, pool, self.metadata([1] * len(self.lengths))), pool


def in_python(case: Case) -> tuple[Tensor, Tensor]:
    scripted, case.model.scripted = case.model.scripted, None
    answer = case.step()
    case.model.scripted = scripted
    return answer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 3, 6])
@pytest.mark.parametrize(
    ("family", "overrides"),
    [("llama3", {}), ("qwen2", {"mlp_bias": True}), ("qwen3", WINDOWS), ("mistral", {"sliding_window": 1})],
    ids=["plain", "biased", "normed and windowed", "a window of one"],
)
def test_compiled_layers_equal_those_in_python(
    tmp_path: Path, family: str, overrides: dict[str, Any], rows: int, dtype: torch.dtype
) -> None:
    build(family, tmp_path, **overrides)
    case = Case(tmp_path, dtype, LENGTHS[-rows:])
    if not can_pack(CPU, dtype):
        pytest.skip("oneDNN does not multiply this dtype here")
    assert case.model.scripted is not None
    for _ in range(3):  # TorchScript optimises what it has seen once
        hidden, pool = case.step()
    wanted, wanted_pool = in_python(case)
    assert torch.equal(hidden, wanted)
    assert torch.equal(pool, wanted_pool)
    assert not torch.equal(pool, case.pool)


def test_several_batches_and_whole_products_are_compiled_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_pack(CPU, torch.bfloat16):
        pytest.skip("oneDNN does not multiply this dtype here")
    build("llama3", tmp_path)
    monkeypatch.setattr(products, "FEW_KEYS", 200)
    monkeypatch.setattr(ragged, "PADDING_TOKENS", 0)
    case = Case(tmp_path, torch.bfloat16, LENGTHS)
    assert len(case.metadata([1] * len(LENGTHS)).batches[0]) == 2
    hidden, pool = case.step()
    wanted, wanted_pool = in_python(case)
    assert torch.equal(hidden, wanted)
    assert torch.equal(pool, wanted_pool)


def test_only_steps_of_one_token_per_row_are_compiled(tmp_path: Path) -> None:
    build("llama3", tmp_path)
    case = Case(tmp_path, torch.float32, LENGTHS[:3])
    assert case.model.scripted is not None
    assert case.model.scripted.takes(case.metadata([1, 1, 1]))
    assert not case.model.scripted.takes(case.metadata([1, 2, 1]))


def test_weights_that_onednn_does_not_multiply_are_left_to_python(tmp_path: Path) -> None:
    build("llama3", tmp_path)
    case = Case(tmp_path, torch.float16, LENGTHS[:2])
    assert case.model.scripted is None
    assert torch.isfinite(case.step()[0]).all()
