"""Our engine beside transformers' `generate`, its continuous batching and vLLM's CPU build, in turn, in one run.

    python -m benchmarks.peers [--dtype bfloat16] [--rounds 2] [--only ours,hf_continuous] [--vllm PYTHON]

The model is a random 125 M Llama (hidden 768, 12 layers, 12/4 heads, vocabulary 32,000), one thread. First come the
limits of the machine, then the outputs are checked, then it is timed: in every round the contenders take turns, and a
figure is the median of the steps that had a core to themselves. A ratio is taken within a round; where the rounds'
ratios differ by more than a tenth there is none. `make bench-peers` installs vLLM's CPU build into an environment of
its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.launcher import WORKER_LOAD_TIME_DEFAULTS

os.environ.update({**WORKER_LOAD_TIME_DEFAULTS, **os.environ, "OMP_NUM_THREADS": "1"})  # for every contender

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import Samples, machine, table

ROOT = Path(__file__).resolve().parents[2]
HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB = 768, 2048, 12, 12, 4, 32000
HEAD_DIM = HIDDEN // HEADS
LAYER_WEIGHTS = HIDDEN * (HIDDEN + 2 * KV_HEADS * HEAD_DIM) + HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE
STEP_WEIGHTS = LAYERS * LAYER_WEIGHTS + HIDDEN * VOCAB
"""That a decode step reads; the embedding is read in one row per token."""
READ_BYTES = 256 << 20
MATMUL = 2048
MAX_SPREAD = 1.10
NAMES = ("ours", "hf_generate", "hf_continuous", "vllm_cpu")


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    prefill: bool
    batch: int
    prompt: int
    new: int
    repeats: int

    @property
    def tokens(self) -> int:
        """Of one step."""
        return self.batch * self.prompt if self.prefill else self.batch

    @property
    def operations(self) -> float:
        """Of the prompts' step: the layers' products, the last position's logits, half of each score matrix."""
        scores = 2 * 2 * LAYERS * HEADS * HEAD_DIM * self.prompt**2 / 2
        return self.batch * (2 * LAYERS * LAYER_WEIGHTS * self.prompt + 2 * HIDDEN * VOCAB + scores)


CASES = (
    Case("prefill 1 x 512", True, 1, 512, 2, 9),
    Case("prefill 16 x 128", True, 16, 128, 2, 4),
    Case("decode B=1", False, 1, 128, 24, 6),
    Case("decode B=16", False, 16, 128, 24, 3),
)


def make_model(directory: Path) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCAB,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        initializer_range=0.05,
    )
    LlamaForCausalLM(config).save_pretrained(directory)


def prompts(count: int, seed: int, length: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (count, length), generator=generator).tolist()


class Failed(Exception):
    """A contender cannot run here, or not so."""


class Process:
    """A contender, from here."""

    def __init__(self, name: str, python: str, model: Path, dtype: str) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the child
        self._child = subprocess.Popen(
            [python, "-m", f"benchmarks.peers.{name}", str(model), dtype],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self.version = ""

    def start(self) -> None:
        self.version = self._answer()["version"]

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        tokens: list[list[int]] = self._ask(what="generate", prompts=prompts, new=new)["tokens"]
        return tokens

    def measure(self, case: Case, seed: int, samples: Samples) -> None:
        answer = self._ask(what="measure", prompts=prompts(case.batch, seed, case.prompt), new=case.new)
        seconds, delays = answer["prefill" if case.prefill else "decode"]
        if case.prefill and seconds:  # in however many steps it did it
            wall = sum(seconds)
            delays = [sum(s * d for s, d in zip(seconds, delays, strict=True)) / wall]
            seconds = [wall]
        samples.seconds += seconds
        samples.delays += delays

    def close(self) -> None:
        assert self._child.stdin is not None
        self._child.stdin.close()
        try:
            self._child.wait(20)
        except subprocess.TimeoutExpired:
            self._child.kill()

    def _ask(self, **order: Any) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(order) + "\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        answer: dict[str, Any] = json.loads(line) if line else {"failed": self._last_words()}
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = [line.strip() for line in self._log if line.strip()]
        return lines[-1] if lines else "it ended without a word"


def read_bandwidth() -> float:
    """Bytes per second of one thread summing memory."""
    data = torch.ones(READ_BYTES // 4)
    samples = Samples()
    for _ in range(8):
        samples.time(data.sum)
    return READ_BYTES / samples.median


def matmul_rate(dtype: torch.dtype) -> float:
    """Operations per second of one large product with packed weights: the fastest that torch has on a CPU."""
    a = torch.randn(MATMUL, MATMUL).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(torch.randn(MATMUL, MATMUL).to(dtype), MATMUL)
    samples = Samples()
    with torch.inference_mode():
        for _ in range(8):
            samples.time(lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], ""))
    return 2 * MATMUL**3 / samples.median


def check(contenders: Sequence[Process], reference: list[list[int]], length: int, new: int) -> list[Process]:
    """Those whose greedy tokens are transformers' own; rounding may part two ways after some tokens."""
    good = []
    for contender in contenders:
        try:
            got = contender.generate(prompts(len(reference), 7, length), new)
        except Failed as error:
            print(f"left out: {contender.name}: {error}")
            continue
        same = sum(a == b for x, y in zip(got, reference, strict=True) for a, b in zip(x, y, strict=True))
        total = sum(map(len, reference))
        print(f"{contender.name} {contender.version}: {same} of {total} tokens as `generate` in float32")
        if same < total / 2:
            print(f"left out: {contender.name}: wrong tokens")
        else:
            good.append(contender)
    return good


