"""Token ids to text while they come: a character appears when its last byte has, and never twice."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from tokenizers.decoders import DecodeStream

from mesh.tokenizer import REPLACEMENT, Tokenizer

PROMPT_TAIL_TOKENS = 8
"""How many prompt tokens a sentencepiece stream starts from, to know whether a leading space belongs to the text."""
MAX_HELD_TOKENS = 8
"""A character has at most four bytes, so more tokens without one are bytes that never become one."""


class Detokenizer(Protocol):
    """The text of one choice. The concatenation of every `push` and `flush` is the whole text."""

    def push(self, token: int) -> str:
        """The characters that `token` completes; possibly none."""

    def flush(self) -> str:
        """What is left when no token follows: U+FFFD for an incomplete character."""


def detokenizer(
    tokenizer: Tokenizer, prompt: Sequence[int], *, skip_special_tokens: bool = True, keep: frozenset[int] = frozenset()
) -> Detokenizer:
    """A detokenizer for the text that continues `prompt`. Special tokens of `keep` are never skipped."""
    if tokenizer.byte_level:
        return ByteDetokenizer(tokenizer, skip_special_tokens=skip_special_tokens, keep=keep)
    return StreamDetokenizer(tokenizer, prompt, skip_special_tokens=skip_special_tokens, keep=keep)


class ByteDetokenizer:
    """For byte-level vocabularies, where a text is the concatenation of its tokens' bytes."""

    __slots__ = ("_bytes", "_decoder", "_special", "_within")

    def __init__(
        self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True, keep: frozenset[int] = frozenset()
    ) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._within = False
        """The decoder holds the beginning of a character."""
        self._bytes = tokenizer.token_bytes
        self._special: frozenset[int] = (tokenizer.special_token_ids if skip_special_tokens else frozenset()) - keep

    def push(self, token: int) -> str:
        if token in self._special:
            return ""
        new = self._bytes(token)
        if not self._within:
            try:
                return new.decode()  # nearly always, and five times as fast
            except UnicodeDecodeError:
                pass
        text = self._decoder.decode(new)
        self._within = bool(self._decoder.getstate()[0])
        return text

    def flush(self) -> str:
        self._within = False
        return self._decoder.decode(b"", True)


class StreamDetokenizer:
    """For every other vocabulary, where a token's text depends on its neighbours: the library's own stream."""

    __slots__ = ("_after_restart", "_bytes", "_held", "_keep", "_skip", "_special", "_stream", "_tokenizer")

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        keep: frozenset[int] = frozenset(),
    ) -> None:
        self._tokenizer = tokenizer
        self._bytes = tokenizer.token_bytes
        self._skip = skip_special_tokens
        self._special: frozenset[int] = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._keep = self._special & keep
        """The library's stream would skip them."""
        tail = prompt[-PROMPT_TAIL_TOKENS:]
        # A stream cannot start from an incomplete character: it would repeat the prompt's text.
        if tokenizer.decode(tail, skip_special_tokens=skip_special_tokens).endswith(REPLACEMENT):
            tail = ()
        self._stream = self._new_stream(tail)
        self._after_restart = False
        self._held: list[int] = []
        """Tokens that the stream has taken and that no text has come of yet."""

    def push(self, token: int) -> str:
        if token in self._keep:
            return self._restart() + self._bytes(token).decode()
        if token in self._special or not self._bytes(token):
            return ""
        try:
            text: str | None = self._stream.step(self._tokenizer.backend, token)
        except Exception as error:  # the library knows no finer kind
            if "Invalid prefix" not in str(error):
                raise
            return self._restart() + self.push(token)
        if not text:
            self._held.append(token)
            return self._restart() if len(self._held) > MAX_HELD_TOKENS else ""
        if self._after_restart:
            self._after_restart = False
            if not self._held and self._bytes(token).startswith(b" ") and not text.startswith(" "):
                text = " " + text
        self._held.clear()
        return text

    def flush(self) -> str:
        text = self._tokenizer.decode(self._held, skip_special_tokens=self._skip)
        self._held.clear()
        return text

    def _restart(self) -> str:
        """Gives up the held tokens' text and starts a stream without a past, which drops a leading space."""
        text = self.flush()
        self._stream = self._new_stream(())
        self._after_restart = True
        return text

    def _new_stream(self, ids: Sequence[int]) -> DecodeStream:
        return DecodeStream(ids=list(ids), skip_special_tokens=self._skip)
