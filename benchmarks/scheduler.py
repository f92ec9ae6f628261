"""What a step costs besides the model, with 256 requests that decode.

    python -m benchmarks.scheduler [--requests 256] [--context 1024] [--rounds 5]

The engine is the real one; its runner only says which token comes next. "Decoding ahead" adds the bookkeeping of
`engine.decoding`, around buffers on the CPU and a model that does nothing: what a CUDA device would wait for, were its
step shorter.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.measure import Samples, machine, table
from engine.decode_step import DecodeStep
from engine.decoding import Decoding
from engine.engine import Engine, EngineConfig
from engine.request import EngineRequest
from engine.step import Row, Sampled
from kernels.operators import StaticBuilder, StaticOperators
from kernels.sampling import Draws, draw
from mesh.layout import KvLayout
from mesh.params import SamplingParams
from mesh.pieces import Piece

BLOCK_TOKENS = 16
TOKEN = 7
GOAL_MS = 0.5
STEPS = 200


class NoModel:
    """A runner that computes nothing."""

    decodes_ahead: bool = False

    def __init__(self, num_blocks: int, max_rows: int, max_blocks: int) -> None:
        self.layout = KvLayout(layers=1, kv_heads=1, head_dim=4, block_tokens=BLOCK_TOKENS, dtype="uint8")
        self.num_blocks = num_blocks

    def run(self, rows: Sequence[Row]) -> list[Sampled]:
        return [Sampled(TOKEN if row.samples else None) for row in rows]

    def read_block(self, block: int, valid_tokens: int) -> bytes:
        raise NotImplementedError

    def write_block(self, block: int, payload: bytes | memoryview) -> None:
        raise NotImplementedError

    def write_parts(self, payload: bytes | memoryview, theirs: KvLayout, parts: Sequence[tuple[int, Piece]]) -> None:
        raise NotImplementedError


class NoDecoder:
    """As much of a decoder as a decode step calls."""

    def forward(self, tokens: Tensor, pool: Tensor, metadata: Tensor) -> Tensor:
        return tokens

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden[:, None]


def no_metadata(pool: Tensor, windows: Collection[int]) -> StaticBuilder[Any]:
    return lambda positions, tables: positions


def pack(draws: Draws, vocab: int) -> NDArray[np.float64]:
    return np.array((draws.temperature, draws.top_k, draws.top_p, draws.min_p, draws.uniform), np.float64).T


class NoModelAhead(NoModel):
    """The same, decoding ahead."""

    decodes_ahead = True

    def __init__(self, num_blocks: int, max_rows: int, max_blocks: int) -> None:
        super().__init__(num_blocks, max_rows, max_blocks)
        model: Any = NoDecoder()
        static = StaticOperators(no_metadata, pack, lambda logits, numbers: logits[:, 0])
        step = DecodeStep(model, static, torch.empty(0), (0,), max_rows, max_blocks, 1)
        self.decoding = Decoding(step, BLOCK_TOKENS, draw)

    def run(self, rows: Sequence[Row]) -> list[Sampled]:
        return self.decoding.run(rows, super().run)


def measure(runner_type: type[NoModel], requests: int, context: int, temperature: float) -> Samples:
    """Steps in which every request decodes, from `context` tokens on."""
    length = context + STEPS + 8
    max_blocks = -(-length // BLOCK_TOKENS)
    runner = runner_type(requests * (max_blocks + 1), requests, max_blocks)
    engine = Engine(runner, EngineConfig(requests, requests * context, length))
    for i in range(requests):
        prompt = [i + 10] * context
        params = SamplingParams(max_tokens=STEPS + 4, temperature=temperature, seed=i)
        engine.add(EngineRequest(str(i), prompt, context, params, i.to_bytes(16, "little")))
    for _ in range(3):
        engine.step()
    samples = Samples()
    for _ in range(STEPS):
        output = samples.time(engine.step)
        if len(output.tokens) != requests:
            raise SystemExit(f"{len(output.tokens)} tokens in a step of {requests} requests")
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    cases = {
        "schedule, update, emit": (NoModel, 0.0),
        "the same and decoding ahead, greedy": (NoModelAhead, 0.0),
        "the same and decoding ahead, drawn": (NoModelAhead, 0.8),
    }
    found = {name: Samples() for name in cases}
    for _ in range(arguments.rounds):
        for name, (runner, temperature) in cases.items():
            found[name].extend(measure(runner, arguments.requests, arguments.context, temperature), 0)
    print(f"{machine()}; {arguments.requests} requests, context {arguments.context}, goal {GOAL_MS} ms\n")
    rows = [[name, f"{s.median * 1e3:.2f}", f"{min(s.clean) * 1e3:.2f}"] for name, s in found.items()]
    print(table(["per step", "median ms", "best ms"], rows))


if __name__ == "__main__":
    main()
