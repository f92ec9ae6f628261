"""The simulated runner, decoding ahead: the real buffers and bookkeeping around a model that reads whole histories back
through the page tables it was told."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.decode_step import DecodeStep
from engine.decoding import Decoding
from engine.request import EngineRequest
from engine.sim_engine import SimRunner
from engine.step import Row, Sampled
from kernels.operators import StaticBuilder, StaticOperators
from kernels.sampling import Draws, draw
from mesh.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Places:
    """What a step was told."""

    positions: Tensor
    tables: Tensor


def static_metadata_builder(pool: Tensor, windows: Collection[int]) -> StaticBuilder[Places]:
    return Places


def pack_draws(draws: Draws, vocab: int) -> NDArray[np.float64]:
    return np.array([draws.temperature], np.float64).T


def draw_packed(logits: Tensor, numbers: Tensor) -> Tensor:
    """The simulated "logits" are the token."""
    assert len(numbers) == len(logits)
    return logits[:, 0].long()


STATIC = StaticOperators(static_metadata_builder, pack_draws, draw_packed)


class SimDecoder:
    """As much of a decoder as a step calls."""

    def __init__(self, runner: AheadRunner) -> None:
        self.runner = runner

    def forward(self, tokens: Tensor, pool: Tensor, metadata: Places) -> Tensor:
        out = torch.full((len(tokens),), -1, dtype=torch.int64)
        places = [place for place, position in enumerate(metadata.positions.tolist()) if position >= 0]
        rows = []
        for place in places:
            position, table = int(metadata.positions[place]), metadata.tables[place].tolist()
            history = [0] * position + [int(tokens[place])]
            request = EngineRequest("", history, 1, SamplingParams(max_tokens=1), b"", block_table=table)
            request.num_computed_tokens = position
            rows.append(Row(request, 1))
        if rows:
            out[places] = torch.tensor([one.token for one in self.runner.compute(rows)])
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        return hidden[:, None].float()


class AheadRunner(SimRunner):
    """Decodes ahead, in buffers for eight rows of up to fifty pages."""

    decodes_ahead = True

    def __init__(self, num_blocks: int, block_tokens: int, vocab: int = 256, **options: Any) -> None:
        super().__init__(num_blocks, block_tokens, vocab, **options)
        pool = torch.from_numpy(self._pool.view(np.int64))
        model: Any = SimDecoder(self)
        self.decoding = Decoding(DecodeStep(model, STATIC, pool, (0,), 8, 50, 1), block_tokens, draw)

    def compute(self, rows: Sequence[Row]) -> list[Sampled]:
        return super().run(rows)

    def run(self, rows: Sequence[Row]) -> list[Sampled]:
        return self.decoding.run(rows, self.compute)
