"""Tokenizers of a few hundred tokens, built on the spot, in the two kinds that matter for text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from mesh.tokenizer import Tokenizer

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
BOS, EOS, IM_START, IM_END = range(4)
MERGES = (("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "w"), ("Ã", "©"))
VOCAB_SIZE = 320
"""Of the model: more than the tokenizer has, as with real models."""
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_level_backend() -> Backend:
    """Byte-level BPE as Llama 3 and Qwen have it: special tokens, 256 bytes, six merges, `<s>` before a text."""
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(m) for m in MERGES)]
    backend = Backend(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=list(MERGES)))
    backend.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return backend


def byte_level(template: str | None = TEMPLATE) -> Tokenizer:
    return Tokenizer(
        byte_level_backend(),
        vocab_size=VOCAB_SIZE,
        special_tokens={"bos_token": "<s>", "eos_token": "</s>"},
        eos_token_ids=(IM_END,),
        templates=None if template is None else {"default": template},
    )


def sentencepiece() -> Tokenizer:
    """BPE with spaces as `▁` and unknown characters as bytes, as Llama 2 and Mistral have it."""
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁a", "▁b", "▁hi", "hi"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *letters]
    backend = Backend(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=[("▁", "a"), ("▁", "b"), ("h", "i"), ("▁", "hi")],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend, special_tokens={"bos_token": "<s>", "eos_token": "</s>"})


def token_of(tokenizer: Tokenizer, piece: str) -> int:
    found = tokenizer.backend.token_to_id(piece)
    assert found is not None
    return found


def model_dir(path: Path, **tokenizer_config: Any) -> Path:
    """A model directory without weights; keywords are added to tokenizer_config.json."""
    byte_level_backend().save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE, **tokenizer_config}
    files: dict[str, Any] = {
        "tokenizer_config.json": config,
        "config.json": {"vocab_size": VOCAB_SIZE, "eos_token_id": EOS},
        "generation_config.json": {"eos_token_id": [IM_END, EOS]},
    }
    for name, value in files.items():
        (path / name).write_text(json.dumps(value))
    return path
