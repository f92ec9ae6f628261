"""A body's sampling fields as the workers' `SamplingParams` and the proxy's own text options."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mesh.errors import RequestError
from mesh.params import SamplingParams
from mesh.tokenizer import Tokenizer
from proxy.api.errors import unsupported
from proxy.api.schemas import GenerationBody
from proxy.text.choice import ChoiceText
from proxy.text.detokenizer import detokenizer
from proxy.text.stopstrings import StopStrings

MAX_STOPS = 4
MAX_STOP_CHARS = 1000
"""A stop string is compared with every token's text; nobody needs a page of it."""
MAX_LOGIT_BIAS = 1024
"""Each entry travels to every worker of the request and is applied at every step."""
MAX_STOP_TOKEN_IDS = 1024
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

    def choice(self, tokenizer: Tokenizer, prompt: Sequence[int], start: int = 0) -> ChoiceText:
        """A fresh choice that continues `prompt`; its text begins after `start` characters."""
        return ChoiceText(
            detokenizer(tokenizer, prompt, skip_special_tokens=self.skip_special_tokens),
            StopStrings(self.stops, include=self.include_stop) if self.stops else None,
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
) -> SamplingParams:
    """The workers' share of `body`. Raises `RequestError` 400."""
    stop_ids = _stop_token_ids(body.stop_token_ids or (), tokenizer)
    if not body.ignore_eos:
        stop_ids = tuple(dict.fromkeys((*stop_ids, *tokenizer.eos_token_ids)))
    temperature = 1.0 if body.temperature is None else body.temperature
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=0.0 if temperature < GREEDY_BELOW else temperature,
        top_k=max(body.top_k or 0, 0),
        top_p=1.0 if body.top_p is None else body.top_p,
        min_p=body.min_p or 0.0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=logit_bias(body.logit_bias, tokenizer.vocab_size),
        seed=secrets.randbits(64) if body.seed is None else body.seed % SEEDS,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        stop_token_ids=stop_ids,
        min_tokens=min(body.min_tokens or 0, max_tokens),
        grammar=grammar,
    )


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


def stop_strings(stop: Any) -> tuple[str, ...]:
    """`stop` as OpenAI defines it: a string, up to four of them, or null."""
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) for s in stops):
        raise RequestError(400, "stop must be a string or a list of strings.", param="stop")
    if len(stops) > MAX_STOPS:
        raise RequestError(400, f"stop may hold at most {MAX_STOPS} strings.", param="stop")
    if not all(0 < len(s) <= MAX_STOP_CHARS for s in stops):
        raise RequestError(400, f"A stop string must have between 1 and {MAX_STOP_CHARS} characters.", param="stop")
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


def _stop_token_ids(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise RequestError(400, f"stop_token_ids may hold at most {MAX_STOP_TOKEN_IDS} ids.", param="stop_token_ids")
    if any(i >= tokenizer.vocab_size for i in ids):
        raise RequestError(
            400, f"stop_token_ids must be token ids below {tokenizer.vocab_size}.", param="stop_token_ids"
        )
    return tuple(ids)
