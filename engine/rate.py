"""How fast this engine computes prompts, measured over its last steps."""

from __future__ import annotations

from collections.abc import Sequence

from engine.step import Row

DECAY = 0.9
"""Of the weight of all earlier steps, per step: about the last ten count."""


class PrefillRate:
    """Tokens per second over recent steps that computed a chunk of some prompt."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0

    def measure(self, rows: Sequence[Row], num_tokens: int, seconds: float) -> None:
        """One step of `num_tokens` tokens in all; a step of single tokens says nothing about prefill."""
        if num_tokens == len(rows):
            return
        self._tokens = self._tokens * DECAY + num_tokens
        self._seconds = self._seconds * DECAY + seconds

    @property
    def tokens_per_s(self) -> float:
        """0 when nothing was measured yet."""
        return self._tokens / self._seconds if self._seconds > 0 else 0.0
