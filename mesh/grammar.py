"""Grammars: what the output of a request must be, as one text that travels with it, compiled by llguidance.

The text is in llguidance's dialect of Lark, which embeds JSON schemas and regular expressions. A matcher is a function
of the grammar, the vocabulary and the tokens it was given: any worker can take a request on at any token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from mesh.errors import GrammarError
from mesh.tokenizer import Tokenizer
from mesh.wire import MAX_STR_BYTES

MAX_GRAMMAR_BYTES = MAX_STR_BYTES
"""It travels as one string with every attempt of every choice."""
OPTIONS = '\n%llguidance {"no_forcing": true}\n'
"""Put behind every grammar, where it overrules the client's own: a mask has every token that may follow. Forced texts
would be cut into tokens by a call back into Python, and `a{1000000}` would force a million of them in one step."""
LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,  # 20 ms of compiling
    step_lexer_fuel=200_000,  # 15 ms of one mask
    step_max_items=10_000,  # a mask of any JSON schema takes a tenth; ambiguous rules reach it after 60 ms
    max_items_in_row=1000,  # an object of 250 optional properties
    max_lexer_states=20_000,  # 40 MB
    max_grammar_size=200_000,
    verbose_errors=False,  # the message would hold the state of the parser
)
"""The same in the proxy, which refuses what is beyond them, and in the workers."""
MAX_ERROR_CHARS = 500


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """What llguidance must know of a tokenizer, as plain values."""

    tokens: tuple[bytes, ...]
    """Of each id of the model; empty for those without text, which no grammar allows."""
    special: tuple[int, ...]
    """They match no text; a grammar names them."""
    eos: tuple[int, ...]
    """Allowed where the grammar may end, and there only."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Vocabulary:
        size = tokenizer.vocab_size
        eos = tuple(i for i in tokenizer.eos_token_ids if i < size)
        special = sorted({*eos, *(i for i in tokenizer.special_token_ids if i < size)})
        return cls(tuple(map(tokenizer.token_bytes, range(size))), tuple(special), eos)

    def tokenizer(self) -> LLTokenizer:
        """Takes about half a second per 128 k tokens. Raises `GrammarError` when nothing ends a sequence."""
        if not self.eos:
            raise GrammarError("this model has no end-of-sequence token, so no grammar could end")
        return LLTokenizer(TokenizerWrapper(_Table(self)), eos_token=list(self.eos))


class _Table:
    """The attributes that `TokenizerWrapper` reads."""

    bos_token_id = None

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.tokens
        self.special_token_ids = vocabulary.special
        self.eos_token_id = vocabulary.eos[0]

    def __call__(self, text: bytes | str) -> Sequence[int]:
        """Tokens of a forced text; `OPTIONS` forces none."""
        return ()


def compile_grammar(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the beginning of `grammar`. Releases the GIL. Raises `GrammarError`."""
    matcher = LLMatcher(tokenizer, grammar + OPTIONS, log_level=0, limits=LIMITS)
    check_matcher(matcher)
    return matcher


def check_matcher(matcher: LLMatcher) -> None:
    """Raises `GrammarError` when the matcher has failed: the grammar is wrong, or beyond `LIMITS` after these
    tokens."""
    if matcher.is_error():
        raise GrammarError(_plain(matcher.get_error()))


def _plain(error: str) -> str:
    """The message without the source lines, the carets and the parser's state around it."""
    lines = [line.strip() for line in error.splitlines() if not line.startswith(" ") and line != "<non-verbose/>"]
    message = " ".join(line for line in lines if line) or "it cannot be compiled"
    if message.startswith("NoExtension"):
        return "no text of this model's tokens satisfies it"
    return message.partition("failed to compile JSON schema: ")[2][:MAX_ERROR_CHARS] or message[:MAX_ERROR_CHARS]
