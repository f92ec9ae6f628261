"""The bundled model: small, whole, and loadable by transformers as it is."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from mesh.modeldir import DEMO_MODEL

MAX_WEIGHTS_BYTES = 12 << 20
TEXT = "Héllo 🙂\n\x00\ttokens  and   spaces"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    found = AutoTokenizer.from_pretrained(DEMO_MODEL)
    assert isinstance(found, PreTrainedTokenizerBase)
    return found


def test_it_is_small_and_has_a_card() -> None:
    assert sum(p.stat().st_size for p in DEMO_MODEL.glob("*.safetensors")) <= MAX_WEIGHTS_BYTES
    assert "random" in (DEMO_MODEL / "README.md").read_text()
    assert json.loads((DEMO_MODEL / "config.json").read_text())["max_position_embeddings"] >= 4096


def test_every_text_survives_its_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    tokens = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(tokens) == len(TEXT.encode())
    assert tokenizer.decode(tokens) == TEXT


def test_the_chat_template_opens_the_assistants_turn(tokenizer: PreTrainedTokenizerBase) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|bos|><|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    special = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert special[:2] == [256, 258]


def test_transformers_generates_with_it(tokenizer: PreTrainedTokenizerBase) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(DEMO_MODEL)
    prompt = torch.tensor([tokenizer("Hello", add_special_tokens=False)["input_ids"]])
    output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    new = output[0, prompt.shape[1] :].tolist()
    assert model.dtype == torch.float32
    assert len(set(new)) > 3, "a degenerate model hides errors of position and cache"
