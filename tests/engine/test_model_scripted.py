"""A compiled decoding step over keys that stayed gathered says what the step says in Python, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.model import dense
from engine.model.config import ModelConfig
from engine.model.dense import DenseKeys
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
        self.lengths = list(lengths)
        sizes = [length // BLOCK_TOKENS + 4 for length in lengths]
        pages = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(1)).tolist()
        self.tables = [[pages.pop() for _ in range(size)] for size in sizes]
        shape = (sum(sizes), self.config.num_layers, 2, self.config.num_kv_heads, BLOCK_TOKENS, self.config.head_dim)
        self.pool = allocate_pool(shape, dtype, CPU)
        self.pool.copy_(torch.randn(shape, generator=torch.Generator().manual_seed(2)))
        self.workspace = Workspace(dtype, CPU)
        self.random = torch.Generator().manual_seed(3)

    @torch.inference_mode()
    def metadata(self, queries: list[int], workspace: Workspace | None = None) -> AttentionMetadata:
        windows = set(self.config.windows)
        return build_metadata(queries, self.lengths, self.tables, self.pool, windows, workspace or self.workspace)

    @torch.inference_mode()
    def step(self, queries: list[int] | None = None) -> Tensor:
        """The hidden states of a step, with so many tokens per row or one; those and the pool after it are the same
        without anything that is compiled or kept from earlier steps."""
        queries = queries or [1] * len(self.lengths)
        tokens = torch.randint(0, VOCAB, (sum(queries),), generator=self.random)
        pool = self.pool.clone()
        scripted, self.model.scripted = self.model.scripted, None
        wanted = self.model.forward(tokens, pool, self.metadata(queries, Workspace(pool.dtype, CPU)))
        self.model.scripted = scripted
        hidden = self.model.forward(tokens, self.pool, self.metadata(queries))
        assert torch.equal(hidden, wanted)
        assert torch.equal(self.pool, pool)
        return hidden

    def grow(self, by: int = 1) -> None:
        self.lengths = [length + by for length in self.lengths]

    @property
    def dense(self) -> DenseKeys:
        assert self.model.scripted is not None
        assert self.model.scripted.dense is not None
        return self.model.scripted.dense


needs_bfloat16 = pytest.mark.skipif(not can_pack(CPU, torch.bfloat16), reason="oneDNN does not multiply bfloat16 here")


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
    if not can_pack(CPU, dtype):
        pytest.skip("oneDNN does not multiply this dtype here")
    build(family, tmp_path, **overrides)
    case = Case(tmp_path, dtype, LENGTHS[-rows:])
    assert case.model.scripted is not None
    before = case.pool.clone()
    for _ in range(12):  # TorchScript optimises what it has seen once, and every row comes to a new page
        case.step()
        case.grow()
    assert not torch.equal(case.pool, before)


@needs_bfloat16
def test_several_batches_and_whole_products_are_compiled_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build("llama3", tmp_path)
    monkeypatch.setattr(products, "FEW_KEYS", 200)
    monkeypatch.setattr(ragged, "PADDING_TOKENS", 0)
    case = Case(tmp_path, torch.bfloat16, LENGTHS)
    assert len(case.metadata([1] * len(LENGTHS)).batches[0]) == 2
    for _ in range(12):
        case.step()
        case.grow()


@needs_bfloat16
def test_steps_of_one_or_two_rows_are_float32_between_products(tmp_path: Path) -> None:
    build("llama3", tmp_path)
    for rows, dtype in ((1, torch.float32), (2, torch.float32), (3, torch.bfloat16)):
        assert Case(tmp_path, torch.bfloat16, LENGTHS[:rows]).step().dtype == dtype


@pytest.fixture
def case(tmp_path: Path) -> Case:
    build("llama3", tmp_path)
    return Case(tmp_path, torch.float32, LENGTHS[:3])


def spoil(case: Case) -> None:
    """Whatever lies in the pages is another's now."""
    case.pool.copy_(torch.randn(case.pool.shape, generator=torch.Generator().manual_seed(4)))


