"""A conversation's history is spread over two workers, and one of them dies while it is fetched from both."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from openai.types import Completion

from engine.sim_engine import PRINTABLE, expected_tokens
from tests.byte_model import byte_model
from tests.chaos.sim_service import FLAGS, busy, expected
from tests.e2e.processes import Deployment, deployment, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

BLOCK = 16
SHARED = 40 * BLOCK
"""Tokens of the prompt that both workers have the blocks of."""
OWN = 30 * BLOCK
"""What follows it in the conversation, which one worker has alone, with the answer."""
ANSWER = 200


def complete(service: Deployment, prompt: list[int], tokens: int) -> Completion:
    return service.client.completions.create(
        model=service.model_name, prompt=prompt, max_tokens=tokens, extra_body={"ignore_eos": True}
    )


def fetched(service: Deployment, worker: str) -> float:
    """Prompt tokens whose blocks came from other workers."""
    return service.workers[worker].metric("vllm:prompt_tokens_by_source_total", source="external_kv_transfer")


def test_a_holder_that_is_killed_in_the_middle_of_a_fetch_changes_no_token(tmp_path: Path) -> None:
    """The second turn's prefill worker asks one worker for what both have and the other for the rest. The first stands
    still, so the fetch is in its middle for as long as it lives; then the other brings that too."""
    with (
        deployment(
            tmp_path,
            byte_model(),
            prefill=0,
            decode=2,
            flags=(*FLAGS, "--max-num-seqs", "1"),
            proxy_flags=("--disaggregate-above", "32"),
        ) as service,
        ThreadPoolExecutor() as clients,
    ):
        opening = [65 + i % 26 for i in range(SHARED + OWN)]
        first = service.stream(opening, ANSWER, extra_body={"ignore_eos": True})
        answer = next(first)
        full = busy(service, "decode")  # its only sequence is taken, so the next request goes to the other worker
        (other,) = service.workers.keys() - {full}
        aside = [*opening[:SHARED], 97, 98, 99]
        assert complete(service, aside, 2).choices[0].text == expected(aside, 2)
        wait_until(lambda: fetched(service, other) == SHARED, lambda: f"blocks at {other}: {fetched(service, other)}")
        answer += "".join(first)
        assert answer == expected(opening, ANSWER)

        service.start_worker("prefill", "prefill-0")
        service.wait_ready()
        history = opening + expected_tokens(opening, ANSWER, PRINTABLE.stop, first_token=PRINTABLE.start)
        second = history + [48 + i % 10 for i in range(100)]
        bystander = service.workers[other].process
        bystander.send_signal(signal.SIGSTOP)
        told = clients.submit(complete, service, second, 20)
        prefill = service.workers["prefill-0"]
        wait_until(
            lambda: sum(prefill.metric("kvmesh_kv_transfer_bytes_total", transport=t) for t in ("shm", "zmq")) > 0,
            "what one brings",
        )
        assert prefill.metric("kvmesh_kv_open", what="fetching") >= 1, "the other one is waited for"
        assert not told.done()
        service.kill(other)
        result = told.result(60)

        assert result.choices[0].text == expected(second, 20)
        assert result.usage is not None
        assert result.usage.prompt_tokens_details is not None
        reusable = (len(history) - 1) // BLOCK * BLOCK
        assert result.usage.prompt_tokens_details.cached_tokens == reusable
        assert fetched(service, "prefill-0") == reusable
        service.assert_quiet()
