"""vLLM's engine, in its CPU build. Runs in vLLM's own environment."""

from __future__ import annotations

import os
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

from benchmarks.peers.contender import Contender, Stepped, Steps, serve


class Vllm:
    def __init__(self, model: str, dtype: str) -> None:
        import vllm  # type: ignore[import-not-found,unused-ignore]

        self.version = vllm.__version__
        self._params = vllm.SamplingParams
        self._llm: Any = vllm.LLM(
            model=model,
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=2048,
            max_num_seqs=64,
            max_num_batched_tokens=4096,
            enable_prefix_caching=False,
            async_scheduling=False,
            disable_log_stats=True,
        )
        self._count = 0

    def _add(self, prompts: list[list[int]], new: int) -> list[str]:
        names = []
        for tokens in prompts:
            self._count += 1
            names.append(str(self._count))
            params = self._params(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
            self._llm.llm_engine.add_request(names[-1], {"prompt_token_ids": tokens}, params)
        return names

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        made: dict[str, list[int]] = {name: [] for name in self._add(prompts, new)}
        while self._llm.llm_engine.has_unfinished_requests():
            for output in self._llm.llm_engine.step():
                made[output.request_id] = list(output.outputs[0].token_ids)
        return list(made.values())

    def measure(self, prompts: list[list[int]], new: int) -> Steps:
        self._add(prompts, new)

        def step() -> dict[str, int]:
            return {o.request_id: len(o.outputs[0].token_ids) for o in self._llm.llm_engine.step()}

        return Stepped(step, len(prompts)).run(self._llm.llm_engine.has_unfinished_requests)


def make(model: str, dtype: str) -> Contender:
    return Vllm(model, dtype)


if __name__ == "__main__":
    serve(make)
