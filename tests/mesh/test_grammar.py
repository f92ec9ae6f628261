"""What llguidance is told of a tokenizer, and what clients are told of llguidance's refusals."""

from __future__ import annotations

import pytest

from mesh.errors import GrammarError
from mesh.grammar import MAX_GRAMMAR_BYTES, Vocabulary, compile_grammar
from mesh.messages import Decode
from mesh.params import SamplingParams
from mesh.tokenizer import Tokenizer
from mesh.wire import decode, encode
from tests.proxy.tiny_tokenizer import BOS, EOS, IM_END, IM_START, VOCAB_SIZE, byte_level, sentencepiece, token_of


def allowed(tokenizer: Tokenizer, grammar: str, *tokens: int) -> set[int]:
    matcher = compile_grammar(Vocabulary.of(tokenizer).tokenizer(), grammar)
    assert matcher.consume_tokens(list(tokens))
    mask = matcher.compute_bitmask()
    return {i for i in range(len(mask) * 8) if mask[i // 8] >> i % 8 & 1}


def test_a_byte_level_vocabulary_is_the_models_and_its_special_tokens_match_no_text() -> None:
    vocabulary = Vocabulary.of(byte_level())
    assert len(vocabulary.tokens) == VOCAB_SIZE
    assert vocabulary.special == (BOS, EOS, IM_START, IM_END)
    assert set(vocabulary.eos) == {EOS, IM_END}
    assert vocabulary.tokens[token_of(byte_level(), "Ġw")] == b" w"
    named = {token_of(byte_level(), piece) for piece in ("h", "he", "hell", "hello")}
    assert allowed(byte_level(), 'start: "hello"') == named
    assert allowed(byte_level(), 'start: "</s>"') == {token_of(byte_level(), "<")}
    assert allowed(byte_level(), "start: /(.|\\n)*/") <= set(range(266))


def test_a_sentencepiece_vocabulary_spells_blanks_and_bytes() -> None:
    tokenizer = sentencepiece()
    assert allowed(tokenizer, 'start: " hi"') == {token_of(tokenizer, p) for p in ("▁", "▁hi", "<0x20>")}
    assert allowed(tokenizer, 'start: "é"') == {token_of(tokenizer, "<0xC3>")}
    assert allowed(tokenizer, 'start: "hi" | "hello"', token_of(tokenizer, "hi")) == {token_of(tokenizer, "</s>")}


def test_a_model_without_an_end_of_sequence_has_no_grammars() -> None:
    tokenizer = Tokenizer(byte_level().backend)
    with pytest.raises(GrammarError, match="end-of-sequence"):
        Vocabulary.of(tokenizer).tokenizer()


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        ('start: %json {"type":"array","uniqueItems":true}', 'Unimplemented keys: ["uniqueItems"]'),
        ("start: nothing", 'at 1(8): unknown name: "nothing"'),
        ("start: /(?=a)/", "look-around"),
        ("", "no start rule found"),
    ],
)
def test_an_error_is_one_line_without_the_compilers_state(grammar: str, message: str) -> None:
    with pytest.raises(GrammarError) as caught:
        compile_grammar(Vocabulary.of(byte_level()).tokenizer(), grammar)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "non-verbose" not in str(caught.value)


def test_the_largest_grammar_travels() -> None:
    params = SamplingParams(max_tokens=1, grammar="é" * (MAX_GRAMMAR_BYTES // 2))
    message = Decode("r", 1, (1,), 1, params, b"", 1.0, None, (), 0)
    assert decode(encode(message, 1)).message == message
