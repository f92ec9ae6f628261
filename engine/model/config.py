"""A Hugging Face `config.json`, reduced to what the decoder needs.

Every value is checked here, so that a broken directory ends in one sentence and not in a traceback from a layer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mesh.errors import EXIT_MODEL, StartupError

FULL_ATTENTION = 0
"""The window of a layer that attends to everything before it."""

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Family:
    """What an architecture leaves out of its `config.json`, or never says."""

    max_positions: int
    kv_heads: int | None
    """Used when the file has none; None means as many as query heads."""
    head_dim: int | None = None
    qkv_bias: bool | None = None
    """None: as `attention_bias` says."""
    output_bias: bool | None = None
    mlp_bias: bool | None = None
    qk_norm: bool = False


FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(2048, None),
    "MistralForCausalLM": Family(131072, 8, qkv_bias=False, output_bias=False, mlp_bias=False),
    "Qwen2ForCausalLM": Family(32768, 32, qkv_bias=True, output_bias=False, mlp_bias=False),
    "Qwen3ForCausalLM": Family(32768, 32, head_dim=128, mlp_bias=False, qk_norm=True),
}
DEFAULT_WINDOW = 4096
"""`sliding_window` of Mistral and Qwen configurations that do not name it."""


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary position embedding; the fields beyond `theta` belong to the types that name them."""

    type: str
    theta: float
    max_positions: int
    """`max_position_embeddings` of the model."""
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    @property
    def max_context(self) -> int:
        """The longest context that the scaling is meant for, in tokens."""
        if self.type in ("linear", "dynamic"):
            return int(self.max_positions * self.factor)
        if self.type == "yarn":
            return max(self.max_positions, int(self.original_max_positions * self.factor))
        return self.max_positions


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The decoder's shape."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    windows: tuple[int, ...]
    """Per layer: how many positions a query sees, itself included, or `FULL_ATTENTION`."""
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: str
    """Of the checkpoint: float32, bfloat16 or float16."""

    @staticmethod
    def load(model_dir: Path) -> ModelConfig:
        """Raises `StartupError` for anything that is not the configuration of a supported model."""
        return _parse(_Fields(_read_json(model_dir), model_dir / "config.json"))


def broken(message: str) -> StartupError:
    """The error of a model directory that cannot be served."""
    return StartupError(message, EXIT_MODEL)


