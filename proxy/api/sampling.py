"""A body's sampling fields as the workers' `SamplingParams` and the proxy's own text options."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mesh.errors import RequestError
from mesh.params import SamplingParams, Thinking
from mesh.tokenizer import Tokenizer
from proxy.api.errors import unsupported
from proxy.api.reasoning import Reasoning
from proxy.api.schemas import GenerationBody
from proxy.api.tools import Tools
from proxy.text.choice import ChoiceText
from proxy.text.detokenizer import detokenizer
from proxy.text.stopstrings import StopStrings

MAX_STOPS = 4
MAX_STOP_CHARS = 1000
"""A stop string is compared with every token's text; nobody needs a page of it."""
MAX_LOGIT_BIAS = 1024
"""Each entry travels to every worker of the request and is applied at every step."""
MAX_STOP_TOKEN_IDS = 1024
MAX_ALLOWED_TOKEN_IDS = 4096
MAX_PROMPT_LOGPROBS = 1 << 18
"""Of all choices: a million would fill the worker's message, and writing them would hold up everybody's streams."""
MAX_BAD_WORDS = 256
"""Each is compared with the end of the output at every step."""
GREEDY_BELOW = 1e-5
"""Logits divided by less than this overflow float32; the distribution is one token's anyway."""
SEEDS = 1 << 64


@dataclass(frozen=True, slots=True)
class TextOptions:
    """How the tokens of every choice become text."""

    stops: tuple[str, ...]
    include_stop: bool
    skip_special_tokens: bool
    min_tokens: int

    def choice(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        start: int = 0,
        tools: Tools | None = None,
        reasoning: Reasoning | None = None,
    ) -> ChoiceText:
        """A fresh choice that continues `prompt`; its text begins after `start` characters."""
        keep = frozenset[int]() if tools is None else tools.mark_ids
        if reasoning is not None:
            keep |= reasoning.mark_ids
        return ChoiceText(
            detokenizer(tokenizer, prompt, skip_special_tokens=self.skip_special_tokens, keep=keep),
            StopStrings(self.stops, include=self.include_stop) if self.stops else None,
            None if tools is None else tools.parser(),
            None if reasoning is None else reasoning.parser(),
            hide_stop_token=not self.include_stop,
            min_tokens=self.min_tokens,
            start=start,
        )


def text_options(body: GenerationBody) -> TextOptions:
    return TextOptions(
        stops=stop_strings(body.stop),
        include_stop=bool(body.include_stop_str_in_output),
        skip_special_tokens=body.skip_special_tokens is not False,
        min_tokens=body.min_tokens or 0,
    )


def sampling_params(
    body: GenerationBody,
    tokenizer: Tokenizer,
    max_tokens: int,
    logprobs: int | None,
    prompt_logprobs: int | None,
    grammar: str | None,
    thinking: Thinking | None = None,
) -> SamplingParams:
    """The workers' share of `body`. Raises `RequestError` 400."""
    stop_ids = _checked_ids("stop_token_ids", body.stop_token_ids or (), MAX_STOP_TOKEN_IDS, tokenizer)
    if not body.ignore_eos:
        stop_ids = tuple(dict.fromkeys((*stop_ids, *tokenizer.eos_token_ids)))
    allowed = _allowed_token_ids(body.allowed_token_ids, tokenizer)
    bad_words = _bad_words(body.bad_words or (), tokenizer)
    _check_some_token_is_left(allowed, bad_words, stop_ids if body.min_tokens else (), tokenizer)
    if grammar is not None and (allowed or bad_words):
        param = "allowed_token_ids" if allowed else "bad_words"
        raise RequestError(400, f"{param} cannot be combined with a form of the output.", param=param)
    defaults = tokenizer.sampling
    temperature = defaults.temperature if body.temperature is None else body.temperature
    penalty = defaults.repetition_penalty if body.repetition_penalty is None else body.repetition_penalty
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=max(defaults.top_k if body.top_k is None else body.top_k, 0),
        top_p=defaults.top_p if body.top_p is None else body.top_p,
        min_p=defaults.min_p if body.min_p is None else body.min_p,
        repetition_penalty=penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=logit_bias(body.logit_bias, tokenizer.vocab_size),
        seed=secrets.randbits(64) if body.seed is None else body.seed % SEEDS,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop_token_ids=stop_ids,
        min_tokens=min(body.min_tokens or 0, max_tokens),
        allowed_token_ids=allowed,
        bad_words=bad_words,
        priority=body.priority or 0,
        grammar=grammar,
        thinking=thinking,
    )


def truncated(body: GenerationBody, tokens: list[int], asked: int | None, max_model_len: int) -> list[int]:
    """What `truncate_prompt_tokens` leaves of a prompt; -1: as much as `asked` tokens of output leave room for."""
    limit = body.truncate_prompt_tokens
    if limit is None:
        return tokens
    if limit == 0 or limit > max_model_len:
        raise RequestError(
            400, f"truncate_prompt_tokens must be -1 or from 1 to {max_model_len}.", param="truncate_prompt_tokens"
        )
    if limit == -1:
        limit = max(1, max_model_len - (asked or 1))
    return tokens[:limit] if body.truncation_side == "right" else tokens[-limit:]


def token_budget(asked: int | None, prompt_tokens: int, max_model_len: int, param: str) -> int:
    """Tokens to generate: what was asked for, at most the room that the prompt leaves.

    Raises `RequestError` 400 `context_length_exceeded` when it leaves none.
    """
    room = max_model_len - prompt_tokens
    if room < 1:
        raise context_length_exceeded(max_model_len, f"{prompt_tokens}", param)
    return room if asked is None else min(asked, room)


