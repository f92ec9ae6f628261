"""Log-probabilities in the two shapes that OpenAI's endpoints have for them, and in vLLM's for prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mesh.errors import internal_error
from mesh.messages import TokenLogprob
from mesh.tokenizer import Tokenizer
from proxy.generation import Chunk
from proxy.text.detokenizer import detokenizer

LOWEST = -9999.0
"""Stands for minus infinity (a token that cannot be drawn), which JSON cannot say."""

CompletionLogprobs = dict[str, list[Any]]
"""`tokens`, `token_logprobs`, `top_logprobs`, `text_offset`: lists of one length."""


@dataclass(frozen=True, slots=True)
class Spelling:
    """How tokens are written."""

    tokenizer: Tokenizer
    as_ids: bool = False
    """As `token_id:N`, which tells tokens apart whose texts are equal or no text."""

    def bytes(self, token: int) -> bytes:
        return self.tokenizer.token_bytes(token)

    def text(self, token: int) -> str:
        return f"token_id:{token}" if self.as_ids else self.tokenizer.token_text(token)

    def key(self, token: int) -> str:
        """The token's text, or `bytes:\\xe2\\x82` where it is not a whole number of characters: the texts are keys."""
        if self.as_ids:
            return f"token_id:{token}"
        spelled = self.bytes(token)
        try:
            return spelled.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


def chat_entry(spelling: Spelling, token: TokenLogprob) -> dict[str, Any]:
    """One entry of `choices[].logprobs.content`."""
    top = zip(token.top_tokens, token.top_logprobs, strict=True)
    return {
        **_chat_token(spelling, token.token, token.logprob),
        "top_logprobs": [_chat_token(spelling, t, logprob) for t, logprob in top],
    }


def _chat_token(spelling: Spelling, token: int, logprob: float) -> dict[str, Any]:
    return {"token": spelling.text(token), "logprob": finite(logprob), "bytes": list(spelling.bytes(token))}


def prompt_logprobs_of(chunk: Chunk, num_tokens: int, top: int) -> list[TokenLogprob | None]:
    """What a choice's first chunk says of its prompt, at most `top` alternatives each; an error unless it is all."""
    if len(chunk.prompt_logprobs) != num_tokens:
        raise internal_error()  # wrong numbers would be taken for right ones
    return [
        t and TokenLogprob(t.token, t.logprob, t.top_tokens[:top], t.top_logprobs[:top], t.rank)
        for t in chunk.prompt_logprobs
    ]


def prompt_entry(tokenizer: Tokenizer, token: TokenLogprob | None) -> dict[str, Any] | None:
    """One entry of vLLM's `prompt_logprobs`: the token and the most likely ones of its position, by id."""
    if token is None:
        return None
    ranked = zip(token.top_tokens, token.top_logprobs, range(1, len(token.top_tokens) + 1), strict=True)
    entries = {str(t): _ranked(tokenizer, t, logprob, rank) for t, logprob, rank in ranked}
    return {str(token.token): _ranked(tokenizer, token.token, token.logprob, token.rank)} | entries


def _ranked(tokenizer: Tokenizer, token: int, logprob: float, rank: int) -> dict[str, Any]:
    return {"logprob": finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(token)}


def no_logprobs() -> CompletionLogprobs:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def add_tokens(
    lists: CompletionLogprobs, spelling: Spelling, tokens: Sequence[TokenLogprob], offsets: Sequence[int]
) -> None:
    """Appends generated tokens; the token drawn is among its position's most likely ones even if it is not."""
    for token, offset in zip(tokens, offsets, strict=True):
        text = spelling.key(token.token)
        _append(lists, text, finite(token.logprob), _top(spelling, token, text), offset)


def add_prompt(
    lists: CompletionLogprobs,
    spelling: Spelling,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    offsets: Sequence[int],
) -> None:
    """Appends the prompt's tokens; nothing is known about the first one."""
    for token, logprob, offset in zip(tokens, logprobs, offsets, strict=True):
        text = spelling.key(token)
        if logprob is None:
            _append(lists, text, None, None, offset)
        else:
            _append(lists, text, finite(logprob.logprob), _top(spelling, logprob, text), offset)


def _append(
    lists: CompletionLogprobs, text: str, logprob: float | None, top: dict[str, float] | None, offset: int
) -> None:
    lists["tokens"].append(text)
    lists["token_logprobs"].append(logprob)
    lists["top_logprobs"].append(top)
    lists["text_offset"].append(offset)


def _top(spelling: Spelling, token: TokenLogprob, text: str) -> dict[str, float]:
    """Of tokens that spell the same text, the more likely one counts, except for the one drawn."""
    top: dict[str, float] = {}
    for other, logprob in zip(token.top_tokens, token.top_logprobs, strict=True):
        top.setdefault(spelling.key(other), finite(logprob))
    top.setdefault(text, finite(token.logprob))
    return top


def prompt_offsets(
    tokenizer: Tokenizer, tokens: Sequence[int], text: str, *, skip_special_tokens: bool
) -> tuple[int, ...]:
    """Characters of the echoed `text` before each prompt token.

    A beginning-of-sequence token that the tokenizer put before the text has none of it.
    """
    bos = tokenizer.bos_token_id
    added = bos is not None and tokens[0] == bos and not text.startswith(tokenizer.token_text(bos))
    stream = detokenizer(tokenizer, (), skip_special_tokens=skip_special_tokens)
    offsets, position = [], 0
    for i, token in enumerate(tokens):
        offsets.append(min(position, len(text)))
        if i or not added:
            position += len(stream.push(token))
    return tuple(offsets)
