"""One engine that is measured, in a process of its own: so each runs in the environment that its packages need.

The driver writes a line of JSON to the process, the process answers with one. Needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from benchmarks.measure import Samples


@dataclass(slots=True)
class Steps:
    """What a batch of prompts took: the steps until each of them had a token, then those in which all had one more."""

    prefill: Samples = field(default_factory=Samples)
    decode: Samples = field(default_factory=Samples)


class Contender(Protocol):
    version: str

    def generate(self, prompts: list[list[int]], new: int) -> list[list[int]]:
        """The greedy tokens, `new` for each prompt."""

    def measure(self, prompts: list[list[int]], new: int) -> Steps:
        """The same, step by step."""


class Stepped:
    """Runs an engine that goes on in steps, and says which of them belonged to the prompts."""

    def __init__(self, step: Callable[[], dict[str, int]], count: int) -> None:
        """`step`: one step; how many new tokens each request got, by name. `count`: requests."""
        self._step, self._count = step, count
        self.steps = Steps()

    def run(self, goes_on: Callable[[], bool]) -> Steps:
        begun: set[str] = set()
        samples = Samples()
        while goes_on():
            in_prefill = len(begun) < self._count
            begun |= {name for name, tokens in samples.time(self._step).items() if tokens}
            target = self.steps.prefill if in_prefill else self.steps.decode
            target.extend(samples, first=len(samples.seconds) - 1)
        return self.steps


def serve(make: Callable[[str, str], Contender]) -> None:
    """`python -m benchmarks.peers.NAME MODEL DTYPE`: answers until the driver closes its end."""
    model, dtype = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print must not stand between two answers
    try:
        contender = make(model, dtype)
    except Exception as error:
        answers.write(json.dumps({"failed": f"{type(error).__name__}: {error}"}) + "\n")
        return
    answers.write(json.dumps({"version": contender.version}) + "\n")
    for line in sys.stdin:
        order: dict[str, Any] = json.loads(line)
        try:
            if order["what"] == "generate":
                answer: dict[str, Any] = {"tokens": contender.generate(order["prompts"], order["new"])}
            else:
                steps = contender.measure(order["prompts"], order["new"])
                answer = {
                    "prefill": [steps.prefill.seconds, steps.prefill.delays],
                    "decode": [steps.decode.seconds, steps.decode.delays],
                }
        except Exception as error:
            answer = {"failed": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
