"""The engine on one H100 or H200: an 8B shape in bfloat16 with random weights, over what the card does in the same run.

    python -m benchmarks.h200 [--minutes 10]

Ceilings come first (a copy, a matrix product), then the outputs are checked against float32, and only then anything is
timed: paged decode attention, decode steps, prefill, whole generations and what the host adds to a step, and the same
workload by transformers' continuous batching. A part that does not fit into the minutes is left out and said. Exits
with 2 where there is no CUDA device, with 1 when an output is wrong.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM

from benchmarks.measure import table
from engine.decode_step import DecodeStep
from engine.engine import Engine, EngineConfig
from engine.model.config import FULL_ATTENTION, ModelConfig, RopeConfig
from engine.model.transformer import Decoder
from engine.request import EngineRequest
from engine.runner import ModelRunner
from kernels.blocks import allocate_pool
from kernels.dispatch import TORCH
from mesh.layout import KvLayout
from mesh.params import SamplingParams

NO_DEVICE = "benchmarks.h200 measures a CUDA device, and this machine has none that torch can use"
TOLERANCE = 2e-2
"""Relative error of bfloat16 logits and attention outputs against float32."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured; tests make it small."""

    config: ModelConfig
    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    block_tokens: int = 16
    copy_bytes: int = 4 << 30
    product_size: int = 8192
    attention: tuple[tuple[int, int], ...] = ((16, 8192), (128, 1024), (32, 8192), (64, 8192))
    """Rows and their context: 128k tokens of keys and values, and more."""
    decode_rows: tuple[int, ...] = (1, 32, 128)
    decode_context: int = 1024
    prefill: tuple[int, ...] = (1024, 8192)
    requests: int = 64
    prompt: int = 512
    output: int = 128
    check: int = 300
    """Tokens of the prompt that outputs are checked with."""
    repeats: int = 10
    rounds: int = 3

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)


