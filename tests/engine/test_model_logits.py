"""The decoder's float32 logits equal transformers', whatever the family, the chunking and the pages."""

from __future__ import annotations

import functools
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from engine.model.config import ModelConfig
from engine.model.transformer import Decoder
from engine.model.weights import Checkpoint
from kernels.attention import Workspace
from kernels.blocks import allocate_pool
from kernels.ragged import build_metadata
from tests.tiny_models import FAMILIES, LLAMA3_ROPE, VOCAB, YARN_ROPE, build

CPU = torch.device("cpu")
BLOCK_TOKENS = 8
PROMPT = 150
TOLERANCE = 1e-4


def _split(tensor: Tensor, sizes: list[int]) -> list[Tensor]:
    ends = list(accumulate(sizes))
    return [tensor[end - size : end] for size, end in zip(sizes, ends, strict=True)]


class Served:
    """A decoder, its pool, and requests that are fed to it chunk by chunk over scattered pages."""

    def __init__(self, directory: Path, num_blocks: int = 100) -> None:
        self.config = ModelConfig.load(directory)
        self.model = Decoder(self.config, Checkpoint(directory), CPU, torch.float32)
        config = self.config
        shape = (num_blocks, config.num_layers, 2, config.num_kv_heads, BLOCK_TOKENS, config.head_dim)
        self.pool = allocate_pool(shape, torch.float32, CPU)
        self.workspace = Workspace(torch.float32, CPU)
        self.free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(1)).tolist()
        self.tables: dict[str, list[int]] = {}
        self.done: dict[str, int] = {}

    @torch.inference_mode()
    def step(self, **chunks: Tensor) -> dict[str, Tensor]:
        """The next tokens of each request; logits `[tokens, vocab]` of each."""
        for name, chunk in chunks.items():
            table = self.tables.setdefault(name, [])
            while len(table) * BLOCK_TOKENS < self.done.get(name, 0) + len(chunk):
                table.append(self.free.pop())
            self.done[name] = self.done.get(name, 0) + len(chunk)
        metadata = build_metadata(
            [len(chunk) for chunk in chunks.values()],
            [self.done[name] for name in chunks],
            [self.tables[name] for name in chunks],
            self.pool,
            set(self.config.windows),
            self.workspace,
        )
        hidden = self.model.forward(torch.cat(list(chunks.values())), self.pool, metadata)
        logits = _split(self.model.logits(hidden), [len(chunk) for chunk in chunks.values()])
        return dict(zip(chunks, logits, strict=True))


@functools.cache
def prompt(seed: int, length: int = PROMPT) -> Tensor:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def reference(directory: Path, tokens: Tensor) -> Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    logits: Tensor = model.eval()(tokens[None]).logits[0]
    return logits


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max().item() <= TOLERANCE


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(request.param, tmp_path_factory.mktemp(request.param))


def test_whole_prompt_in_one_step(directory: Path) -> None:
    assert_close(Served(directory).step(a=prompt(0))["a"], reference(directory, prompt(0)))


def test_chunks_and_decoding(directory: Path) -> None:
    served = Served(directory)
    parts = [served.step(a=part)["a"] for part in _split(prompt(0), [61, 1, 7, 64, 1, 1, 15])]
    assert_close(torch.cat(parts), reference(directory, prompt(0)))


def test_mixed_batch_of_prompts_and_decoding(directory: Path) -> None:
    served = Served(directory)
    head = served.step(a=prompt(0)[:140], b=prompt(1)[:33], c=prompt(2)[:1])
    tail = served.step(a=prompt(0)[140:141], b=prompt(1)[33:60], c=prompt(2)[1:2], d=prompt(3)[:40])
    last = served.step(d=prompt(3)[40:41], c=prompt(2)[2:3], b=prompt(1)[60:61], a=prompt(0)[141:142])
    for name, seed, length in (("a", 0, 142), ("b", 1, 61), ("c", 2, 3), ("d", 3, 41)):
        ours = torch.cat([part[name] for part in (head, tail, last) if name in part])
        assert_close(ours, reference(directory, prompt(seed)[:length]))


