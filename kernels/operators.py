"""What one implementation of the operators consists of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from kernels.linear import GatedLinear, Linear
from kernels.sampling import Draw, Draws


class Metadata(Protocol):
    """Where a step's tokens stand; built once per step, the same for all layers. Beyond this it is a matter between an
    implementation's builder and its operators."""

    @property
    def positions(self) -> Tensor:
        """`[tokens]`, within each token's own request."""


M = TypeVar("M", bound=Metadata)
Builder = Callable[[Sequence[int], Sequence[int], Sequence[Sequence[int]]], M]
"""Per row: tokens in this step, tokens in all once the step is done (this step's are the last), and pages. Rows are
best sorted by both lengths."""


StaticBuilder = Callable[[Tensor, Tensor], M]
"""`positions` `[rows]` int32, below 0 where a row stands for nothing, and `tables` `[rows, pages]` int32."""


@dataclass(frozen=True, slots=True)
class StaticOperators(Generic[M]):
    """What decode steps need whose inputs lie in device memory that stays the same."""

    metadata_builder: Callable[[Tensor, Collection[int]], StaticBuilder[M]]
    """For steps of one token per row over a pool, for layers with these windows."""
    pack_draws: Callable[[Draws, int], NDArray[np.float64]]
    """For a vocabulary of that size: what `draw` takes, as `[rows, fields]`."""
    draw: Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Operators(Generic[M]):
    """Shapes are in the docstrings of the plain torch ones."""

    metadata_builder: Callable[[Tensor, int, Collection[int]], Builder[M]]
    """For steps over a pool, by a model with so many query heads whose layers have these windows (0: none)."""
    make_linear: Callable[[Tensor, Tensor | None], Linear]
    make_gated_linear: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], GatedLinear]
    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    rms_norm_: Callable[[Tensor, Tensor, float], None]
    rotate_and_write: Callable[[Tensor, Tensor, Tensor, Tensor, int, M], Tensor]
    paged_attention: Callable[[Tensor, Tensor, int, M, int], Tensor]
    draw: Draw
    static: StaticOperators[M] | None = None
    """None: every step's inputs are built anew, by `metadata_builder`."""
