"""Prefill and decode tokens/s of the engine beside transformers' `generate` and its continuous batching, in one run.

    python benchmarks/engine_cpu.py [--dtype bfloat16] [--rounds 2] [--threads 1]

The model is a random 125 M Llama (hidden 768, 12 layers, 12/4 heads, vocabulary 32,000). Greedy tokens are compared
before anything is timed. Contenders take turns; each figure is the median of steps that had a core to themselves.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # both as `kvmesh up` sets them, for every contender

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaConfig, LlamaForCausalLM
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from benchmarks.measure import Samples, machine, run_delay_s, table
from engine.engine import Engine, EngineConfig
from engine.request import EngineRequest
from engine.runner import ModelRunner
from mesh.params import SamplingParams

PROMPT = 128
STEPS = 24
READ_BYTES = 256 << 20


def make_model(directory: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=32000,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def prompts(count: int, seed: int, length: int = PROMPT) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 32000, (count, length), generator=generator).tolist()


class Ours:
    """One engine, one thread, no sockets."""

    def __init__(self, directory: Path, dtype: str) -> None:
        runner = ModelRunner.load(
            directory,
            device="cpu",
            dtype=dtype,
            block_tokens=16,
            num_blocks=1024,
            memory_utilization=0.5,
            max_model_len=2048,
            max_num_batched_tokens=4096,
            progress=None,
        )
        self.engine = Engine(runner, EngineConfig(64, 4096, 2048))
        self.count = 0

    def add(self, tokens: list[int], new: int) -> None:
        self.count += 1
        params = SamplingParams(max_tokens=new, temperature=0.0)
        # a root of its own per request: no prefix is ever shared
        self.engine.add(
            EngineRequest(str(self.count), list(tokens), len(tokens), params, self.count.to_bytes(16, "little"))
        )

    def generate(self, tokens: list[int], new: int) -> list[int]:
        self.add(tokens, new)
        out: list[int] = []
        while self.engine.has_work:
            out += [t.token for t in self.engine.step().tokens]
        return out

    def measure(self, batch: int, seed: int, prefill: Samples, decode: Samples) -> None:
        for tokens in prompts(batch, seed):
            self.add(tokens, STEPS)
        prefill.time(self.engine.step)
        while self.engine.has_work:
            decode.time(self.engine.step)


class Clock(StoppingCriteria):
    """Notes the time of every step of `generate`."""

    def __init__(self) -> None:
        self.marks = [(time.perf_counter(), run_delay_s())]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.marks.append((time.perf_counter(), run_delay_s()))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


make_config: Any = GenerationConfig


class Transformers:
    """`generate` and continuous batching of the same weights."""

    def __init__(self, directory: Path, dtype: torch.dtype) -> None:
        self.model: Any = LlamaForCausalLM.from_pretrained(directory, dtype=dtype)
        self.model.generation_config.eos_token_id = None
        self.model.generation_config.pad_token_id = 0

    def generate(self, tokens: list[int], new: int) -> list[int]:
        with torch.inference_mode():
            out = self.model.generate(torch.tensor([tokens]), max_new_tokens=new, do_sample=False)
        ids: list[int] = out[0, len(tokens) :].tolist()
        return ids

    def measure(self, batch: int, seed: int, prefill: Samples, decode: Samples) -> None:
        clock = Clock()
        with torch.inference_mode():
            self.model.generate(
                torch.tensor(prompts(batch, seed)),
                max_new_tokens=STEPS,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([clock]),
            )
        for i, (before, after) in enumerate(pairwise(clock.marks)):
            samples = decode if i else prefill
            samples.seconds.append(after[0] - before[0])
            samples.delays.append((after[1] - before[1]) / (after[0] - before[0]))

    def continuous(self, batch: int, seed: int, decode: Samples) -> None:
        """`generate_batch`; its loop's body is timed, the passes in which every request decodes are kept."""
        config = ContinuousBatchingConfig(num_blocks=256, max_batch_tokens=4096, use_cuda_graph=False)
        generation = make_config(max_new_tokens=STEPS, do_sample=False, eos_token_id=-1, pad_token_id=0)
        passes = Samples()
        body = ContinuousBatchingManager._generation_loop_body

        def timed(manager: ContinuousBatchingManager, *arguments: Any, **named: Any) -> Any:
            before = manager.current_batch
            going_on = passes.time(lambda: body(manager, *arguments, **named))
            if manager.current_batch == before:  # it only waited for requests
                passes.drop_last()
            return going_on

        with patch.object(ContinuousBatchingManager, "_generation_loop_body", timed):
            answers = self.model.generate_batch(
                prompts(batch, seed),
                generation_config=generation,
                continuous_batching_config=config,
                progress_bar=False,
            )
        made = [len(a.generated_tokens) for a in answers.values()]
        if made != [STEPS] * batch:
            raise RuntimeError(f"continuous batching made {made} tokens instead of {STEPS} each")
        decode.extend(passes, first=len(passes.seconds) - STEPS + 1)  # the passes before compute the prompts


