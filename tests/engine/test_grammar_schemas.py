"""Three hundred schemas, a model of random weights at temperature 1: whatever it completes, the schema accepts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine.engine import Engine, EngineConfig
from engine.grammar import Matcher
from engine.request import EngineRequest
from engine.runner import ModelRunner
from mesh.grammar import Vocabulary, compile_grammar
from mesh.params import SamplingParams
from mesh.tokenizer import Tokenizer
from proxy.api.structured import json_grammar
from tests.engine.schemas import schemas
from tests.tiny_models import EOS, build

COUNT = 300
MAX_TOKENS = 160


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("qwen3", tmp_path_factory.mktemp("model"), num_hidden_layers=1)


def answers(model: Path, asked: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Text and finish of one answer per schema, all in one engine."""
    tokenizer = Tokenizer.load(model)
    vocabulary = Vocabulary.of(tokenizer)
    ll = vocabulary.tokenizer()
    # Random weights would rather go on writing than close what they have opened.
    closing = tuple((tokenizer.encode(c)[0], 4.0) for c in '"]},')
    runner = ModelRunner.load(
        model,
        device="cpu",
        dtype="float32",
        block_tokens=16,
        num_blocks=COUNT * 12,
        memory_utilization=0.5,
        max_model_len=512,
        max_num_batched_tokens=COUNT,
    )
    engine = Engine(runner, EngineConfig(COUNT, COUNT, 512))
    requests = []
    for i, schema in enumerate(asked):
        grammar = json_grammar(schema)
        params = SamplingParams(
            max_tokens=MAX_TOKENS, seed=i, logit_bias=closing, stop_token_ids=(EOS,), grammar=grammar
        )
        request = EngineRequest(str(i), [i % 250, 3, 5], 3, params, b"r" * 16)
        request.matcher = Matcher(compile_grammar(ll, grammar), ll.vocab_size, frozenset(vocabulary.eos))
        engine.add(request)
        requests.append(request)
    finishes = {}
    while engine.has_work:
        output = engine.step()
        assert output.failed == ()
        finishes.update({out.request.key: out.finish for out in output.tokens if out.finish})
    engine.check()
    texts = []
    for request in requests:
        output_tokens = [t for t in request.tokens[3:] if t != EOS]
        text = b"".join(map(tokenizer.token_bytes, output_tokens)).decode("utf-8", "replace")
        texts.append((text, finishes[request.key]))
    return texts


def test_every_completed_answer_is_what_its_schema_says(model: Path) -> None:
    asked = schemas(COUNT)
    complete = 0
    for schema, (text, finish) in zip(asked, answers(model, asked), strict=True):
        if finish == "stop":
            complete += 1
            jsonschema.Draft202012Validator(schema).validate(json.loads(text))
    assert complete > 0.8 * COUNT