def llama_8b() -> ModelConfig:
    """Llama 3.1 8B."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        norm_eps=1e-5,
        rope=RopeConfig("default", 500000.0, 131072),
        windows=(FULL_ATTENTION,) * 32,
        tie_word_embeddings=False,
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        dtype="bfloat16",
    )


class RandomWeights:
    """As much of a checkpoint as a decoder asks for; the same numbers each time it is read in order."""

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.Generator(device).manual_seed(0)
        self._device = device

    def load(self, name: str, *shape: int) -> Tensor:
        if len(shape) == 1:
            return torch.ones(shape, device=self._device)
        weights = torch.randn(shape, generator=self._generator, device=self._device)
        return weights.mul_(shape[-1] ** -0.5)


def make_model(plan: Plan, dtype: torch.dtype) -> Decoder:
    weights: Any = RandomWeights(plan.device)
    return Decoder(plan.config, weights, plan.device, dtype)


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(plan: Plan, call: Callable[[], object]) -> float:
    """Of one call, by the host's clock around the device's work: the median of some rounds."""
    call()
    rounds = []
    for _ in range(plan.rounds):
        wait(plan.device)
        began = time.perf_counter()
        for _ in range(plan.repeats):
            call()
        wait(plan.device)
        rounds.append((time.perf_counter() - began) / plan.repeats)
    return statistics.median(rounds)


def replayed(plan: Plan, call: Callable[[], object]) -> Callable[[], object]:
    """`call` as a CUDA graph, so that what is timed is not the launching."""
    if plan.device.type != "cuda":
        return call
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def copy_speed(plan: Plan) -> float:
    """Bytes per second, read and written."""
    source = torch.randint(0, 100, (plan.copy_bytes // 4,), dtype=torch.int32, device=plan.device)
    target = torch.empty_like(source)
    return 2 * plan.copy_bytes / seconds(plan, lambda: target.copy_(source))


def product_speed(plan: Plan) -> float:
    """Floating-point operations per second of a large matrix product."""
    size = plan.product_size
    a, b = (torch.randn(size, size, device=plan.device).to(plan.dtype) for _ in range(2))
    return 2 * size**3 / seconds(plan, lambda: a @ b)


def random_pool(plan: Plan, layers: int, tokens: int) -> Tensor:
    config = plan.config
    shape = (plan.blocks(tokens), layers, 2, config.num_kv_heads, plan.block_tokens, config.head_dim)
    pool = allocate_pool(shape, plan.dtype, plan.device)
    pool.normal_()
    return pool


def tables(plan: Plan, rows: int, context: int) -> list[list[int]]:
    """Pages in no order."""
    each = plan.blocks(context)
    pages = torch.randperm(rows * each, generator=torch.Generator().manual_seed(1)).tolist()
    return [pages[row * each : (row + 1) * each] for row in range(rows)]


def error(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted.float()).norm() / wanted.float().norm())


def check_attention(plan: Plan, ops: Any) -> float:
    """Decoding and a chunk, against plain torch in float32."""
    queries, totals = [1, 1, plan.check // 4], [1, 2 * plan.check, plan.check]
    pages = tables(plan, 3, max(totals))
    pool = random_pool(plan, 1, 3 * plan.block_tokens * len(pages[0]))
    q = torch.randn(sum(queries), plan.config.num_heads, plan.config.head_dim, device=plan.device).to(plan.dtype)
    heads = plan.config.num_heads
    got = ops.paged_attention(q, pool, 0, ops.metadata_builder(pool, heads, (0,))(queries, totals, pages), 0)
    exact = pool.float()
    metadata = TORCH.metadata_builder(exact, heads, (0,))(queries, totals, pages)
    return error(got, TORCH.paged_attention(q.float(), exact, 0, metadata, 0))


def check_logits(plan: Plan) -> float:
    """A prompt, and a decode step after it, of a model of two layers, against plain torch in float32."""
    small = replace(plan, config=replace(plan.config, num_layers=2, windows=plan.config.windows[:2]))
    prompt = torch.randint(0, plan.config.vocab_size, (plan.check,), generator=torch.Generator().manual_seed(2))
    found = []
    for dtype in (torch.float32, plan.dtype):
        model = make_model(small, dtype)
        pool = random_pool(replace(small, dtype=dtype), 2, plan.check + 1).zero_()
        pages = list(range(pool.shape[0]))
        build = model.ops.metadata_builder(pool, plan.config.num_heads, (0,))
        hidden = model.forward(prompt.to(plan.device), pool, build([plan.check], [plan.check], [pages]))
        found.append(model.logits(hidden[-1:]))
        token = torch.tensor([7], device=plan.device)
        if model.ops.static is None or dtype == torch.float32:
            found.append(model.logits(model.forward(token, pool, build([1], [plan.check + 1], [pages]))))
        else:
            step = decode_step(small, model, pool, 1, len(pages))
            step.tell_pages([0] * len(pages), pages, pages)
            found.append(step.run(torch.tensor([[plan.check], [7], [-1]]).numpy(), None))
    return max(error(found[2], found[0]), error(found[3], found[1]))


def decode_step(plan: Plan, model: Decoder, pool: Tensor, rows: int, max_blocks: int) -> DecodeStep:
    if model.ops.static is None:
        raise SystemExit("triton is not installed: there is nothing to measure")
    step = DecodeStep(model, model.ops.static, pool, (0,), rows, max_blocks, plan.config.vocab_size)
    step.sizes = (rows,)
    if plan.device.type == "cuda":
        step.capture(None)
    return step


def attention_rows(plan: Plan, ops: Any, copy: float) -> list[list[str]]:
    found = []
    for rows, context in plan.attention:
        pool = random_pool(plan, 1, rows * plan.blocks(context) * plan.block_tokens)
        metadata = ops.metadata_builder(pool, plan.config.num_heads, (0,))(
            [1] * rows, [context] * rows, tables(plan, rows, context)
        )
        q = torch.randn(rows, plan.config.num_heads, plan.config.head_dim, device=plan.device).to(plan.dtype)
        took = seconds(plan, replayed(plan, lambda q=q, p=pool, m=metadata: ops.paged_attention(q, p, 0, m, 0)))  # type: ignore[misc]
        moved = rows * context * 2 * plan.config.num_kv_heads * plan.config.head_dim * plan.dtype.itemsize
        found.append([f"paged decode attention {rows} x {context}", f"{moved / took / 1e12:.2f} TB/s"])
        found[-1].append(f"{moved / took / copy:.2f} of copy")
    return found


def weight_count(config: ModelConfig) -> int:
    """Weights that a token is multiplied with, the head included."""
    heads = config.num_heads + 2 * config.num_kv_heads + config.num_heads
    layer = config.hidden_size * (heads * config.head_dim + 3 * config.intermediate_size)
    return config.num_layers * layer + config.vocab_size * config.hidden_size


def kv_bytes(plan: Plan) -> int:
    """Of one token, in all layers."""
    config = plan.config
    return 2 * config.num_layers * config.num_kv_heads * config.head_dim * plan.dtype.itemsize


def decode_rows(plan: Plan, model: Decoder, copy: float, product: float) -> list[list[str]]:
    """Steps over their roofline: weights read once or multiplied, whichever takes longer, and every key and value."""
    found = []
    weights = weight_count(plan.config)
    for rows in plan.decode_rows:
        context = plan.decode_context
        pool = random_pool(plan, plan.config.num_layers, rows * plan.blocks(context) * plan.block_tokens)
        pages = tables(plan, rows, context)
        step = decode_step(plan, model, pool, rows, len(pages[0]))
        for row, table_ in enumerate(pages):
            step.tell_pages([row] * len(table_), list(range(len(table_))), table_)
        inputs = torch.tensor([[context - 1] * rows, [5] * rows, [-1] * rows]).numpy()
        took = seconds(plan, lambda step=step, inputs=inputs: step.run(inputs, None))  # type: ignore[misc]
        floor = max(weights * plan.dtype.itemsize / copy, 2 * weights * rows / product)
        floor += rows * context * kv_bytes(plan) / copy
        found.append([f"decode step {rows} x {context}", f"{took * 1e3:.2f} ms, {rows / took:.0f} tokens/s"])
        found[-1].append(f"{floor / took:.2f} of roofline")
        del pool, step
    return found


def prefill_rows(plan: Plan, model: Decoder, product: float) -> list[list[str]]:
    config, found = plan.config, []
    for length in plan.prefill:
        pool = random_pool(plan, config.num_layers, plan.blocks(length) * plan.block_tokens)
        pages = list(range(pool.shape[0]))
        build = model.ops.metadata_builder(pool, config.num_heads, (0,))
        tokens = torch.randint(0, config.vocab_size, (length,), device=plan.device)

        def run(length: int = length, pool: Tensor = pool, build: Any = build, tokens: Tensor = tokens) -> Tensor:
            metadata = build([length], [length], [list(range(pool.shape[0]))])
            return model.logits(model.forward(tokens, pool, metadata)[-1:])

        took = seconds(plan, run)
        work = 2 * (weight_count(config) - config.vocab_size * config.hidden_size) * length
        work += 2 * config.num_layers * config.num_heads * config.head_dim * length**2
        found.append([f"prefill {length}", f"{length / took:.0f} tokens/s", f"{work / took / product:.2f} of product"])
        del pool, pages
    return found


def prompts(plan: Plan) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, plan.config.vocab_size, (plan.requests, plan.prompt), generator=generator).tolist()


def generation_rows(plan: Plan, model: Decoder) -> list[list[str]]:
    """The whole engine: tokens per second, and how much longer a decode step takes than the device needs for it."""
    config, length = plan.config, plan.prompt + plan.output
    blocks = plan.requests * (plan.blocks(length) + 1)
    layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, plan.block_tokens, str(plan.dtype)[6:])
    runner = ModelRunner(config, model, layout, blocks, length, b"", plan.device, plan.requests)
    budget = max(2048, plan.requests)
    steps: list[float] = []
    took = 0.0
    for measured in (False, True):
        engine = Engine(runner, EngineConfig(plan.requests, budget, length))
        for i, tokens in enumerate(prompts(plan)):
            params = SamplingParams(max_tokens=plan.output, temperature=0.0)
            engine.add(EngineRequest(str(i), tokens, len(tokens), params, bytes([measured]) * 16))
        wait(plan.device)
        began = time.perf_counter()
        while engine.has_work:
            before = time.perf_counter()
            output = engine.step()
            if measured and output.num_scheduled_tokens == len(output.tokens) == plan.requests:
                steps.append(time.perf_counter() - before)
        took = time.perf_counter() - began
    whole = statistics.median(steps)
    pool = random_pool(plan, config.num_layers, plan.requests * plan.blocks(length) * plan.block_tokens)
    pages = tables(plan, plan.requests, length)
    step = decode_step(plan, model, pool, plan.requests, len(pages[0]))
    for row, table_ in enumerate(pages):
        step.tell_pages([row] * len(table_), list(range(len(table_))), table_)
    middle = plan.prompt + plan.output // 2
    inputs = torch.tensor([[middle] * plan.requests, [5] * plan.requests, [-1] * plan.requests]).numpy()
    alone = seconds(plan, lambda: step.run(inputs, None))
    name = f"{plan.requests} requests, {plan.prompt} in, {plan.output} out"
    return [
        [f"kvmesh, {name}", f"{plan.requests * plan.output / took:.0f} tokens/s", ""],
        ["decode step in the engine, without sampling", f"{whole * 1e3:.2f} ms, {alone * 1e3:.2f} ms", ""],
        ["host gap per decode step, sampling included", f"{max(0.0, whole - alone) * 1e3:.2f} ms", ""],
    ]


def peer_rows(plan: Plan) -> list[list[str]]:
    """transformers' continuous batching, with CUDA graphs where it can."""
    config = plan.config
    torch.set_default_dtype(plan.dtype)
    try:
        with plan.device:
            model: Any = LlamaForCausalLM(
                LlamaConfig(
                    vocab_size=config.vocab_size,
                    hidden_size=config.hidden_size,
                    intermediate_size=config.intermediate_size,
                    num_hidden_layers=config.num_layers,
                    num_attention_heads=config.num_heads,
                    num_key_value_heads=config.num_kv_heads,
                    max_position_embeddings=config.rope.max_positions,
                )
            )
    finally:
        torch.set_default_dtype(torch.float32)
    make: Any = GenerationConfig
    how = make(max_new_tokens=plan.output, do_sample=False, eos_token_id=-1, pad_token_id=0)
    batching = ContinuousBatchingConfig(max_batch_tokens=2048)

    def generate() -> None:
        answers = model.generate_batch(
            prompts(plan), generation_config=how, continuous_batching_config=batching, progress_bar=False
        )
        if [len(answer.generated_tokens) for answer in answers.values()] != [plan.output] * plan.requests:
            raise RuntimeError("continuous batching did not finish every request")

    generate()
    began = time.perf_counter()
    generate()
    took = time.perf_counter() - began
    return [["transformers, continuous batching", f"{plan.requests * plan.output / took:.0f} tokens/s", ""]]


