"""The bundled model through the whole service: what it was told survives the way from one worker to another."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest

from deploy.demo_model.train.facts import filler
from deploy.demo_model.train.words import Split, Words
from mesh.modeldir import DEMO_MODEL
from tests.e2e.processes import Deployment, deployment, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

BLOCK = 16


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Every prompt is computed by the prefill worker and decoded by the other."""
    with deployment(
        tmp_path_factory.mktemp("demo"),
        DEMO_MODEL,
        prefill=1,
        decode=1,
        flags=("--max-num-batched-tokens", "256", "--kv-blocks", "1024"),
        proxy_flags=("--disaggregate-above", "0"),
    ) as running:
        yield running


def answer(service: Deployment, *messages: dict[str, str]) -> Any:
    """The completion; it must have gone through both workers."""
    raw = service.client.chat.completions.with_raw_response.create(
        model=service.model_name,
        messages=list(messages),  # type: ignore[arg-type]
        temperature=0,
        max_tokens=200,
    )
    assert (raw.headers["x-kvmesh-prefill"], raw.headers["x-kvmesh-decode"]) == ("prefill-0", "decode-0")
    completion = raw.parse()
    assert completion.choices[0].finish_reason == "stop"
    return completion


def said(completion: Any) -> str:
    text: str = completion.choices[0].message.content
    return text


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_fact_anywhere_in_a_long_prompt_crosses_the_hand_off(service: Deployment, depth: float) -> None:
    words = Words(random.Random(1), Split.HELD_OUT)
    sentences = [filler(words) for _ in range(50)]
    sentences.insert(int(depth * len(sentences)), "Mirel's door code is 70815.")

    completion = answer(service, user(" ".join(sentences) + " What is Mirel's door code?"))

    assert said(completion) == "Mirel's door code is 70815."
    assert completion.usage.prompt_tokens > 700


def test_a_second_turn_finds_the_first_ones_blocks(service: Deployment) -> None:
    words = Words(random.Random(2), Split.HELD_OUT)
    first = user("Please remember this. The code for the lamp is 70815. " + " ".join(filler(words) for _ in range(20)))
    told = answer(service, first)
    question = user("What is the code for the lamp?")

    def cached() -> bool:
        again = answer(service, first, assistant(said(told)), question)
        assert said(again) == "The code for the lamp is 70815."
        found: int = again.usage.prompt_tokens_details.cached_tokens
        return found >= told.usage.prompt_tokens // BLOCK * BLOCK

    wait_until(cached, "the first turn's blocks are reused")


def test_json_has_the_asked_keys_and_values(service: Deployment) -> None:
    completion = answer(
        service,
        user("The owner is Mirel. The size is 42. The colour is red. Answer in JSON with the keys size and owner."),
    )

    assert json.loads(said(completion)) == {"size": 42, "owner": "Mirel"}


def test_text_is_copied_exactly(service: Deployment) -> None:
    text = "K7-QX2 plomber Tarven 4821, quindle dra-7"

    assert said(answer(service, user(f"Repeat: {text}"))) == text


def test_it_says_what_kvmesh_is(service: Deployment) -> None:
    assert "separate prefill and decode workers" in said(answer(service, user("What is kvmesh?")))
