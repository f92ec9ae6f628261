"""Greedy tokens equal transformers', token for token, whatever the topology, transport, cache state or pool size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from engine.runner import ModelRunner
from mesh.params import SamplingParams
from tests.e2e.fleet import Answer, Fleet, Shape, fleet
from tests.tiny_models import FAMILIES, VOCAB, build

NEW_TOKENS = 10
LENGTHS = (1, 2, 7, 8, 9, 15, 16, 17, 31, 32, 33, 48, 63, 64, 65, 96, 100)
"""From one token over block (8) and chunk (32) boundaries to several chunks."""
PROMPTS = 51
GREEDY = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, logprobs=0)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(family: str) -> Path:
        return build(family, tmp_path_factory.mktemp(family))

    return make


@cache
def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(11)
    made = []
    for i in range(PROMPTS):
        length = LENGTHS[i % len(LENGTHS)]
        made.append(torch.randint(0, VOCAB - 8, (length,), generator=generator).tolist())
    return made


@cache
def reference(directory: Path) -> list[tuple[list[int], list[float]]]:
    """Greedy continuations of all prompts by transformers."""
    return continued(directory, prompts())


def continued(directory: Path, batch: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Greedy continuations by transformers, in float32, with log-probabilities."""
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    answers = []
    with torch.inference_mode():
        for prompt in batch:
            out = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                return_dict_in_generate=True,
                output_logits=True,
            )
            tokens = out.sequences[0, len(prompt) :].tolist()
            rows = [torch.log_softmax(logits[0].float(), -1) for logits in out.logits]
            answers.append((tokens, [float(row[t]) for row, t in zip(rows, tokens, strict=True)]))
    return answers


def loader(directory: Path, shape: Shape, dtype: str = "float32") -> Callable[[], ModelRunner]:
    def load() -> ModelRunner:
        return ModelRunner.load(
            directory,
            device="cpu",
            dtype=dtype,
            block_tokens=shape.block_tokens,
            num_blocks=shape.num_blocks,
            memory_utilization=0.5,
            max_model_len=shape.max_model_len,
            max_num_batched_tokens=shape.max_num_batched_tokens,
        )

    return load


def assert_equal(answers: list[list[Answer]], expected: list[tuple[list[int], list[float]]]) -> None:
    for (answer,), (tokens, logprobs) in zip(answers, expected, strict=True):
        assert answer.tokens == tokens
        assert answer.finish == "length"
        assert answer.logprobs == pytest.approx(logprobs, abs=1e-4)


