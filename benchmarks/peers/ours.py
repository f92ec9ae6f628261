"""kvmesh's engine: no sockets, one thread."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from benchmarks.peers.contender import Contender, Stepped, Steps, serve
from engine.engine import Engine, EngineConfig
from engine.request import EngineRequest
from engine.runner import ModelRunner
from mesh.params import SamplingParams


class Ours:
    def __init__(self, model: str, dtype: str) -> None:
        self.version = version("kvmesh")
        runner = ModelRunner.load(
            Path(model),
            device="cpu",
            dtype=dtype,
            block_tokens=16,
            num_blocks=1024,
            memory_utilization=0.5,
            max_model_len=2048,
            max_num_batched_tokens=4096,
        )
        self._engine = Engine(runner, EngineConfig(64, 4096, 2048))
        self._count = 0

    def _add(self, prompts: list[list[int]], new: int) -> list[str]:
        names = []
        for tokens in prompts:
            self._count += 1
            names.append(str(self._count))
            params = SamplingParams(max_tokens=new, temperature=0.0)
            # a root of its own per request: no prefix is ever shared
            root = self._count.to_bytes(16, "little")
            self._engine.add(EngineRequest(names[-1], list(tokens), len(tokens), params, root))
        return names

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        made: dict[str, list[int]] = {name: [] for name in self._add(prompts, new)}
        while self._engine.has_work:
            for token in self._engine.step().tokens:
                made[token.request.key].append(token.token)
        return list(made.values())

    def measure(self, prompts: list[list[int]], new: int) -> Steps:
        self._add(prompts, new)

        def step() -> dict[str, int]:
            return {token.request.key: 1 for token in self._engine.step().tokens}

        return Stepped(step, len(prompts)).run(lambda: self._engine.has_work)


def make(model: str, dtype: str) -> Contender:
    return Ours(model, dtype)


if __name__ == "__main__":
    serve(make)
