"""Workers with the simulated engine, and what an undisturbed one would say."""

from __future__ import annotations

from tokenizers import Tokenizer

from engine.sim_engine import PRINTABLE, expected_tokens
from tests.byte_model import byte_model
from tests.e2e.processes import Deployment, wait_until

FLAGS = ("--engine", "sim", "--sim-step-s", "0.03", "--max-num-batched-tokens", "64", "--max-model-len", "4096")


def expected(prompt: list[int], tokens: int) -> str:
    """What an undisturbed engine says."""
    ids = expected_tokens(prompt, tokens, PRINTABLE.stop, first_token=PRINTABLE.start)
    text: str = Tokenizer.from_file(str(byte_model() / "tokenizer.json")).decode(ids)
    return text


def busy(service: Deployment, role: str) -> str:
    """The worker of `role` that has a request, waited for."""
    names = [n for n, w in service.workers.items() if w.role == role]
    found: list[str] = []

    def look() -> bool:
        found[:] = [n for n in names if service.workers[n].metric("vllm:num_requests_running") > 0]
        return bool(found)

    wait_until(look, f"a busy {role} worker")
    return found[0]
