"""A tiny Llama with random weights and one token per byte: a token id is a character, which tests can compute."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

SEED = 20240501
SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>")
BOS, EOS, IM_START, IM_END = range(256, 260)
CONTEXT = 8192
INITIALIZER_RANGE = 0.15
"""Wide enough for the layers to outweigh the tied embedding; else every token would only repeat itself."""
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer() -> Tokenizer:
    """One token per byte, ids 0 to 255 in the order of the byte-level alphabet, then the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def make_model() -> LlamaForCausalLM:
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=256 + len(SPECIAL_TOKENS),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        initializer_range=INITIALIZER_RANGE,
        bos_token_id=BOS,
        eos_token_id=[EOS, IM_END],
        pad_token_id=EOS,
    )
    return LlamaForCausalLM(config)


def write(folder: Path) -> None:
    """Every file that transformers and kvmesh need."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": CONTEXT,
        "bos_token": "<|bos|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|eos|>",
        "additional_special_tokens": ["<|im_start|>"],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config, indent=2) + "\n")
    model = make_model()
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS, eos_token_id=[IM_END, EOS], pad_token_id=EOS, do_sample=True, temperature=0.7, top_p=0.95
    )
    model.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


@cache
def byte_model() -> Path:
    """A folder of this process with the model in it, the same bytes every time."""
    folder = Path(_FOLDER.name) / "byte_model"
    write(folder)
    return folder


_FOLDER = tempfile.TemporaryDirectory(prefix="kvmesh-", ignore_cleanup_errors=True)