def context_length_exceeded(max_model_len: int, prompt_tokens: str, param: str) -> RequestError:
    """Clients recognise the beginning of this sentence."""
    return RequestError(
        400,
        f"This model's maximum context length is {max_model_len} tokens. However, your {param} "
        f"resulted in {prompt_tokens} tokens, which leaves no room for the answer. Please shorten it.",
        code="context_length_exceeded",
        param=param,
    )


def stop_strings(stop: Any, param: str = "stop") -> tuple[str, ...]:
    """`stop` as OpenAI defines it: a string, up to four of them, or null."""
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise RequestError(400, f"{param} must be a string or a list of strings.", param=param)
    if len(stops) > MAX_STOPS:
        raise RequestError(400, f"{param} may hold at most {MAX_STOPS} strings.", param=param)
    if not all(0 < len(s) <= MAX_STOP_CHARS for s in stops):
        raise RequestError(400, f"A stop string must have between 1 and {MAX_STOP_CHARS} characters.", param=param)
    return tuple(stops)


def logit_bias(bias: Any, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """`{"token id": bias}` as sorted pairs."""
    if bias is None:
        return ()
    if not isinstance(bias, dict):
        raise RequestError(400, "logit_bias must map token ids to numbers.", param="logit_bias")
    if len(bias) > MAX_LOGIT_BIAS:
        raise RequestError(400, f"logit_bias may have at most {MAX_LOGIT_BIAS} entries.", param="logit_bias")
    pairs: dict[int, float] = {}
    for key, value in bias.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < vocab_size):
            raise RequestError(400, f"logit_bias: {key[:20]!r} is no token id below {vocab_size}.", param="logit_bias")
        if isinstance(value, bool) or not isinstance(value, int | float) or not -100 <= value <= 100:
            raise RequestError(400, "logit_bias: a bias must be a number from -100 to 100.", param="logit_bias")
        pairs[int(key)] = float(value)
    return tuple(sorted(pairs.items()))


def refuse_extra_choices(best_of: int | None, n: int) -> None:
    """`best_of` picks the best of more choices than it returns, which is not served."""
    if best_of not in (None, 1, n):
        raise unsupported("best_of", "only best_of = n is served")


def check_stream_options(body: GenerationBody) -> None:
    if body.stream_options is not None and not body.stream:
        raise RequestError(400, "stream_options is only allowed when stream is true.", param="stream_options")


def check_min_tokens(min_tokens: int | None, max_tokens: int | None) -> None:
    if min_tokens is not None and max_tokens is not None and min_tokens > max_tokens:
        raise RequestError(400, "min_tokens must not be above max_tokens.", param="min_tokens")


def check_prompt_logprobs(body: GenerationBody, prompt_tokens: int) -> None:
    """`prompt_tokens`: of all prompts."""
    if body.prompt_logprobs is None:
        return
    if body.stream:
        raise RequestError(400, "prompt_logprobs are not available in a stream.", param="prompt_logprobs")
    if prompt_tokens * (body.n or 1) * (body.prompt_logprobs + 1) > MAX_PROMPT_LOGPROBS:
        raise RequestError(
            400,
            f"prompt_logprobs: prompt tokens times n times (prompt_logprobs + 1) may be at most {MAX_PROMPT_LOGPROBS}.",
            param="prompt_logprobs",
        )


def _checked_ids(name: str, ids: Sequence[int], limit: int, tokenizer: Tokenizer) -> tuple[int, ...]:
    if len(ids) > limit:
        raise RequestError(400, f"{name} may hold at most {limit} ids.", param=name)
    if any(i >= tokenizer.vocab_size for i in ids):
        raise RequestError(400, f"{name} must be token ids below {tokenizer.vocab_size}.", param=name)
    return tuple(ids)


def _allowed_token_ids(ids: Sequence[int] | None, tokenizer: Tokenizer) -> tuple[int, ...]:
    if ids is None:
        return ()
    if not ids:
        raise RequestError(400, "allowed_token_ids must not be empty.", param="allowed_token_ids")
    return tuple(dict.fromkeys(_checked_ids("allowed_token_ids", ids, MAX_ALLOWED_TOKEN_IDS, tokenizer)))


def _bad_words(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token sequences of each word, at a text's beginning and after a space."""
    if len(words) > MAX_BAD_WORDS:
        raise RequestError(400, f"bad_words may hold at most {MAX_BAD_WORDS} words.", param="bad_words")
    sequences: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip()
        if not 0 < len(bare) <= MAX_STOP_CHARS:
            raise RequestError(
                400, f"A bad word must have between 1 and {MAX_STOP_CHARS} characters.", param="bad_words"
            )
        plain = tuple(tokenizer.encode(bare, add_special_tokens=False))
        spaced = tuple(tokenizer.encode(" " + bare, add_special_tokens=False))
        sequences |= dict.fromkeys(s for s in (plain, spaced) if s)
    return tuple(sequences)


def _check_some_token_is_left(
    allowed: Sequence[int], bad_words: Sequence[Sequence[int]], suppressed: Sequence[int], tokenizer: Tokenizer
) -> None:
    """Whatever the output, one token can be drawn: stricter than need be where long bad words end on the last one."""
    forbidden = {word[-1] for word in bad_words} | set(suppressed)
    if len(forbidden) >= tokenizer.vocab_size or (allowed and forbidden.issuperset(allowed)):
        raise RequestError(
            400,
            "bad_words and min_tokens together may forbid every allowed token.",
            param="allowed_token_ids" if allowed else "bad_words",
        )
