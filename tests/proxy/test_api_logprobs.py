"""Log-probabilities that JSON cannot say."""

from __future__ import annotations

import math

import pytest

from mesh.messages import TokenLogprob
from proxy.api.logprobs import LOWEST, Spelling, add_tokens, chat_entry, no_logprobs
from proxy.api.sse import compact
from tests.proxy.tiny_tokenizer import byte_level

TOKENIZER = byte_level()
SPELLING = Spelling(TOKENIZER)


@pytest.mark.parametrize("value", [-math.inf, math.nan])
def test_a_logprob_that_is_no_number_is_the_lowest(value: float) -> None:
    token = TokenLogprob(70, value, (71, 72), (-0.5, value))
    entry = chat_entry(SPELLING, token)
    assert (entry["logprob"], entry["top_logprobs"][1]["logprob"]) == (LOWEST, LOWEST)
    lists = no_logprobs()
    add_tokens(lists, SPELLING, [token], [0])
    assert lists["token_logprobs"] == [LOWEST]
    assert compact([entry, lists])


def test_tokens_of_one_text_count_with_the_more_likely_one() -> None:
    lists = no_logprobs()
    unknown = TOKENIZER.vocab_size - 1
    add_tokens(lists, SPELLING, [TokenLogprob(70, -1.0, (unknown, unknown - 1), (-0.5, -2.0))], [0])
    assert lists["top_logprobs"][0][""] == -0.5