def started(name: str, python: str, model: Path, dtype: str) -> Process | None:
    process = Process(name, python, model, dtype)
    try:
        process.start()
    except Failed as error:
        print(f"left out: {name}: {error}")
        process.close()
        return None
    return process


def exact(model: Path, python: str, reference: list[list[int]], length: int, new: int) -> None:
    """Ours in float32 says what transformers says, or nothing is timed."""
    ours = Process("ours", python, model, "float32")
    ours.start()
    got = ours.generate(prompts(len(reference), 7, length), new)
    ours.close()
    if got != reference:
        raise SystemExit(f"wrong tokens: {got}, transformers says {reference}")


def run(model: Path, arguments: argparse.Namespace) -> None:
    make_model(model)
    dtype = getattr(torch, arguments.dtype)
    bandwidth, rate = read_bandwidth(), matmul_rate(dtype)
    weights = STEP_WEIGHTS * dtype.itemsize
    print(f"{machine()}; one thread, {arguments.dtype}, {arguments.rounds} rounds")
    print(f"limits: reads {bandwidth / 1e9:.1f} GB/s, multiplies {rate / 1e9:.0f} GFLOP/s")
    length, new = 61, 12
    plain = Process("hf_generate", sys.executable, model, "float32")
    plain.start()
    reference = plain.generate(prompts(2, 7, length), new)
    plain.close()
    exact(model, sys.executable, reference, length, new)
    pythons = {"vllm_cpu": str(arguments.vllm)}
    names = [name for name in NAMES if name in arguments.only.split(",")]
    found = [started(n, pythons.get(n, sys.executable), model, arguments.dtype) for n in names]
    contenders = check([p for p in found if p is not None], reference, length, new)
    rates: dict[tuple[str, str], list[float]] = {}
    noisy: set[tuple[str, str]] = set()
    for case in CASES:
        for contender in contenders:
            contender.measure(case, 99, Samples())  # warm-up
        for round_ in range(arguments.rounds):
            found_here = [Samples() for _ in contenders]
            for repeat in range(case.repeats):
                for contender, samples in zip(contenders, found_here, strict=True):
                    contender.measure(case, 1000 * round_ + repeat, samples)
            for contender, samples in zip(contenders, found_here, strict=True):
                if samples.seconds:
                    key = (contender.name, case.name)
                    rates.setdefault(key, []).append(case.tokens / samples.median)
                    if not samples.is_clean:
                        noisy.add(key)
    for process in found:
        if process is not None:
            process.close()
    report(contenders, rates, noisy, bandwidth / weights, rate)
    if arguments.json:
        figures = {f"{name}, {case}": values for (name, case), values in rates.items()}
        print(json.dumps({"machine": machine(), "bytes_per_s": bandwidth, "flop_per_s": rate, "rounds": figures}))


def report(
    contenders: Sequence[Process],
    rates: dict[tuple[str, str], list[float]],
    noisy: set[tuple[str, str]],
    decode_limit: float,
    matmul: float,
) -> None:
    """Ratios first, tokens/s after them; `~`: too few steps had a core to themselves."""
    rows = []
    for other in contenders:
        if other.name != "ours":
            cells = [ratio(rates.get(("ours", c.name)), rates.get((other.name, c.name))) for c in CASES]
            rows.append([f"ours / {other.name}", *cells])
    limits = [[matmul * c.tokens / c.operations if c.prefill else decode_limit if c.batch == 1 else 0.0] for c in CASES]
    cells = [
        ratio(rates.get(("ours", c.name)), limit * len(rates[("ours", c.name)])) if limit[0] else ""
        for c, limit in zip(CASES, limits, strict=True)
    ]
    rows.append(["ours / limit", *cells])
    for contender in contenders:
        cells = []
        for case in CASES:
            values = rates.get((contender.name, case.name))
            mark = "~" if (contender.name, case.name) in noisy else ""
            cells.append(f"{mark}{statistics.median(values):.0f}" if values else "")
        rows.append([f"{contender.name}, tokens/s", *cells])
    rows.append(["limit, tokens/s", *(f"{limit[0]:.0f}" if limit[0] else "" for limit in limits)])
    print(table(["", *(c.name for c in CASES)], rows))


def ratio(ours: list[float] | None, others: list[float] | None) -> str:
    """Of the rounds, with its spread; refused when it is too wide."""
    if not ours or not others:
        return ""
    each = [a / b for a, b in zip(ours, others, strict=True)]
    low, high = min(each), max(each)
    if high > MAX_SPREAD * low:
        return f"refused: {low:.2f} to {high:.2f}"
    return f"{statistics.median(each):.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", default=",".join(NAMES), help=f"of {', '.join(NAMES)}")
    parser.add_argument("--vllm", default=sys.executable, help="the Python that has vLLM (default: this one)")
    parser.add_argument("--json", action="store_true", help="also print every round's figures as JSON")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error("--rounds is at least 2: one round says nothing about the next")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        run(Path(directory), arguments)


if __name__ == "__main__":
    main()