@torch.inference_mode()
def measure(plan: Plan, deadline: float, say: Callable[[str], None] = print) -> int:
    copy, product = copy_speed(plan), product_speed(plan)
    say(f"ceilings: copy {copy / 1e12:.2f} TB/s, {plan.product_size}^3 product {product / 1e12:.0f} TFLOP/s")
    model = make_model(plan, plan.dtype)
    wrong = {"attention": check_attention(plan, model.ops), "logits": check_logits(plan)}
    say(", ".join(f"relative error of {name} {value:.1e}" for name, value in wrong.items()))
    if max(wrong.values()) > TOLERANCE:
        say(f"wrong: more than {TOLERANCE}; nothing is timed")
        return 1
    parts: Sequence[tuple[str, Callable[[], list[list[str]]]]] = (
        ("attention", lambda: attention_rows(plan, model.ops, copy)),
        ("decode", lambda: decode_rows(plan, model, copy, product)),
        ("prefill", lambda: prefill_rows(plan, model, product)),
        ("generation", lambda: generation_rows(plan, model)),
        ("transformers", lambda: peer_rows(plan)),
    )
    found = []
    for name, part in parts:
        if time.monotonic() > deadline:
            say(f"left out, no time: {name}")
            continue
        try:
            found += part()
        except Exception as failure:  # the other parts still say something
            say(f"left out: {name}: {type(failure).__name__}: {failure}")
    say(table(["what", "measured", "ratio"], found))
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no part after eight tenths of these")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(NO_DEVICE, file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    return measure(Plan(llama_8b(), torch.device("cuda")), time.monotonic() + 0.8 * 60 * arguments.minutes)


if __name__ == "__main__":
    sys.exit(main())
