"""Text from tokens: exact for any UTF-8 text and any split, bounded for what is no text."""

from __future__ import annotations

import random

import pytest

from mesh.tokenizer import BYTE_OF, Tokenizer
from proxy.text.detokenizer import MAX_HELD_TOKENS, detokenizer
from tests.proxy.tiny_tokenizer import BOS, EOS, VOCAB_SIZE, byte_level, sentencepiece, token_of

TOKENIZER = byte_level()
BYTE_TOKEN = {byte: token_of(TOKENIZER, char) for char, byte in BYTE_OF.items()}
ALPHABET = "ab ß\n é漢字😀👩‍👩‍👧\u0301\ufffd\u200d\U0010ffff"


def pieces(tokenizer: Tokenizer, tokens: list[int], prompt: list[int] | None = None, skip: bool = True) -> list[str]:
    stream = detokenizer(tokenizer, prompt or [], skip_special_tokens=skip)
    return [*(stream.push(token) for token in tokens), stream.flush()]


@pytest.mark.parametrize("seed", range(50))
def test_any_text_in_bytes_comes_out_whole(seed: int) -> None:
    text = "".join(random.Random(seed).choices(ALPHABET, k=40))
    tokens = [BYTE_TOKEN[byte] for byte in text.encode()]
    assert "".join(pieces(TOKENIZER, tokens)) == text


@pytest.mark.parametrize("seed", range(20))
def test_any_text_encoded_comes_out_whole(seed: int) -> None:
    text = "".join(random.Random(seed).choices(ALPHABET + "hello w", k=60))
    assert "".join(pieces(TOKENIZER, TOKENIZER.encode(text, add_special_tokens=False))) == text


@pytest.mark.parametrize("seed", range(20))
def test_any_bytes_come_out_as_the_library_decodes_them(seed: int) -> None:
    tokens = [BYTE_TOKEN[b] for b in random.Random(seed).randbytes(60)]
    assert "".join(pieces(TOKENIZER, tokens)) == TOKENIZER.decode(tokens)


def test_a_character_appears_with_its_last_byte() -> None:
    assert pieces(TOKENIZER, [BYTE_TOKEN[b] for b in "😀a".encode()]) == ["", "", "", "😀", "a", ""]


def test_an_incomplete_character_appears_at_the_end() -> None:
    assert pieces(TOKENIZER, [BYTE_TOKEN[b] for b in "a😀".encode()[:-1]])[-1] == "\ufffd"


def test_special_tokens_are_skipped_or_shown() -> None:
    tokens = [BOS, BYTE_TOKEN[0x61], EOS]
    assert "".join(pieces(TOKENIZER, tokens)) == "a"
    assert "".join(pieces(TOKENIZER, tokens, skip=False)) == "<s>a</s>"


def test_an_id_without_text_adds_none() -> None:
    assert "".join(pieces(TOKENIZER, [VOCAB_SIZE - 1, BYTE_TOKEN[0x61]])) == "a"


def test_sentencepiece_keeps_the_space_after_the_prompt() -> None:
    tokenizer = sentencepiece()
    prompt = tokenizer.encode("hi", add_special_tokens=False)
    a = token_of(tokenizer, "▁a")
    assert "".join(pieces(tokenizer, [a, a], prompt)) == " a a"


@pytest.mark.parametrize("seed", range(10))
def test_sentencepiece_text_comes_out_whole(seed: int) -> None:
    tokenizer = sentencepiece()
    text = "hi " + "".join(random.Random(seed).choices("ab ßé漢😀", k=30))
    tokens = tokenizer.encode(text, add_special_tokens=False)
    assert "".join(pieces(tokenizer, tokens)) == text


def test_sentencepiece_goes_on_after_bytes_that_are_no_text() -> None:
    tokenizer = sentencepiece()
    broken = [token_of(tokenizer, "<0xFF>")] * (MAX_HELD_TOKENS * 3)
    a = token_of(tokenizer, "▁a")
    out = pieces(tokenizer, [a, *broken, a, a], tokenizer.encode("hi", add_special_tokens=False))
    assert "".join(out) == " a" + "\ufffd" * len(broken) + " a a"


def test_sentencepiece_starts_clean_after_a_prompt_that_ends_within_a_character() -> None:
    tokenizer = sentencepiece()
    prompt = tokenizer.encode("hi é", add_special_tokens=False)[:-1]
    out = "".join(pieces(tokenizer, [token_of(tokenizer, "hi")], prompt))
    assert out == "hi"
