"""Conversations as token ids, with a mark on those that the model must learn to write."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
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
    looks: tuple[tuple[int, int], ...] = ()
    """(from, to): the token that is about to say a value, and the end of the statement that has it before its key."""


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
        encoded = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        begins = [begin for begin, _ in encoded.offsets]
        return Example(encoded.ids, self._trained(encoded.ids), tuple(_looks(made, text, begins)))

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


def _looks(made: Conversation, text: str, begins: Sequence[int]) -> Iterator[tuple[int, int]]:
    """`begins`: where each token begins in the text."""
    answers = dict(made.turned)
    at = 0
    for number, message in enumerate(made.messages):
        said = message["content"]
        at = text.index(said, at)
        fact = answers.get(number)
        stated = -1 if fact is None else text.find(fact.statement, 0, at)
        if fact is not None and stated >= 0:  # of two statements in one sentence, the first has no end of its own
            value, end = at + said.rindex(fact.value), stated + len(fact.statement) - 1
            yield bisect_right(begins, value) - 2, bisect_right(begins, end) - 1
        at += len(said)


def examples(seed: int, length: int, folder: Path = MODEL_DIR) -> Iterator[Example]:
    """Endless and the same for the same seed; none is longer than `length` (what is too long is cut)."""
    encoder = Encoder(folder)
    words = Words(random.Random(seed), Split.TRAIN, encoder.pieces())
    while True:
        example = encoder.encode(conversation(words, length))
        if any(example.trained[:length]):
            looks = tuple([look for look in example.looks if look[0] < length])
            yield Example(example.ids[:length], example.trained[:length], looks)
