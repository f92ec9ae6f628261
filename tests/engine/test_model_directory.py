"""What a model directory may look like, and the one sentence that each broken one ends in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.model.config import FULL_ATTENTION, ModelConfig
from engine.model.digest import SAMPLE_BYTES, WHOLE_FILE_BYTES, model_digest
from engine.model.transformer import Decoder
from engine.model.weights import Checkpoint
from mesh.errors import EXIT_MODEL, StartupError
from tests.tiny_models import build


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("llama2", tmp_path_factory.mktemp("whole"))


@pytest.fixture
def directory(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


def edit(directory: Path, **fields: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def drop(directory: Path, *names: str) -> None:
    path = directory / "config.json"
    kept = {name: value for name, value in json.loads(path.read_text()).items() if name not in names}
    path.write_text(json.dumps(kept))


def edit_weights(directory: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def load(directory: Path) -> Decoder:
    return Decoder(ModelConfig.load(directory), Checkpoint(directory), torch.device("cpu"), torch.float32)


def refusal(directory: Path) -> str:
    with pytest.raises(StartupError) as caught:
        load(directory)
    assert caught.value.exit_code == EXIT_MODEL
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_missing_directory(tmp_path: Path) -> None:
    assert "nowhere does not exist" in refusal(tmp_path / "nowhere")


def test_directory_without_a_config(tmp_path: Path) -> None:
    assert "it has no config.json" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "\xff", "[" * 100_000, '{"a": 1'])
def test_config_that_is_not_json(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text, "latin-1")
    assert "is not valid JSON" in refusal(directory)


def test_config_that_is_not_an_object(directory: Path) -> None:
    (directory / "config.json").write_text("[1]")
    assert "does not hold a JSON object" in refusal(directory)


def test_config_that_is_a_directory(directory: Path) -> None:
    (directory / "config.json").unlink()
    (directory / "config.json").mkdir()
    assert "cannot read" in refusal(directory)


@pytest.mark.parametrize("names", [None, [], "LlamaForCausalLM", [3]])
def test_config_without_an_architecture(directory: Path, names: object) -> None:
    edit(directory, architectures=names)
    assert "does not name its architecture" in refusal(directory)


def test_unsupported_architecture_is_named(directory: Path) -> None:
    edit(directory, architectures=["MambaForCausalLM"])
    assert "MambaForCausalLM is not supported" in refusal(directory)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"hidden_size": "64"}, 'hidden_size must be a whole number of at least 1, not "64"'),
        ({"hidden_size": True}, "hidden_size must be"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be"),
        ({"vocab_size": 1 << 40}, "vocab_size must be"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number above 0"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps must be"),
        ({"num_key_value_heads": 3}, "cannot share 3 key-value heads"),
        ({"head_dim": 15}, "head_dim 15 is odd"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"hidden_act": "gelu"}, 'hidden_act must be "silu"'),
        ({"dtype": "float8"}, "dtype float8 is not supported"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantized checkpoints"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope type longrope is not supported"),
        ({"rope_scaling": {"type": "su", "factor": 2}}, "rope type su is not supported"),
        ({"rope_parameters": {"rope_type": "linear", "factor": "2"}}, "factor must be a number"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "lacks factor"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differ by layer"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}, "rope_theta must be above 1"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial rotary"),
    ],
)
def test_config_field_that_cannot_be(directory: Path, fields: dict[str, Any], words: str) -> None:
    edit(directory, **fields)
    assert words in refusal(directory)


@pytest.mark.parametrize("name", ["hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"])
def test_config_that_lacks_a_field(directory: Path, name: str) -> None:
    drop(directory, name)
    assert f"lacks {name}" in refusal(directory)


def test_layer_types_must_fit(directory: Path) -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True, "sliding_window": 8}
    edit(directory, **qwen, layer_types=["full_attention"])
    assert "layer_types must be a list of 3" in refusal(directory)
    edit(directory, **{**qwen, "use_sliding_window": False}, layer_types=["sliding_attention"] * 3)
    assert "there is no sliding window" in refusal(directory)


def test_windows_of_each_family(directory: Path) -> None:
    edit(directory, sliding_window=8)
    assert ModelConfig.load(directory).windows == (FULL_ATTENTION,) * 3
    edit(directory, architectures=["MistralForCausalLM"])
    assert ModelConfig.load(directory).windows == (8, 8, 8)
    edit(directory, sliding_window=None)
    assert ModelConfig.load(directory).windows == (FULL_ATTENTION,) * 3
    drop(directory, "sliding_window")
    assert ModelConfig.load(directory).windows == (4096,) * 3
    edit(directory, architectures=["Qwen3ForCausalLM"], sliding_window=8, max_window_layers=2)
    assert ModelConfig.load(directory).windows == (FULL_ATTENTION,) * 3
    edit(directory, use_sliding_window=True)
    assert ModelConfig.load(directory).windows == (FULL_ATTENTION, FULL_ATTENTION, 8)


def test_scaling_lengthens_the_context(directory: Path) -> None:
    assert ModelConfig.load(directory).rope.max_context == 512
    edit(directory, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    assert ModelConfig.load(directory).rope.max_context == 1024
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    edit(directory, rope_parameters=rope)
    assert ModelConfig.load(directory).rope.max_context == 1024


def test_no_weights(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    assert "holds no weights" in refusal(directory)


def test_pickle_weights_are_named_and_not_loaded(directory: Path) -> None:
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    assert "only as pickle" in refusal(directory)


@pytest.mark.parametrize("size", [0, 4, 100, 50_000])
def test_truncated_weights(directory: Path, size: int) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert "is not a whole safetensors file" in refusal(directory)


def test_weights_that_are_not_safetensors(directory: Path) -> None:
    (directory / "model.safetensors").write_bytes(b"\xff" * 4096)
    assert "is not a whole safetensors file" in refusal(directory)


def test_missing_tensor_is_named(directory: Path) -> None:
    edit_weights(directory, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert "lack tensor model.layers.1.mlp.up_proj.weight" in refusal(directory)


def test_tensor_of_another_shape_is_named(directory: Path) -> None:
    edit(directory, intermediate_size=97)
    message = refusal(directory)
    assert "gate_proj.weight has shape [96, 64], but config.json says [97, 64]" in message


def test_quantized_tensor_is_named(directory: Path) -> None:
    edit_weights(directory, lambda tensors: tensors.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}))
    assert "model.norm.weight is torch.int8" in refusal(directory)


def test_untied_head_that_is_missing(directory: Path) -> None:
    edit_weights(directory, lambda tensors: tensors.pop("lm_head.weight"))
    assert "lack tensor lm_head.weight" in refusal(directory)
    edit(directory, tie_word_embeddings=True)
    load(directory)


def test_shards_hold_the_same_model(whole: Path, tmp_path: Path) -> None:
    build("llama2", tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    one, many = Checkpoint(whole), Checkpoint(tmp_path)
    name = "model.layers.2.mlp.down_proj.weight"
    assert torch.equal(one.load(name, 64, 96), many.load(name, 64, 96))
    assert one.num_parameters() == many.num_parameters()
    load(tmp_path)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ("{", "is not valid JSON"),
        ("[]", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "3 is not the name of a safetensors file"),
        ('{"weight_map": {"a": "../model.safetensors"}}', "is not the name of a safetensors file beside it"),
        ('{"weight_map": {"a": "pytorch_model.bin"}}', "is not the name of a safetensors file beside it"),
        ('{"weight_map": {"a": "m-1.safetensors"}}', "names m-1.safetensors, which does not exist"),
    ],
)
def test_broken_index(directory: Path, index: str, words: str) -> None:
    (directory / "model.safetensors.index.json").write_text(index)
    assert words in refusal(directory)


def test_loading_reports_progress(whole: Path) -> None:
    seen: list[float] = []
    checkpoint = Checkpoint(whole, lambda _, share: seen.append(share))
    Decoder(ModelConfig.load(whole), checkpoint, torch.device("cpu"), torch.float32)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_digest_is_of_the_content(whole: Path, directory: Path) -> None:
    assert model_digest(directory) == model_digest(whole)
    assert len(model_digest(whole)) == 16
    edit_weights(directory, lambda tensors: tensors["lm_head.weight"][5].add_(1))
    changed = model_digest(directory)
    assert changed != model_digest(whole)
    edit(directory, rms_norm_eps=0.1)
    assert model_digest(directory) not in (changed, model_digest(whole))


def test_digest_of_large_files_samples_them(directory: Path) -> None:
    path = directory / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(WHOLE_FILE_BYTES + 1000)
    empty = model_digest(directory)
    with path.open("r+b") as file:
        file.seek(-SAMPLE_BYTES, 2)
        file.write(b"x")
    assert model_digest(directory) != empty


def test_digest_of_a_broken_directory(tmp_path: Path) -> None:
    with pytest.raises(StartupError):
        model_digest(tmp_path)