def _read_json(model_dir: Path) -> dict[str, Any]:
    if not model_dir.is_dir():
        raise broken(f"model directory {model_dir} does not exist")
    path = model_dir / "config.json"
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise broken(f"{model_dir} is not a Hugging Face model directory: it has no config.json") from None
    except OSError as error:
        raise broken(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise broken(f"{path} is not valid JSON") from None
    if not isinstance(data, dict):
        raise broken(f"{path} does not hold a JSON object")
    return data


class _Fields:
    """Typed access to a JSON object; a missing or ill-typed field raises a `StartupError` that names it."""

    def __init__(self, data: Mapping[str, Any], path: Path) -> None:
        self.data = data
        self.path = path

    def fail(self, name: str, wanted: str) -> StartupError:
        return broken(f"{self.path}: {name} must be {wanted}, not {json.dumps(self.data.get(name))[:60]}")

    def integer(self, name: str, default: int | None = None, least: int = 1) -> int:
        value = self.data.get(name)
        value = default if value is None else value
        if value is None:
            raise broken(f"{self.path} lacks {name}")
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
            raise self.fail(name, f"a whole number of at least {least}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.data.get(name)
        value = default if value is None else value
        if value is None:
            raise broken(f"{self.path} lacks {name}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(name, "a number above 0")
        if not 0 < value < 1e30:
            raise self.fail(name, "a number above 0")
        return float(value)

    def optional_number(self, name: str) -> float | None:
        return None if self.data.get(name) is None else self.number(name)

    def flag(self, name: str, default: bool) -> bool:
        value = self.data.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.fail(name, "true or false")
        return value

    def child(self, name: str) -> _Fields | None:
        value = self.data.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.fail(name, "an object")
        return _Fields(value, self.path)


def _architecture(fields: _Fields) -> str:
    names = fields.data.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise broken(f"{fields.path} does not name its architecture")
    if names[0] not in FAMILIES:
        raise broken(f"architecture {names[0]} is not supported; supported are {', '.join(FAMILIES)}")
    return str(names[0])


def _parse(fields: _Fields) -> ModelConfig:
    architecture = _architecture(fields)
    family = FAMILIES[architecture]
    if fields.data.get("quantization_config") is not None:
        raise broken(f"{fields.path}: quantized checkpoints are not supported")
    if fields.data.get("hidden_act", "silu") != "silu":
        raise fields.fail("hidden_act", '"silu"')
    hidden, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", family.head_dim or hidden // heads, least=2)
    kv_heads = fields.integer("num_key_value_heads", family.kv_heads or heads)
    if heads % kv_heads:
        raise broken(f"{fields.path}: {heads} attention heads cannot share {kv_heads} key-value heads evenly")
    if head_dim % 2:
        raise broken(f"{fields.path}: head_dim {head_dim} is odd, so it cannot be rotated")
    layers = fields.integer("num_hidden_layers")
    attention_bias = fields.flag("attention_bias", False)
    mlp_bias = fields.flag("mlp_bias", False)
    return ModelConfig(
        architecture=architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope(fields, fields.integer("max_position_embeddings", family.max_positions)),
        windows=_windows(fields, architecture, layers),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        output_bias=attention_bias if family.output_bias is None else family.output_bias,
        mlp_bias=mlp_bias if family.mlp_bias is None else family.mlp_bias,
        qk_norm=family.qk_norm,
        dtype=_dtype(fields),
    )


def _dtype(fields: _Fields) -> str:
    name = fields.data.get("dtype") or fields.data.get("torch_dtype") or "float32"
    if name not in DTYPES:
        raise broken(f"{fields.path}: dtype {name} is not supported; supported are {', '.join(DTYPES)}")
    return str(name)


def _windows(fields: _Fields, architecture: str, layers: int) -> tuple[int, ...]:
    """Llama has no window, Mistral one for all layers, Qwen one for the layers that `layer_types` says."""
    full = (FULL_ATTENTION,) * layers
    if architecture == "LlamaForCausalLM":
        return full
    named = "sliding_window" in fields.data
    absent = named and fields.data["sliding_window"] is None
    window = FULL_ATTENTION if absent else fields.integer("sliding_window", DEFAULT_WINDOW)
    if architecture == "MistralForCausalLM":
        return (window,) * layers
    if not fields.flag("use_sliding_window", False):
        window = FULL_ATTENTION
    types = fields.data.get("layer_types")
    if types is None:
        first = fields.integer("max_window_layers", 28, least=0)
        return tuple(window if layer >= first else FULL_ATTENTION for layer in range(layers))
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) < layers or any(kind not in known for kind in types):
        raise fields.fail("layer_types", f"a list of {layers} of {' and '.join(known)}")
    if "sliding_attention" in types[:layers] and window == FULL_ATTENTION:
        raise broken(f"{fields.path}: layer_types names sliding_attention, but there is no sliding window")
    return tuple(window if kind == "sliding_attention" else FULL_ATTENTION for kind in types[:layers])


def _rope(fields: _Fields, max_positions: int) -> RopeConfig:
    """`rope_parameters` (transformers 5) or `rope_scaling` beside `rope_theta` (before)."""
    rope = fields.child("rope_scaling") or fields.child("rope_parameters") or _Fields({}, fields.path)
    kind = rope.data.get("rope_type", rope.data.get("type", "default"))
    if any(isinstance(value, dict) for value in rope.data.values()):
        raise broken(f"{fields.path}: rotary embeddings that differ by layer are not supported")
    if kind not in ROPE_TYPES:
        raise broken(f"rope type {kind} is not supported; supported are {', '.join(ROPE_TYPES)}")
    for place in (fields, rope):
        if place.data.get("partial_rotary_factor") not in (None, 1, 1.0):
            raise broken(f"{fields.path}: partial rotary embeddings are not supported")
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    if theta <= 1:
        raise broken(f"{fields.path}: rope_theta must be above 1, not {theta}")
    if kind == "default":
        return RopeConfig("default", theta, max_positions)
    return _scaled_rope(fields, rope, str(kind), theta, max_positions)


def _scaled_rope(fields: _Fields, rope: _Fields, kind: str, theta: float, max_positions: int) -> RopeConfig:
    original = max_positions
    for place in (rope, fields):
        original = place.integer("original_max_position_embeddings", original)
    ratio = max_positions / original if kind == "yarn" else None
    scaled = RopeConfig(
        type=kind,
        theta=theta,
        max_positions=max_positions,
        factor=rope.number("factor", ratio),
        original_max_positions=original,
        low_freq_factor=rope.number("low_freq_factor", None if kind == "llama3" else 1.0),
        high_freq_factor=rope.number("high_freq_factor", None if kind == "llama3" else 4.0),
        attention_factor=rope.optional_number("attention_factor"),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        mscale=_mscale(rope, "mscale"),
        mscale_all_dim=_mscale(rope, "mscale_all_dim"),
        truncate=rope.flag("truncate", True),
    )
    if kind == "llama3" and math.isclose(scaled.high_freq_factor, scaled.low_freq_factor):
        raise broken(f"{fields.path}: high_freq_factor and low_freq_factor of the rope must differ")
    return scaled


def _mscale(rope: _Fields, name: str) -> float | None:
    """Zero means absent, as it does in transformers."""
    return None if rope.data.get(name) == 0 else rope.optional_number(name)
