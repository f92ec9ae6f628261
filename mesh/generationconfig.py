"""How a model wants to be sampled when a request does not say: its generation_config.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """What a request that leaves these out gets; without a generation config, OpenAI's defaults."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    repetition_penalty: float = 1.0


LIMITS = {
    "temperature": (0.0, 2.0),
    "top_p": (1e-6, 1.0),
    "top_k": (0, 2**31 - 1),
    "min_p": (0.0, 1.0),
    "repetition_penalty": (1e-6, 10.0),
}
"""Those of the API's parameters: a model's value beyond them is passed over, as one of another type is."""


def sampling_defaults(config: Mapping[str, Any]) -> SamplingDefaults:
    """Of a generation_config.json. `do_sample: false` is greedy, whatever else it says."""
    if config.get("do_sample") is False:
        return SamplingDefaults(temperature=0.0)
    found: dict[str, Any] = {}
    for name, (low, high) in LIMITS.items():
        value = config.get(name)
        kind = int if name == "top_k" else int | float
        if isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high:
            found[name] = value
    return SamplingDefaults(**found)
