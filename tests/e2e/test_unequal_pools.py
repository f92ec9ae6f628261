"""A prefill and a decode worker whose KV pools differ, in one process and in real ones."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deploy.demo_model.train.facts import filler
from deploy.demo_model.train.words import Split, Words
from mesh.modeldir import DEMO_MODEL
from tests.e2e.fleet import Fleet, Shape, fleet
from tests.e2e.processes import Deployment, free_port
from tests.e2e.test_equality import GREEDY, assert_equal, continued, loader, prompts, reference
from tests.tiny_models import build

SMALL = Shape()
LARGE = replace(SMALL, block_tokens=32)
SIZES = [(LARGE, SMALL), (SMALL, LARGE)]
IDS = ["large to small", "small to large"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("qwen3", tmp_path_factory.mktemp("qwen3"))


@contextmanager
def unequal(
    model: Path, folder: Path, prefill: Shape, decode: Shape, dtypes: tuple[str, str] = ("float32", "float32")
) -> Iterator[Fleet]:
    with fleet(folder, loader(model, decode, dtypes[1]), decode, prefill=0, decode=1) as running:
        running.start("prefill", "prefill-0", loader(model, prefill, dtypes[0]))
        running.wait_for("prefill", 1)
        yield running


@pytest.mark.parametrize(("prefill", "decode"), SIZES, ids=IDS)
def test_unequal_block_sizes_change_no_token(prefill: Shape, decode: Shape, model: Path, tmp_path: Path) -> None:
    with unequal(model, tmp_path, prefill, decode) as running:
        assert_equal(running.generate(prompts(), GREEDY), reference(model))
        came = sum(running.workers["decode-0"].kv.stats().bytes_in.values())
        held = running.workers["prefill-0"].kv.layout
        whole = sum(len(prompt) // held.block_tokens for prompt in prompts()) * held.block_bytes
        assert came >= whole, "every prompt was computed by the prefill worker"
        assert_equal(running.generate(prompts(), GREEDY), reference(model))  # now with prefix hits
        running.assert_quiet()


@pytest.mark.parametrize(("prefill", "decode"), SIZES, ids=IDS)
def test_a_history_in_blocks_of_another_size_is_fetched(
    prefill: Shape, decode: Shape, model: Path, tmp_path: Path
) -> None:
    """The first turn's prefill worker is gone; the next one takes what the decode worker has in its own blocks."""
    first = [token for prompt in prompts()[-7:] for token in prompt][:381]
    with unequal(model, tmp_path, prefill, decode) as running:
        ((told,),) = running.generate([first], GREEDY)
        running.workers["prefill-0"].process.drain()
        running.wait_for("prefill", 0)
        running.start("prefill", "prefill-1", loader(model, prefill))
        running.wait_for("prefill", 1)
        second = [*first, *told.tokens, *prompts()[-1][:90]]
        assert_equal(running.generate([second], GREEDY), continued(model, [second]))
        fetched = running.workers["prefill-1"].kv.stats()
        held = running.workers["decode-0"].kv.layout
        assert fetched.blocks_in >= (len(first) + len(told.tokens) - 1) // held.block_tokens
        running.assert_quiet()


def test_from_float32_to_bfloat16_the_likeliest_tokens_stay_likely(model: Path, tmp_path: Path) -> None:
    """Nothing is exact between formats. The first token is the prefill worker's; what is said of the next one is the
    decode worker's, over keys and values that were converted."""
    batch = prompts()[10:17]
    with unequal(model, tmp_path, LARGE, SMALL, ("float32", "bfloat16")) as running:
        answers = running.generate(batch, replace(GREEDY, max_tokens=2))
        for (answer,), (tokens, logprobs) in zip(answers, continued(model, batch), strict=True):
            assert answer.tokens[0] == tokens[0]
            if answer.tokens[1] == tokens[1]:
                assert answer.logprobs[1] == pytest.approx(logprobs[1], abs=0.5)
        same = sum(a.tokens == tokens[:2] for (a,), (tokens, _) in zip(answers, continued(model, batch), strict=True))
        assert same >= len(batch) - 2
        assert running.workers["decode-0"].kv.stats().blocks_in > 0
        running.assert_quiet()


FLAGS = ("--max-num-batched-tokens", "256")
PREFILL = ("--block-tokens", "64", "--dtype", "float32", "--kv-blocks", "256")
DECODE = ("--block-tokens", "16", "--kv-blocks", "1024")


@contextmanager
def processes(folder: Path) -> Iterator[Deployment]:
    """A proxy that gives every prompt to a prefill worker once there is one."""
    running = Deployment(folder, DEMO_MODEL, free_port(), FLAGS)
    try:
        running.start_proxy("--disaggregate-above", "0")
        yield running
    finally:
        running.stop()


def question(number: int) -> str:
    words = Words(random.Random(number), Split.HELD_OUT)
    sentences = [filler(words) for _ in range(30)]
    sentences.insert(7 * number, "Mirel's door code is 70815.")
    return " ".join(sentences) + " What is Mirel's door code?"


def ask(service: Deployment, text: str, salt: str) -> tuple[str, str]:
    """The answer, and who computed the prompt; the salt keeps what it was asked under another one out."""
    raw = service.client.chat.completions.with_raw_response.create(
        model=service.model_name,
        messages=[{"role": "user", "content": text}],
        temperature=0,
        max_tokens=24,
        extra_body={"cache_salt": salt},
    )
    completion: Any = raw.parse()
    return completion.choices[0].message.content, raw.headers.get("x-kvmesh-prefill", "")


@pytest.mark.e2e
@pytest.mark.timeout(240)
def test_processes_with_unequal_block_sizes_say_what_one_alone_says(tmp_path: Path) -> None:
    with processes(tmp_path) as service:
        decode = service.start_worker("decode", "decode-0", *DECODE, "--dtype", "float32")
        service.wait_ready()
        questions = [question(number) for number in range(4)]
        alone = [ask(service, text, "alone") for text in questions]
        assert {prefill for _, prefill in alone} <= {"", "none"}
        service.start_worker("prefill", "prefill-0", *PREFILL)
        service.wait_ready()
        apart = [ask(service, text, "apart") for text in questions]
        assert [text for text, _ in apart] == [text for text, _ in alone]
        assert {prefill for _, prefill in apart} == {"prefill-0"}
        assert apart[0][0] == "Mirel's door code is 70815."
        assert decode.metric("kvmesh_recomputed_tokens_total") == 0
        assert decode.metric("kvmesh_kv_transfers_total", outcome="ok") == len(questions)
        service.assert_quiet()


@pytest.mark.e2e
@pytest.mark.timeout(240)
def test_processes_with_unequal_number_formats_answer_rightly(tmp_path: Path) -> None:
    with processes(tmp_path) as service:
        decode = service.start_worker("decode", "decode-0", *DECODE, "--dtype", "bfloat16")
        service.start_worker("prefill", "prefill-0", *PREFILL)
        service.wait_ready()
        for number in range(3):
            assert ask(service, question(number), "one") == ("Mirel's door code is 70815.", "prefill-0")
        assert decode.metric("kvmesh_recomputed_tokens_total") == 0
        assert decode.metric("kvmesh_kv_transfer_bytes_total", transport="shm") > 0
        service.assert_quiet()
