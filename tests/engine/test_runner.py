"""The model runner: rows in, tokens and pages out."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine import runner as runner_module
from engine.model.digest import model_digest
from engine.request import EngineRequest
from engine.runner import ModelRunner
from engine.step import Row, Runner
from kernels.pages_ahead import PagesAhead
from mesh.errors import EXIT_ENVIRONMENT, EXIT_MEMORY, EXIT_MODEL, EXIT_USAGE, StartupError
from mesh.layout import KvLayout
from mesh.params import SamplingParams
from tests.tiny_models import VOCAB, build

BLOCK_TOKENS = 8
GREEDY = SamplingParams(max_tokens=100, temperature=0.0)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("qwen3", tmp_path_factory.mktemp("qwen3"))


def load(directory: Path, **options: Any) -> ModelRunner:
    defaults: dict[str, Any] = {
        "device": "cpu",
        "dtype": "auto",
        "block_tokens": BLOCK_TOKENS,
        "num_blocks": 64,
        "memory_utilization": 0.9,
        "max_model_len": 0,
        "max_num_batched_tokens": 64,
    }
    return ModelRunner.load(directory, **{**defaults, **options})


def tokens_of(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (length,), generator=generator).tolist()


def make_request(seed: int, length: int, first_page: int, params: SamplingParams = GREEDY) -> EngineRequest:
    """Owns eight pages, in falling order."""
    pages = list(range(first_page + 7, first_page - 1, -1))
    return EngineRequest(str(seed), tokens_of(seed, length), length, params, b"", block_table=pages)


def step(runner: Runner, *shares: tuple[EngineRequest, int]) -> list[int | None]:
    """Runs the rows and does what the engine does with the results."""
    results = runner.run([Row(request, count) for request, count in shares])
    for (request, count), result in zip(shares, results, strict=True):
        request.num_computed_tokens += count
        if result.token is not None:
            request.tokens.append(result.token)
    return [result.token for result in results]


def reference(directory: Path, prompt: list[int], count: int) -> list[int]:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        min_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def test_batched_chunked_greedy_equals_transformers(directory: Path) -> None:
    runner = load(directory)
    a, b, c = make_request(1, 40, 0), make_request(2, 17, 8), make_request(3, 1, 16)
    assert step(runner, (a, 25), (c, 1), (b, 16))[0] is None
    step(runner, (b, 1), (a, 15), (c, 1))
    for _ in range(9):
        step(runner, (c, 1), (a, 1), (b, 1))
    for request in (a, b, c):
        output = request.tokens[request.num_prompt_tokens :]
        assert output == reference(directory, request.tokens[: request.num_prompt_tokens], len(output))
        assert len(output) >= 10


def test_results_stand_in_the_order_of_the_rows(directory: Path) -> None:
    runner = load(directory)
    alone = {seed: step(runner, (make_request(seed, length, 0), length)) for seed, length in ((5, 30), (6, 3))}
    together = step(runner, (make_request(5, 30, 0), 30), (make_request(6, 3, 8), 3))
    assert together == alone[5] + alone[6]


def test_no_rows_no_results(directory: Path) -> None:
    assert load(directory).run([]) == []


def test_prompt_logprobs_over_chunks(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "LOGIT_BYTES", 4 * VOCAB * 5)
    runner = load(directory)
    request = make_request(7, 30, 0, dataclasses.replace(GREEDY, prompt_logprobs=2))
    entries = []
    for count in (13, 16, 1):
        (result,) = runner.run([Row(request, count)])
        entries.append(result.prompt_logprobs)
        request.num_computed_tokens += count
    assert [len(part) for part in entries] == [13, 16, 0]
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.inference_mode():
        wanted = model(torch.tensor([request.tokens])).logits[0].log_softmax(-1)
    for position, entry in enumerate([entry for part in entries for entry in part]):
        assert entry.token == request.tokens[position + 1]
        assert entry.logprob == pytest.approx(wanted[position, entry.token].item(), abs=1e-4)
        assert list(entry.top_logprobs) == pytest.approx(wanted[position].topk(2).values.tolist(), abs=1e-4)


def test_output_computed_again_after_preemption_has_no_prompt_logprobs(directory: Path) -> None:
    runner = load(directory)
    request = make_request(7, 10, 0, dataclasses.replace(GREEDY, prompt_logprobs=0))
    request.tokens += [1, 2, 3]
    (result,) = runner.run([Row(request, 13)])
    assert len(result.prompt_logprobs) == 9
    assert result.token is not None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_blocks_carry_a_request_to_another_runner(directory: Path, dtype: str) -> None:
    source, target = load(directory, dtype=dtype), load(directory, dtype=dtype)
    request = make_request(8, 20, 0)
    assert source.layout == target.layout
    first = step(source, (request, 20))
    assert first != [None]
    pages = [(page, min(BLOCK_TOKENS, 20 - i * BLOCK_TOKENS)) for i, page in enumerate(request.block_table[:3])]
    for page, valid in pages:
        target.write_block(page + 20, memoryview(source.read_block(page, valid)))
    moved = dataclasses.replace(
        request, tokens=list(request.tokens), block_table=[page + 20 for page in request.block_table]
    )
    assert [step(source, (request, 1)) for _ in range(4)] == [step(target, (moved, 1)) for _ in range(4)]


def test_a_read_block_hides_what_is_not_valid(directory: Path) -> None:
    runner = load(directory)
    request = make_request(9, 8, 0)
    step(runner, (request, 8))
    page = request.block_table[0]
    whole, part = (torch.frombuffer(bytearray(runner.read_block(page, n)), dtype=torch.float32) for n in (8, 5))
    layout = runner.layout
    shape = (layout.layers, 2, layout.kv_heads, BLOCK_TOKENS, layout.head_dim)
    assert torch.equal(part.view(shape)[..., :5, :], whole.view(shape)[..., :5, :])
    assert whole.view(shape)[..., 5:, :].all()
    assert not part.view(shape)[..., 5:, :].any()
    assert len(runner.read_block(page, 0)) == layout.block_bytes


def test_attributes(directory: Path) -> None:
    runner = load(directory, block_tokens=4, num_blocks=70)
    assert runner.layout == KvLayout(layers=3, kv_heads=2, head_dim=32, block_tokens=4, dtype="float32")
    assert (runner.num_blocks, runner.vocab_size, runner.max_model_len) == (70, VOCAB, 280)
    assert runner.digest == model_digest(directory)


def test_pool_is_sized_from_memory(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "free_bytes", lambda *_: 5_000_000)
    runner = load(directory, num_blocks=0)
    assert 2 <= runner.num_blocks < 5_000_000 // runner.layout.block_bytes


def test_half_precision_weights_are_converted_on_a_cpu(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build("qwen3", tmp_path, dtype=torch.float16)
    with caplog.at_level(logging.WARNING, "kvmesh.runner"):
        runner = load(tmp_path, max_model_len=64)
    assert runner.layout.dtype == "float32"
    assert len([record for record in caplog.records if "float16" in record.message]) == 1
    assert step(runner, (make_request(1, 30, 0), 30)) != [None]
    assert load(tmp_path, dtype="bfloat16").layout.dtype == "bfloat16"


def refused(directory: Path, exit_code: int, words: str) -> Callable[..., None]:
    def check(**options: Any) -> None:
        with pytest.raises(StartupError, match=words) as caught:
            load(directory, **options)
        assert caught.value.exit_code == exit_code

    return check


def test_startup_refusals(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(directory / "no", EXIT_MODEL, "does not exist")()
    refused(directory, EXIT_USAGE, "dtype int8 is not known")(dtype="int8")
    refused(directory, EXIT_USAGE, "device teapot is not known")(device="teapot")
    refused(directory, EXIT_USAGE, "device meta is not supported")(device="meta")
    refused(directory, EXIT_USAGE, "more than the model's 512")(max_model_len=513)
    refused(directory, EXIT_MEMORY, "does not fit the KV pool of 64 tokens")(num_blocks=8, max_model_len=100)
    refused(directory, EXIT_MEMORY, "KV blocks need")(num_blocks=1 << 40)
    monkeypatch.setattr(runner_module, "free_bytes", lambda *_: 0)
    refused(directory, EXIT_MEMORY, "the weights need")()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_missing_gpu_is_said(directory: Path) -> None:
    refused(directory, EXIT_ENVIRONMENT, "0 CUDA devices are usable")(device="cuda")


def test_the_pools_memory_is_asked_for_before_a_page_is_written(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(PagesAhead, "reach", lambda _, block: asked.append(block))
    runner = load(directory)
    step(runner, (make_request(1, 5, 9), 5))
    assert asked[-1] == make_request(1, 5, 9).block_table[-1]
    runner.write_block(11, runner.read_block(9, 5))
    assert asked[-1] == 11