@torch.inference_mode()
def test_rows_that_go_on_are_not_gathered_again(case: Case) -> None:
    case.step()
    kept = case.pool.clone()
    case.grow()
    spoil(case)
    metadata = case.metadata([1, 1, 1])
    assert metadata.continues
    tokens = torch.tensor([5, 6, 7])
    got = case.model.forward(tokens, case.pool, metadata)
    case.pool = kept
    case.workspace = Workspace(torch.float32, CPU)
    anew = case.metadata([1, 1, 1])
    assert not anew.continues
    assert torch.equal(case.model.forward(tokens, case.pool, anew), got)


def test_another_row_with_the_same_pages_is_gathered(case: Case) -> None:
    case.step()
    case.grow()
    spoil(case)
    case.tables = [list(table) for table in case.tables]
    case.step()


def test_rows_in_another_order_are_gathered(case: Case) -> None:
    case.lengths = [9, 9, 9]
    case.step()
    case.grow()
    case.tables.reverse()
    case.step()


def test_rows_that_come_and_leave_are_gathered(case: Case) -> None:
    case.step()
    case.grow()
    first = case.lengths.pop(0), case.tables.pop(0)
    case.step()
    case.grow()
    case.lengths.insert(0, first[0])
    case.tables.insert(0, first[1])
    case.step()


def test_rows_that_took_several_tokens_are_gathered(case: Case) -> None:
    case.step()
    case.grow(2)
    case.step([2, 2, 2])
    case.grow()
    case.step()


def test_rows_that_decoded_beside_a_prompt_are_gathered(case: Case) -> None:
    case.step()
    case.lengths = [5, *(length + 1 for length in case.lengths[1:])]
    case.step([2, 1, 1])
    case.grow()
    case.step()


def test_rows_that_began_anew_are_gathered(case: Case) -> None:
    case.step()
    spoil(case)
    case.step()


def test_a_step_that_was_not_computed_here_is_not_gone_on_from(case: Case) -> None:
    case.step()
    case.grow()
    case.metadata([1, 1, 1])
    case.grow()
    spoil(case)
    case.step()


def test_what_would_take_too_much_memory_is_gathered_in_every_step(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = case.metadata([1, 1, 1])
    held = case.config.num_layers * sum(b.pages.numel() for b in metadata.batches[0]) * case.pool[0, 0, 0, 0].nbytes
    assert case.dense.place(metadata, case.pool).stride
    monkeypatch.setattr(dense, "MAX_BYTES", held - 1)
    assert not case.dense.place(metadata, case.pool).stride
    for _ in range(3):
        case.step()
        case.grow()
        spoil(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "overrides"), [("llama3", {}), ("qwen3", WINDOWS)], ids=["plain", "normed and windowed"]
)
def test_steps_with_prompts_are_compiled_too(
    tmp_path: Path, family: str, overrides: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, several padded to one another, chunks behind a prefix, and beside rows that decode."""
    if not can_pack(CPU, dtype):
        pytest.skip("oneDNN does not multiply this dtype here")
    build(family, tmp_path, **overrides)
    monkeypatch.setattr(products, "FEW_SCORES", 100)
    monkeypatch.setattr(ragged, "LARGE_TILE", 512)
    monkeypatch.setattr(ragged, "TILE_QUERIES", 32)
    for lengths, queries in (((75,), [75]), ((9, 30), [7, 6]), ((31, 75), [9, 40]), (LENGTHS, [1, 1, 9, 1, 4, 50])):
        case = Case(tmp_path, dtype, lengths)
        for _ in range(3):
            case.step(queries)
        case.grow()
        case.step()


def test_weights_that_onednn_does_not_multiply_are_left_to_python(tmp_path: Path) -> None:
    build("llama3", tmp_path)
    case = Case(tmp_path, torch.float16, LENGTHS[:2])
    assert case.model.scripted is None
    assert torch.isfinite(case.step()).all()
