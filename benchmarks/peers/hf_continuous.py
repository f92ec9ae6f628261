"""transformers' continuous batching (`generate_batch`)."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import ContinuousBatchingConfig, GenerationConfig, LlamaForCausalLM
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager

from benchmarks.measure import Samples
from benchmarks.peers.contender import Contender, Steps, serve

make_config: Any = GenerationConfig


class HfContinuous:
    def __init__(self, model: str, dtype: str) -> None:
        self.version = transformers.__version__
        torch.set_num_threads(1)
        self._model: Any = LlamaForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        answers = self._model.generate_batch(
            prompts,
            generation_config=make_config(max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=256, max_batch_tokens=4096, use_cuda_graph=False
            ),
            progress_bar=False,
        )
        return [list(a.generated_tokens) for a in answers.values()]

    def measure(self, prompts: list[list[int]], new: int) -> Steps:
        """Its loop's body is timed; of its passes, the last `new - 1` are those in which every request decodes."""
        passes = Samples()
        body = ContinuousBatchingManager._generation_loop_body

        def timed(manager: ContinuousBatchingManager, *arguments: Any, **named: Any) -> Any:
            before = manager.current_batch
            going_on = passes.time(lambda: body(manager, *arguments, **named))
            if manager.current_batch == before:  # it only waited for requests
                passes.drop_last()
            return going_on

        with patch.object(ContinuousBatchingManager, "_generation_loop_body", timed):
            made = [len(tokens) for tokens in self.generate(prompts, new)]
        if made != [new] * len(prompts):
            raise RuntimeError(f"it made {made} tokens instead of {new} each")
        steps = Steps()
        steps.decode.extend(passes, first=len(passes.seconds) - new + 1)
        return steps


def make(model: str, dtype: str) -> Contender:
    return HfContinuous(model, dtype)


if __name__ == "__main__":
    serve(make)
