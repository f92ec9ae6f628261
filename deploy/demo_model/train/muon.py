"""Muon for the hidden matrices and AdamW for the rest.

Muon's update is the momentum with all singular values brought near one (Jordan et al., "Muon: An optimizer for hidden
layers in neural networks", 2024): directions that rarely get a gradient are learned as fast as the frequent ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)
"""x -> ax + bx^3 + cx^5 drives every x of (0, 1] into about [0.7, 1.2] within five rounds."""
ROUNDS = 5


def orthogonalised(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """[n, rows, columns] -> the nearest semi-orthogonal matrices, roughly; the same shape, in `dtype`."""
    a, b, c = QUINTIC
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = (x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)).to(dtype).contiguous()
    for _ in range(ROUNDS):
        square = torch.bmm(x, x.transpose(1, 2))
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.transpose(1, 2) if tall else x


@dataclass(slots=True, eq=False)
class Muon:
    """Nesterov momentum, orthogonalised; matrices of one shape go through the rounds as one batch."""

    parameters: Mapping[str, Tensor]
    rate: float = 0.02
    momentum: float = 0.95
    decay: float = 0.05
    state: dict[str, Tensor] = field(init=False)
    _groups: dict[tuple[int, ...], list[str]] = field(init=False)

    def __post_init__(self) -> None:
        self.state = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self._groups = {}
        for name, p in self.parameters.items():
            self._groups.setdefault(tuple(p.shape), []).append(name)

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """With `scale` times the rate."""
        rate = self.rate * scale
        for (rows, columns), names in self._groups.items():
            moving = [self.state[name] for name in names]
            grads = _gradients(self.parameters, names)
            torch._foreach_lerp_(moving, grads, 1 - self.momentum)
            ahead = torch.stack(torch._foreach_lerp(grads, moving, self.momentum))
            # a tall matrix of orthonormal columns changes its output less than a square one
            length = max(1.0, rows / columns) ** 0.5
            updates = orthogonalised(ahead).float().unbind()
            matrices = [self.parameters[name] for name in names]
            torch._foreach_mul_(matrices, 1 - rate * self.decay)
            torch._foreach_add_(matrices, updates, alpha=-rate * length)


@dataclass(slots=True, eq=False)
class Adam:
    """AdamW; vectors (gains) do not decay."""

    parameters: Mapping[str, Tensor]
    rate: float = 0.004
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.0
    epsilon: float = 1e-8
    state: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.state = {
            f"{moment}.{name}": torch.zeros_like(p)
            for name, p in self.parameters.items()
            for moment in ("mean", "square")
        }

    @torch.no_grad()
    def step(self, scale: float, number: int) -> None:
        """The `number`-th step, from 1, with `scale` times the rate."""
        rate = self.rate * scale
        fast, slow = self.betas
        for name, p in self.parameters.items():
            grad = _gradients(self.parameters, [name])[0]
            mean, square = self.state[f"mean.{name}"], self.state[f"square.{name}"]
            mean.lerp_(grad, 1 - fast)
            square.lerp_(grad.square(), 1 - slow)
            spread = (square / (1 - slow**number)).sqrt_().add_(self.epsilon)
            if p.ndim > 1:
                p.mul_(1 - rate * self.decay)
            p.addcdiv_(mean, spread, value=-rate / (1 - fast**number))


@dataclass(slots=True, eq=False)
class Optimizer:
    """Both, with a common schedule and one count of steps."""

    muon: Muon
    adam: Adam
    steps: int = 0

    def step(self, scale: float, clip: float) -> float:
        """The norm that the gradient had before it was clipped to `clip`."""
        parameters = [*self.muon.parameters.values(), *self.adam.parameters.values()]
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, clip))
        self.steps += 1
        self.muon.step(scale)
        self.adam.step(scale, self.steps)
        for p in parameters:
            p.grad = None
        return norm

    def state(self) -> dict[str, Tensor]:
        return {f"muon.{k}": v for k, v in self.muon.state.items()} | {
            f"adam.{k}": v for k, v in self.adam.state.items()
        }

    def load(self, saved: Mapping[str, Tensor], steps: int) -> None:
        for name, tensor in self.state().items():
            tensor.copy_(saved[name])
        self.steps = steps


def split(named: Iterable[tuple[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Muon's parameters (matrices of the layers) and Adam's (embedding and gains)."""
    matrices: dict[str, Tensor] = {}
    others: dict[str, Tensor] = {}
    for name, p in named:
        (matrices if p.ndim == 2 and name.startswith("layers.") else others)[name] = p
    return matrices, others


def _gradients(parameters: Mapping[str, Tensor], names: Iterable[str]) -> list[Tensor]:
    grads = [parameters[name].grad for name in names]
    return [g for g in grads if g is not None]
