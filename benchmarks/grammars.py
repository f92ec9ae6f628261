"""What grammars cost over a vocabulary of 128 k tokens: compiling, a mask, applying it to a row of logits.

python -m benchmarks.grammars
"""

from __future__ import annotations

import json
from random import Random
from statistics import mean, quantiles
from time import perf_counter

import numpy as np
import torch

from engine.grammar import Matcher
from engine.request import EngineRequest
from engine.sampler import sample
from mesh.grammar import Vocabulary, compile_grammar
from mesh.params import SamplingParams
from proxy.api.structured import json_grammar
from tests.engine.schemas import schemas

VOCAB = 128_000
TOKENS = 300
SCHEMAS = 300
"""Those whose answers the tests check."""
KINDS = [
    {"type": "string"},
    {"type": "integer"},
    {"type": "array", "items": {"type": "string"}},
    {"enum": ["a", "b", "c"]},
    {"type": "string", "pattern": "^[a-z]+$"},
]
FIELDS = {f"field_{i}": KINDS[i % len(KINDS)] for i in range(10)}
GRAMMARS = {
    "JSON, ten fields": json_grammar({"type": "object", "properties": FIELDS, "required": list(FIELDS)}),
    "any JSON object": json_grammar({"type": "object"}),
    "regex": "start: /[A-Z][a-z]+( [a-z]+)*\\./",
    "choice of 100": "start: " + " | ".join(json.dumps(f"option {i}") for i in range(100)),
}


def vocabulary() -> Vocabulary:
    """All bytes, then made-up words of letters, digits and JSON's punctuation."""
    choose = Random(0)
    words = {bytes([i]): None for i in range(256)}
    while len(words) < VOCAB - 2:
        letters = choose.choices(
            b'abcdefghijklmnopqrstuvwxyz"{}:, 0123456789', [9] * 26 + [1] * 16, k=choose.randint(2, 9)
        )
        words[b" " * choose.randint(0, 1) + bytes(letters)] = None
    return Vocabulary((*words, b"<s>", b"</s>"), (VOCAB - 2, VOCAB - 1), (VOCAB - 1,))


def main() -> None:
    torch.set_num_threads(1)
    began = perf_counter()
    tokenizer = vocabulary().tokenizer()
    print(f"vocabulary ready in {perf_counter() - began:.2f} s (making it up included)")
    choose, eos = Random(1), frozenset((VOCAB - 1,))
    for name, grammar in GRAMMARS.items():
        began = perf_counter()
        compiled = Matcher(compile_grammar(tokenizer, grammar), VOCAB, eos)
        compiling = perf_counter() - began
        masks: list[float] = []
        while len(masks) < TOKENS:
            matcher, tokens = compiled.copy(), list[int]()
            while VOCAB - 1 not in tokens[-1:] and len(masks) < TOKENS:
                began = perf_counter()
                flags = matcher.allowed(tokens, SamplingParams(max_tokens=TOKENS, stop_token_ids=tuple(eos)))
                masks.append((perf_counter() - began) * 1e6)
                tokens.append(int(choose.choice(np.flatnonzero(flags))))
        p50, p99 = quantiles(masks, n=100)[49::49]
        print(f"{name}: compiled in {compiling * 1e3:.1f} ms; mask {mean(masks):.0f} µs, p50 {p50:.0f}, p99 {p99:.0f}")
    took = []
    for schema in schemas(SCHEMAS):
        began = perf_counter()
        compile_grammar(tokenizer, json_grammar(schema))
        took.append((perf_counter() - began) * 1e3)
    cuts = quantiles(took, n=100)
    print(f"{SCHEMAS} schemas: compiled in p50 {cuts[49]:.1f} ms, p95 {cuts[94]:.1f}, at most {max(took):.1f}")
    for constrained in (False, True):
        matcher = Matcher(compile_grammar(tokenizer, GRAMMARS["any JSON object"]), VOCAB, eos)
        params = SamplingParams(max_tokens=9, temperature=0.0)
        row = EngineRequest("r", [0], 1, params, b"", matcher=matcher if constrained else None)
        logits = torch.randn(1, VOCAB)
        took = []
        for _ in range(200):
            began = perf_counter()
            sample(logits, [row])
            took.append((perf_counter() - began) * 1e6)
        print(f"sampling one greedy row {'with' if constrained else 'without'} a grammar: {quantiles(took)[1]:.0f} µs")


if __name__ == "__main__":
    main()
