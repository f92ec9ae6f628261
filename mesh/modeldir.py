"""Whether a path can be a model directory: what can be said before torch or a tokenizer is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from mesh.errors import EXIT_MODEL, StartupError

DEMO_MODEL = Path(__file__).resolve().parents[1] / "deploy" / "demo_model"
"""The model that `kvmesh up` serves when none is named."""


def check_model_dir(path: Path) -> None:
    """Raises `StartupError` unless `path` holds a `config.json` and a tokenizer."""
    if not path.exists():
        raise _refusal(f"there is no model directory {path}")
    if not path.is_dir():
        raise _refusal(f"{path} is not a directory; give the directory that holds the model's config.json")
    config = path / "config.json"
    try:
        fields = json.loads(config.read_bytes())
    except FileNotFoundError:
        raise _refusal(f"{path} holds no config.json, so it is not a Hugging Face model directory") from None
    except (OSError, ValueError) as error:
        raise _refusal(f"{config} cannot be read: {error}") from None
    if not isinstance(fields, dict):
        raise _refusal(f"{config} holds no JSON object")
    if not any((path / name).exists() for name in ("tokenizer.json", "tokenizer_config.json")):
        raise _refusal(f"{path} holds no tokenizer.json")


def model_names(path: Path, served_model_name: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The names that clients may use, each once: the operator's, or the directory's. The first is the model's own."""
    return tuple(dict.fromkeys(served_model_name)) or (path.resolve().name,)


def _refusal(sentence: str) -> StartupError:
    return StartupError(sentence, EXIT_MODEL)
