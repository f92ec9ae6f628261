"""transformers' `generate`."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import transformers
from transformers import LlamaForCausalLM
from transformers.generation.stopping_criteria import StoppingCriteria, StoppingCriteriaList

from benchmarks.measure import Samples, now_and_delay
from benchmarks.peers.contender import Contender, Steps, serve


class Clock(StoppingCriteria):
    """Notes the time of every step."""

    def __init__(self) -> None:
        self.marks = [now_and_delay()]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: object) -> torch.Tensor:
        self.marks.append(now_and_delay())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool)


class HfGenerate:
    def __init__(self, model: str, dtype: str) -> None:
        self.version = transformers.__version__
        torch.set_num_threads(1)
        self._model: Any = LlamaForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self._model.generation_config.eos_token_id = None
        self._model.generation_config.pad_token_id = 0

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        return [self._generate([tokens], new)[0] for tokens in prompts]

    def measure(self, prompts: list[list[int]], new: int) -> Steps:
        clock = Clock()
        self._generate(prompts, new, stopping_criteria=StoppingCriteriaList([clock]))
        steps = Steps()
        for i, (before, after) in enumerate(pairwise(clock.marks)):
            samples: Samples = steps.decode if i else steps.prefill
            samples.add(before, after)
        return steps

    def _generate(self, prompts: list[list[int]], new: int, **more: Any) -> list[list[int]]:
        with torch.inference_mode():
            out = self._model.generate(torch.tensor(prompts), max_new_tokens=new, do_sample=False, **more)
        ids: list[list[int]] = out[:, len(prompts[0]) :].tolist()
        return ids


def make(model: str, dtype: str) -> Contender:
    return HfGenerate(model, dtype)


if __name__ == "__main__":
    serve(make)