def check(directory: Path, tmp_path: Path, shape: Shape, *, prefill: int, decode: int) -> None:
    expected = reference(directory)
    with fleet(tmp_path, loader(directory, shape), shape, prefill=prefill, decode=decode) as running:
        assert_equal(running.generate(prompts(), GREEDY), expected)
        assert_equal(running.generate(prompts(), GREEDY), expected)  # now with prefix hits
        carried = {t for w in running.workers.values() for t, size in w.kv.stats().bytes_in.items() if size}
        if prefill:  # a burst may exhaust a transport's slots; ZeroMQ then carries the rest
            assert {shape.transports[0]} <= carried <= {shape.transports[0], "zmq"}
        else:
            assert carried == set()
        running.assert_quiet()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_one_prefill_and_one_decode_worker_say_what_transformers_says(
    family: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    check(models(family), tmp_path, Shape(), prefill=1, decode=1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_co_located_worker_says_what_transformers_says(
    family: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    check(models(family), tmp_path, Shape(), prefill=0, decode=1)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_two_prefill_and_two_decode_workers_say_what_transformers_says(
    family: str, models: Callable[[str], Path], tmp_path: Path
) -> None:
    check(models(family), tmp_path, Shape(), prefill=2, decode=2)


def test_a_prefill_worker_fetches_a_conversations_history_from_the_decode_worker(
    models: Callable[[str], Path], tmp_path: Path
) -> None:
    """The first turn's prefill worker is gone; the next one computes only what is new."""
    shape, directory = Shape(), models("qwen3")
    first = [token for prompt in prompts()[-7:] for token in prompt][:381]
    with fleet(tmp_path, loader(directory, shape), shape, prefill=1, decode=1) as running:
        ((told,),) = running.generate([first], GREEDY)
        running.workers["prefill-0"].process.drain()
        running.wait_for("prefill", 0)
        running.start("prefill", "prefill-1")
        running.wait_for("prefill", 1)
        second = [*first, *told.tokens, *prompts()[-1][:90]]
        assert_equal(running.generate([second], GREEDY), continued(directory, [second]))
        came = sum(running.workers["prefill-1"].kv.stats().bytes_in.values())
        blocks = (len(first) + len(told.tokens) - 1) // shape.block_tokens
        assert came >= blocks * running.workers["prefill-1"].kv.layout.block_bytes
        running.assert_quiet()


TRANSPORTS = {
    "local": Shape(transports=("local",)),
    "zmq over ipc": Shape(transports=("zmq",)),
    "zmq over tcp": Shape(transports=("zmq",), kv_scheme="tcp"),
    "shm": Shape(transports=("shm",)),
    "gloo": Shape(transports=("gloo",)),
}


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_every_transport_carries_the_same_blocks(transport: str, models: Callable[[str], Path], tmp_path: Path) -> None:
    check(models("llama3"), tmp_path, TRANSPORTS[transport], prefill=1, decode=1)


@pytest.mark.parametrize("prefill", [0, 1])
def test_preemption_by_a_small_pool_changes_no_token(
    prefill: int, models: Callable[[str], Path], tmp_path: Path
) -> None:
    shape = Shape(num_blocks=20, max_model_len=128)
    directory = models("qwen3")
    with fleet(tmp_path, loader(directory, shape), shape, prefill=prefill, decode=1) as running:
        assert_equal(running.generate(prompts(), GREEDY), reference(directory))
        assert running.workers["decode-0"].engine.num_preemptions > 0
        running.assert_quiet()


def sampled(running: Fleet, batch: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(
        max_tokens=16,
        temperature=0.8,
        top_p=0.9,
        seed=4711,
        allowed_token_ids=tuple(range(3, VOCAB - 8, 2)),
        bad_words=tuple((token, token + 2) for token in range(3, VOCAB - 10, 2)),
    )
    return [answer.tokens for (answer,) in running.generate(batch, params)]


@pytest.fixture(scope="module")
def sampled_alone(models: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[list[int]]]:
    """Each prompt by itself on a co-located worker."""
    shape = Shape()
    directory = tmp_path_factory.mktemp("alone")
    with fleet(directory, loader(models("llama3"), shape), shape, prefill=0, decode=1) as running:
        yield [sampled(running, [prompt])[0] for prompt in prompts()[:16]]


@pytest.mark.parametrize("prefill", [0, 1])
def test_sampled_tokens_do_not_depend_on_batch_or_topology(
    prefill: int, models: Callable[[str], Path], sampled_alone: list[list[int]], tmp_path: Path
) -> None:
    shape = Shape()
    with fleet(tmp_path, loader(models("llama3"), shape), shape, prefill=prefill, decode=1) as running:
        assert sampled(running, prompts()[:16]) == sampled_alone
        assert [sampled(running, [prompt])[0] for prompt in prompts()[:16]] == sampled_alone


def test_choices_of_one_prompt_are_what_each_would_be_alone(models: Callable[[str], Path], tmp_path: Path) -> None:
    shape = Shape()
    params = SamplingParams(max_tokens=8, temperature=1.0, seed=5)
    with fleet(tmp_path, loader(models("llama3"), shape), shape, prefill=1, decode=1) as running:
        prompt = prompts()[12]
        (together,) = running.generate([prompt], params, n=4)
        (again,) = running.generate([prompt], params, n=4)
        assert [a.tokens for a in together] == [a.tokens for a in again]
        assert len({tuple(a.tokens) for a in together}) > 1
        running.assert_quiet()
