"""Structured output over whole fleets: the same tokens whatever the topology, the batch and the size of the pool."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine.engine import Engine, EngineConfig
from engine.grammar import Matcher
from engine.request import EngineRequest
from mesh.grammar import Vocabulary, compile_grammar
from mesh.params import SamplingParams, Thinking
from mesh.tokenizer import Tokenizer
from proxy.api.structured import json_grammar
from tests.e2e.fleet import Answer, Fleet, Shape, fleet
from tests.e2e.test_equality import loader
from tests.tiny_models import EOS, build

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {"type": "array", "items": {"type": "integer", "maximum": 10**6}, "minItems": 1, "maxItems": 3},
        "kind": {"enum": ["small", "großes", None]},
    },
    "required": ["name", "sizes", "kind"],
    "additionalProperties": False,
}
CODE = "start: /[a-f]{3}-[0-9]{4,9}/"
THINKING = Thinking(close=40, budget=9)
"""No answer begins within its budget unless the model writes that token, which is as good as any other."""
CASES = (
    (json_grammar(SCHEMA), None),
    (CODE, None),
    ('start: "yes" | "no" | "maybe"', None),
    (None, None),
    (CODE, THINKING),
)
PROMPTS = [[(7 * i + j) % 250 for j in range(1 + 13 * i)] for i in range(8)]
CLOSING = tuple((ord(c) - ord("!"), 5.0) for c in '",]}')
"""Random weights would rather go on writing; ids as in `tests.tiny_models.save_tokenizer`."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("qwen3", tmp_path_factory.mktemp("model"))


def open_fleet(model: Path, directory: Path, shape: Shape, prefill: int) -> Any:
    directory.mkdir(exist_ok=True)
    load = loader(model, shape)
    return fleet(directory, load, shape, prefill=prefill, decode=1, tokenizer=lambda: Tokenizer.load(model))


def params(grammar: str | None, thinking: Thinking | None = None) -> SamplingParams:
    return SamplingParams(
        max_tokens=60,
        top_p=0.95,
        seed=3,
        grammar=grammar,
        stop_token_ids=(EOS,),
        logit_bias=CLOSING,
        thinking=thinking,
    )


def generate(running: Fleet, *, alone: bool = False) -> list[list[list[Answer]]]:
    """Per case and prompt, two choices."""
    if not alone:
        return [running.generate(PROMPTS, params(*case), n=2) for case in CASES]
    return [[running.generate([p], params(*case), n=2)[0] for p in PROMPTS] for case in CASES]


def tokens(answers: list[list[list[Answer]]]) -> list[list[int]]:
    return [answer.tokens for grammar in answers for choices in grammar for answer in choices]


@pytest.fixture(scope="module")
def co_located(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[list[Answer]]]:
    """Every request by itself on one worker."""
    with open_fleet(model, tmp_path_factory.mktemp("alone"), Shape(), 0) as running:
        return generate(running, alone=True)


def test_answers_are_what_their_grammars_say(model: Path, co_located: list[list[list[Answer]]]) -> None:
    tokenizer = Tokenizer.load(model)
    objects, codes, words, _, thoughtful = co_located
    complete = 0
    for choices in objects:
        for answer in choices:
            if answer.finish == "stop":
                complete += 1
                assert answer.tokens[-1] == EOS
                jsonschema.validate(json.loads(tokenizer.decode(answer.tokens)), SCHEMA)
    assert complete > 4
    assert all(a.finish == "stop" and len(a.tokens) in range(9, 15) for choices in codes for a in choices)
    assert {tokenizer.decode(a.tokens) for choices in words for a in choices} == {"yes", "no", "maybe"}
    thoughts = []
    for answer in (answer for choices in thoughtful for answer in choices):
        if EOS in answer.tokens[:9]:
            continue
        thoughts.append(answer.tokens.index(THINKING.close))
        assert thoughts[-1] <= 9
        assert re.fullmatch("[a-f]{3}-[0-9]{4,9}", tokenizer.decode(answer.tokens[thoughts[-1] + 1 :]))
    assert len(thoughts) > 4


@pytest.mark.parametrize("prefill", [0, 1])
@pytest.mark.parametrize("shape", [Shape(), Shape(num_blocks=30, max_model_len=160)], ids=["room", "preempted"])
def test_tokens_do_not_depend_on_topology_batch_or_preemption(
    model: Path, co_located: list[list[list[Answer]]], tmp_path: Path, shape: Shape, prefill: int
) -> None:
    with open_fleet(model, tmp_path, shape, prefill) as running:
        assert tokens(generate(running)) == tokens(co_located)
        if shape.num_blocks < 100:
            assert running.workers["decode-0"].engine.num_preemptions > 0
        running.assert_quiet()


def test_another_worker_goes_on_at_any_token(model: Path, co_located: list[list[list[Answer]]]) -> None:
    prompt, grammar, wanted = PROMPTS[3], json_grammar(SCHEMA), co_located[0][3][1].tokens
    vocabulary = Vocabulary.of(Tokenizer.load(model))
    compiled = compile_grammar(vocabulary.tokenizer(), grammar)
    place = Matcher(compiled, len(vocabulary.tokens), frozenset(vocabulary.eos))
    other = Engine(loader(model, Shape())(), EngineConfig(64, 64, 512))
    given = range(0, len(wanted), 7)
    for k in given:
        settings = replace(params(grammar), choice=1)
        tokens = [*prompt, *wanted[:k]]
        other.add(EngineRequest(str(k), tokens, len(prompt), settings, b"r" * 16, matcher=place.copy()))
    rest: dict[str, list[int]] = {}
    while other.has_work:
        for out in other.step().tokens:
            rest.setdefault(out.request.key, []).append(out.token)
    assert rest == {str(k): wanted[k:] for k in given}