def read_bandwidth() -> float:
    """Bytes per second of one thread summing memory."""
    data = torch.ones(READ_BYTES // 4)
    samples = Samples()
    for _ in range(8):
        samples.time(data.sum)
    return READ_BYTES / samples.median


def attempt(what: Callable[[], None]) -> None:
    """A peer that this installation cannot run is left out of the table, with the reason on screen."""
    try:
        what()
    except Exception as error:
        print(f"left out: {type(error).__name__}: {error}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="also print the figures as JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as directory:
        run(Path(directory), arguments)


def run(directory: Path, arguments: argparse.Namespace) -> None:
    make_model(directory)
    check(directory)
    bandwidth = read_bandwidth()
    ours, peer = Ours(directory, arguments.dtype), Transformers(directory, getattr(torch, arguments.dtype))
    figures: dict[str, dict[str, float]] = {}
    for batch in (1, 16):
        samples = {name: (Samples(), Samples()) for name in ("kvmesh", "generate")}
        continuous = Samples()
        ours.measure(batch, 99, Samples(), Samples())  # warm-up
        peer.measure(batch, 99, Samples(), Samples())
        for round_ in range(arguments.rounds):
            ours.measure(batch, round_, *samples["kvmesh"])
            peer.measure(batch, round_, *samples["generate"])
            attempt(partial(peer.continuous, batch, round_, continuous))
        for name, (prefill, decode) in samples.items():
            figures.setdefault(name, {})[f"prefill B={batch}"] = batch * PROMPT / prefill.median
            figures[name][f"decode B={batch}"] = batch / decode.median
        if continuous.seconds:
            figures.setdefault("continuous batching", {})[f"decode B={batch}"] = batch / continuous.median
    report(figures, bandwidth, arguments)


def check(directory: Path) -> None:
    """Equal greedy tokens in float32, or nothing is timed."""
    ours, peer = Ours(directory, "float32"), Transformers(directory, torch.float32)
    for tokens in prompts(2, 7, 61):
        got, expected = ours.generate(tokens, 12), peer.generate(tokens, 12)
        if got != expected:
            raise SystemExit(f"wrong tokens: {got}, transformers says {expected}")


def report(figures: dict[str, dict[str, float]], bandwidth: float, arguments: argparse.Namespace) -> None:
    bytes_per_weight = 2 if arguments.dtype == "bfloat16" else 4
    weights = (12 * (768 * (768 + 512) + 768 * 768 + 3 * 768 * 2048) + 768 * 32000) * bytes_per_weight
    limit = bandwidth / weights
    print(
        f"\n{machine()}; {arguments.threads} thread(s), {arguments.dtype}, prompt {PROMPT}, {arguments.rounds} rounds"
    )
    print(f"limit of decode B=1: {bandwidth / 1e9:.1f} GB/s read / {weights / 1e6:.0f} MB = {limit:.0f} tokens/s")
    columns = ["prefill B=1", "prefill B=16", "decode B=1", "decode B=16"]
    rows = []
    for name, values in figures.items():
        cells = [f"{values[c]:.0f}" if c in values else "" for c in columns]
        rows.append([name, *cells])
    for name, values in figures.items():
        if name != "kvmesh":
            cells = [f"{figures['kvmesh'][c] / values[c]:.2f}" if c in values else "" for c in columns]
            rows.append([f"kvmesh / {name}", *cells])
    rows.append(["kvmesh / limit", "", "", f"{figures['kvmesh']['decode B=1'] / limit:.2f}", ""])
    print(table(["tokens/s", *columns], rows))
    if arguments.json:
        print(json.dumps({"machine": machine(), "limit": limit, "figures": figures}))


if __name__ == "__main__":
    main()
