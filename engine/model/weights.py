"""Weights from safetensors files, mapped into memory and read tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.model.config import broken

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Progress = Callable[[str, float], None]
"""What is being done, and the share done, 0 to 1."""


class Checkpoint:
    """The tensors of a model directory, by name. Raises `StartupError` for what is missing or broken."""

    def __init__(self, model_dir: Path, progress: Progress | None = None) -> None:
        self.model_dir = model_dir
        self._progress = progress
        self._files = {path: _open(path) for path in weight_files(model_dir)}
        self._places = {name: path for path, file in self._files.items() for name in file.keys()}  # noqa: SIM118
        self._loaded = 0

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def num_parameters(self) -> int:
        """Elements of all tensors."""
        return sum(
            torch.Size(self._files[path].get_slice(name).get_shape()).numel() for name, path in self._places.items()
        )

    def load(self, name: str, *shape: int) -> Tensor:
        """The tensor `name`, which must be of `shape`, in the checkpoint's own dtype on the CPU."""
        if name not in self._places:
            raise broken(f"{self.model_dir}: the weights lack tensor {name}")
        path = self._places[name]
        try:
            tensor: Tensor = self._files[path].get_tensor(name)
        except (SafetensorError, RuntimeError, ValueError) as error:
            raise broken(f"{path}: cannot read tensor {name}: {error}") from None
        if tuple(tensor.shape) != shape:
            found = list(tensor.shape)
            raise broken(f"{path}: tensor {name} has shape {found}, but config.json says {list(shape)}")
        if tensor.dtype not in FLOATS:
            raise broken(f"{path}: tensor {name} is {tensor.dtype}; only unquantized weights are supported")
        self._loaded += 1
        if self._progress is not None:
            self._progress("loading weights", min(1.0, self._loaded / len(self._places)))
        return tensor


def weight_files(model_dir: Path) -> list[Path]:
    """The directory's safetensors files in a fixed order. Raises `StartupError` when there are none or some lack."""
    index = model_dir / INDEX
    names = sorted(set(_weight_map(index).values())) if index.is_file() else [SINGLE]
    for name in names:
        if not (model_dir / name).is_file():
            raise broken(_missing(model_dir, name))
    return [model_dir / name for name in names]


def _missing(model_dir: Path, name: str) -> str:
    if name != SINGLE:
        return f"{model_dir}: {INDEX} names {name}, which does not exist"
    if any(model_dir.glob("*.bin")):
        return f"{model_dir} holds weights only as pickle (*.bin), which is never loaded: convert them to safetensors"
    return f"{model_dir} holds no weights ({SINGLE} or {INDEX})"


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        data = json.loads(index.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise broken(f"{index} is not valid JSON") from None
    places = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(places, dict) or not places:
        raise broken(f"{index} has no weight_map")
    for name in places.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise broken(f"{index}: {json.dumps(name)[:60]} is not the name of a safetensors file beside it")
    return places


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise broken(f"{path} is not a whole safetensors file: {error}") from None
