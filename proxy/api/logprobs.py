"""Log-probabilities in the two shapes that OpenAI's endpoints have for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mesh.messages import TokenLogprob
from mesh.tokenizer import Tokenizer
from proxy.text.detokenizer import detokenizer

LOWEST = -9999.0
"""Stands for minus infinity (a token that cannot be drawn), which JSON cannot say."""

CompletionLogprobs = dict[str, list[Any]]
"""`tokens`, `token_logprobs`, `top_logprobs`, `text_offset`: lists of one length."""


def finite(logprob: float) -> float:
    return logprob if logprob > LOWEST else LOWEST


def chat_entry(tokenizer: Tokenizer, token: TokenLogprob) -> dict[str, Any]:
    """One entry of `choices[].logprobs.content`."""
    top = zip(token.top_tokens, token.top_logprobs, strict=True)
    return {
        **_chat_token(tokenizer, token.token, token.logprob),
        "top_logprobs": [_chat_token(tokenizer, t, logprob) for t, logprob in top],
    }


def _chat_token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    spelled = tokenizer.token_bytes(token)
    return {"token": spelled.decode("utf-8", "replace"), "logprob": finite(logprob), "bytes": list(spelled)}


def completion_token(tokenizer: Tokenizer, token: int) -> str:
    """The token's text, or `bytes:\\xe2\\x82` where it is not a whole number of characters: the texts are keys."""
    spelled = tokenizer.token_bytes(token)
    try:
        return spelled.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)


def no_logprobs() -> CompletionLogprobs:
    return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def add_tokens(
    lists: CompletionLogprobs, tokenizer: Tokenizer, tokens: Sequence[TokenLogprob], offsets: Sequence[int]
) -> None:
    """Appends generated tokens; the token drawn is among its position's most likely ones even if it is not."""
    for token, offset in zip(tokens, offsets, strict=True):
        text = completion_token(tokenizer, token.token)
        _append(lists, text, finite(token.logprob), _top(tokenizer, token, text), offset)


def add_prompt(
    lists: CompletionLogprobs,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    logprobs: Sequence[TokenLogprob | None],
    offsets: Sequence[int],
) -> None:
    """Appends the prompt's tokens; nothing is known about the first one."""
    for token, logprob, offset in zip(tokens, logprobs, offsets, strict=True):
        text = completion_token(tokenizer, token)
        if logprob is None:
            _append(lists, text, None, None, offset)
        else:
            _append(lists, text, finite(logprob.logprob), _top(tokenizer, logprob, text), offset)


def _append(
    lists: CompletionLogprobs, text: str, logprob: float | None, top: dict[str, float] | None, offset: int
) -> None:
    lists["tokens"].append(text)
    lists["token_logprobs"].append(logprob)
    lists["top_logprobs"].append(top)
    lists["text_offset"].append(offset)


def _top(tokenizer: Tokenizer, token: TokenLogprob, text: str) -> dict[str, float]:
    """Of tokens that spell the same text, the more likely one counts, except for the one drawn."""
    top: dict[str, float] = {}
    for other, logprob in zip(token.top_tokens, token.top_logprobs, strict=True):
        top.setdefault(completion_token(tokenizer, other), finite(logprob))
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