@pytest.mark.parametrize(
    ("family", "overrides"),
    [
        ("llama2", {"num_key_value_heads": 1}),
        ("llama2", {"num_key_value_heads": 2, "head_dim": 24, "tie_word_embeddings": True}),
        ("llama2", {"attention_bias": True, "mlp_bias": True}),
        ("mistral", {"sliding_window": None, "head_dim": 8}),
        ("mistral", {"sliding_window": 1}),
        ("qwen2", {"tie_word_embeddings": False, "num_key_value_heads": 4}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1}),
        ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
        (
            "qwen3",
            {
                "use_sliding_window": True,
                "sliding_window": 13,
                "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            },
        ),
        ("qwen2", {"rope_parameters": YARN_ROPE}),
        ("qwen3", {"rope_parameters": LLAMA3_ROPE}),
        ("llama-yarn", {"rope_parameters": {**YARN_ROPE, "attention_factor": 1.3, "beta_fast": 20.0}}),
        ("llama-yarn", {"rope_parameters": {**YARN_ROPE, "mscale": 0.7, "mscale_all_dim": 1.1}}),
        ("llama-yarn", {"rope_parameters": {**YARN_ROPE, "truncate": False}}),
    ],
)
def test_variant(tmp_path: Path, family: str, overrides: dict[str, Any]) -> None:
    build(family, tmp_path, **overrides)
    served = Served(tmp_path)
    ours = torch.cat([served.step(a=part)["a"] for part in _split(prompt(0), [70, 1, 79])])
    assert_close(ours, reference(tmp_path, prompt(0)))


def test_older_spelling_of_the_rope(tmp_path: Path) -> None:
    build("llama3", tmp_path)
    path = tmp_path / "config.json"
    rope = dict(LLAMA3_ROPE)
    theta = rope.pop("rope_theta")
    text = path.read_text()
    before = Served(tmp_path).step(a=prompt(0))["a"]
    parsed = ModelConfig.load(tmp_path).rope
    assert '"rope_parameters"' in text
    start = text.index('"rope_parameters"')
    stop = text.index("}", start) + 1
    older = f'"rope_theta": {theta}, "rope_scaling": {str(rope).replace(chr(39), chr(34))}'
    path.write_text(text[:start] + older + text[stop:])
    assert ModelConfig.load(tmp_path).rope == parsed
    assert torch.equal(Served(tmp_path).step(a=prompt(0))["a"], before)


@torch.inference_mode()
def test_dynamic_rope_decodes_past_the_original_length_as_transformers_does(tmp_path: Path) -> None:
    build("llama-dynamic", tmp_path, max_position_embeddings=32)
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    wanted = model.generate(
        prompt(0)[None, :30],
        attention_mask=torch.ones(1, 30, dtype=torch.int64),
        do_sample=False,
        max_new_tokens=30,
        min_new_tokens=30,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    served = Served(tmp_path)
    tokens = wanted.sequences[0]
    ours = [served.step(a=tokens[:30])["a"][-1]]
    ours += [served.step(a=tokens[i : i + 1])["a"][0] for i in range(30, 59)]
    assert_close(torch.stack(ours), torch.cat(wanted.logits))


def test_dynamic_rope_does_not_depend_on_what_follows(tmp_path: Path) -> None:
    build("llama-dynamic", tmp_path, max_position_embeddings=32)
    whole = Served(tmp_path).step(a=prompt(0))["a"]
    served = Served(tmp_path)
    parts = torch.cat([served.step(a=part)["a"] for part in _split(prompt(0), [50, 50, 50])])
    assert_close(parts, whole)


@torch.inference_mode()
def test_bfloat16_is_as_exact_as_transformers(tmp_path: Path) -> None:
    build("qwen3", tmp_path)
    exact = reference(tmp_path, prompt(0))
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    theirs = model.eval()(prompt(0)[None]).logits[0].float()
    served = Served(tmp_path)
    served.model = Decoder(served.config, Checkpoint(tmp_path), CPU, torch.bfloat16)
    served.pool, served.workspace = served.pool.to(torch.bfloat16), Workspace(torch.bfloat16, CPU)
    ours = served.step(a=prompt(0))["a"]
    assert (ours - exact).square().mean().sqrt() <= 1.2 * (theirs - exact).square().mean().sqrt()
