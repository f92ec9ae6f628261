"""Conversations as token ids, with a mark on those that the model must learn to write."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from deploy.demo_model.train.conversations import Conversation, conversation
from deploy.demo_model.train.tokenizer import IM_END, IM_START
from deploy.demo_model.train.words import Split, Words

MODEL_DIR = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Example:
    ids: list[int]
    """Beginning with `<|bos|>`."""
    trained: list[bool]
    """For each id: the assistant says it (the end of its turn included)."""


class Encoder:
    """Renders conversations through the chat template that the model is served with."""

    def __init__(self, folder: Path = MODEL_DIR) -> None:
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self._start = self._tokenizer.encode(f"{IM_START}assistant\n", add_special_tokens=False)
        self._end = self._tokenizer.convert_tokens_to_ids(IM_END)

    def pieces(self) -> list[str]:
        """The tokens that consist of small letters."""
        vocabulary = self._tokenizer.get_vocab()
        return sorted(token for token in vocabulary if token.isascii() and token.isalpha() and token.islower())

    def encode(self, made: Conversation) -> Example:
        text = self._tokenizer.apply_chat_template(made.messages, tools=made.tools or None, tokenize=False)
        ids = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return Example(ids, self._trained(ids))

    def _trained(self, ids: list[int]) -> list[bool]:
        start, trained = self._start, [False] * len(ids)
        speaking = False
        for i, token in enumerate(ids):
            trained[i] = speaking
            if token == self._end:
                speaking = False
            elif token == start[-1] and not speaking:
                speaking = ids[i + 1 - len(start) : i + 1] == start
        return trained


def examples(seed: int, length: int, folder: Path = MODEL_DIR) -> Iterator[Example]:
    """Endless and the same for the same seed; none is longer than `length` (what is too long is cut)."""
    encoder = Encoder(folder)
    words = Words(random.Random(seed), Split.TRAIN, encoder.pieces())
    while True:
        example = encoder.encode(conversation(words, length))
        if any(example.trained[:length]):
            yield Example(example.ids[:length], example.trained[:length])
