"""The API over a model that says what a large one would to what the clients' own suites ask.

What is tried with it is what stands between client and model: the demo model cannot joke about cats. Where a request
has a grammar, the grammar decides: a prepared answer must satisfy it, and where none is prepared one is drawn from it.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mesh.grammar import Vocabulary, check_matcher, compile_grammar
from mesh.tokenizer import Tokenizer
from proxy.generation import GenerateRequest
from tests.proxy.api_client import Api
from tests.proxy.fake_dispatcher import Script

MODEL_DIR = Path(__file__).resolve().parents[2] / "deploy" / "demo_model"
LONGEST = 400
"""Tokens of an answer that is drawn."""


def _call(name: str, **arguments: Any) -> str:
    call = {"name": name, "arguments": arguments}
    return f"<tool_call>{json.dumps(call, ensure_ascii=False)}</tool_call>"


ANSWERS: tuple[tuple[str, str], ...] = (
    ("magic_function_no_args()", _call("magic_function_no_args")),
    ("magic_function(3)", _call("magic_function", input=3)),
    ("Pirate greeting", _call("greeting_generator", answer_style="pirate")),
    ("你好啊集团", _call("unicode_customer", customer_name="你好啊集团", description="A technology company")),
    ("こんにちは株式会社", _call("unicode_customer", customer_name="こんにちは株式会社", description="A company")),
    ("San Francisco", _call("get_weather", location="San Francisco, CA")),
    ("joke about cats", '{"setup": "Why did the cat sit on the computer?", "punchline": "To watch the mouse."}'),
    ("", "Hello! How can I help you?"),
)
"""What a user's last message contains, and what is said to it."""


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.load(str(MODEL_DIR))


@cache
def _compiler() -> Any:
    return Vocabulary.of(tokenizer()).tokenizer()


def scripted() -> Api:
    return Api(_script, tokenizer=tokenizer(), max_model_len=8192)


def _script(request: GenerateRequest) -> Script:
    turns = tokenizer().decode(request.tokens, skip_special_tokens=False).split("<|im_start|>")
    users = [turn.removeprefix("user\n") for turn in turns if turn.startswith("user\n")]
    answered = any(turn.startswith("tool\n") for turn in turns[-2:])
    text = next(answer for part, answer in ANSWERS if users and part in users[-1])
    if answered or ("<tool_call>" in text and "<tools>" not in turns[1]):
        text = ANSWERS[-1][1]
    (end, *_) = tokenizer().eos_token_ids
    tokens = [*tokenizer().encode(text, add_special_tokens=False), end]
    if request.params.grammar is not None and not _satisfies(request.params.grammar, tokens):
        tokens = _drawn(request.params.grammar)
    return Script(tokens)


def _satisfies(grammar: str, tokens: list[int]) -> bool:
    matcher = compile_grammar(_compiler(), grammar)
    return bool(matcher.try_consume_tokens(tokens[:-1]) == len(tokens) - 1 and matcher.is_accepting())


def _drawn(grammar: str) -> list[int]:
    """An output of the grammar that ends soon."""
    matcher, tokens = compile_grammar(_compiler(), grammar), list[int]()
    ends = tokenizer().eos_token_ids
    closing = [tokenizer().backend.token_to_id(mark) for mark in ('"', "}", "]")]
    while len(tokens) < LONGEST:
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        check_matcher(matcher)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little")).tolist()
        token = next((t for t in (*ends, *closing) if t in allowed), allowed[0])
        tokens.append(token)
        if token in ends:
            break
        matcher.consume_token(token)
    return tokens
