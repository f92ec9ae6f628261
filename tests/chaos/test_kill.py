"""Processes die under running requests; the answers stay what they would have been.

The workers run the simulated engine: its next token is a hash of every KV value it read, so a stale, mixed or missing
block would be a wrong token with certainty, and its steps are slow enough to be hit in the middle.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mesh.keys import create
from tests.byte_model import byte_model
from tests.chaos.sim_service import FLAGS, busy, expected
from tests.e2e.processes import Deployment, deployment, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

CHUNK = 64


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Deployment]:
    with deployment(
        tmp_path, byte_model(), prefill=2, decode=2, flags=FLAGS, proxy_flags=("--disaggregate-above", "32")
    ) as running:
        yield running


class Request(threading.Thread):
    """One streamed completion on a thread of its own."""

    def __init__(self, service: Deployment, prompt: list[int], tokens: int, **more: object) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.error: Exception | None = None
        self._service, self._prompt, self._tokens = service, prompt, tokens
        self._more = {"ignore_eos": True, **more}
        self.start()

    def run(self) -> None:
        try:
            for text in self._service.stream(self._prompt, self._tokens, extra_body=self._more):
                self.texts.append(text)
        except Exception as error:
            self.error = error

    def result(self) -> str:
        self.join(60)
        assert not self.is_alive(), "the stream hangs"
        assert self.error is None, self.error
        return "".join(self.texts)


def test_killing_the_prefill_worker_in_its_prefill_changes_no_token(service: Deployment) -> None:
    prompt = [65 + i % 26 for i in range(56 * CHUNK)]
    request = Request(service, prompt, 20)
    service.kill(busy(service, "prefill"))
    assert not request.texts, "too late: the prefill was over"
    assert request.result() == expected(prompt, 20)
    service.assert_quiet()


def test_killing_the_prefill_worker_during_the_transfer_changes_no_token(service: Deployment) -> None:
    prompt = [66 + i % 26 for i in range(56 * CHUNK)]
    request = Request(service, prompt, 20)
    victim = busy(service, "prefill")
    wait_until(lambda: service.workers[victim].metric("kvmesh_kv_sent_bytes_total") > 0, "blocks on their way")
    service.kill(victim)
    assert not request.texts, "too late: the prefill was over"
    assert request.result() == expected(prompt, 20)
    service.assert_quiet()


def test_killing_the_decode_worker_mid_stream_changes_no_token(service: Deployment) -> None:
    prompt = [67 + i % 26 for i in range(5 * CHUNK)]
    request = Request(service, prompt, 120)
    wait_until(lambda: len(request.texts) > 10, "the stream runs")
    service.kill(busy(service, "decode"))
    assert request.result() == expected(prompt, 120)
    service.assert_quiet()


def test_killing_the_decode_worker_mid_stream_changes_nothing_of_structured_output(service: Deployment) -> None:
    prompt = [71 + i % 26 for i in range(5 * CHUNK)]
    wanted = {"structured_outputs": {"regex": "([a-z]{2,9} [0-9]{3}, ){12}end"}}
    undisturbed = Request(service, prompt, 400, **wanted).result()
    assert re.fullmatch(wanted["structured_outputs"]["regex"], undisturbed)
    request = Request(service, prompt, 400, **wanted)
    wait_until(lambda: len(request.texts) > 10, "the stream runs")
    service.kill(busy(service, "decode"))
    assert request.result() == undisturbed
    service.assert_quiet()


def test_a_stream_outlives_the_only_decode_worker_when_one_comes_back(tmp_path: Path) -> None:
    with deployment(tmp_path, byte_model(), prefill=1, decode=1, flags=FLAGS) as service:
        prompt = [68 + i % 26 for i in range(3 * CHUNK)]
        request = Request(service, prompt, 100)
        wait_until(lambda: len(request.texts) > 10, "the stream runs")
        service.kill("decode-0")
        service.start_worker("decode", "decode-0")
        assert request.result() == expected(prompt, 100)
        service.assert_quiet()


def test_killing_both_workers_of_an_encrypted_transfer_changes_no_token(tmp_path: Path) -> None:
    create(tmp_path / "keys")
    flags = (*FLAGS, "--transport", "zmq")
    with deployment(
        tmp_path,
        byte_model(),
        prefill=2,
        decode=2,
        flags=flags,
        proxy_flags=("--disaggregate-above", "32"),
        keys=tmp_path / "keys",
    ) as service:
        prompt = [72 + i % 26 for i in range(56 * CHUNK)]
        request = Request(service, prompt, 120)
        victim = busy(service, "prefill")
        wait_until(lambda: service.workers[victim].metric("kvmesh_kv_sent_bytes_total") > 0, "blocks on their way")
        service.kill(victim)
        assert not request.texts, "too late: the prefill was over"
        wait_until(lambda: len(request.texts) > 10, "the stream runs", timeout=60)
        service.kill(busy(service, "decode"))
        assert request.result() == expected(prompt, 120)
        service.assert_quiet()


def test_most_of_the_blocks_are_sent_before_the_prefill_ends(service: Deployment) -> None:
    prompt = [69 + i % 26 for i in range(16 * CHUNK)]
    assert Request(service, prompt, 4).result() == expected(prompt, 4)
    service.assert_quiet()
    workers = [w for w in service.workers.values() if w.role == "decode"]
    overlapped = sum(w.metric("kvmesh_kv_transfer_overlap_bytes_total") for w in workers)
    received = sum(
        w.metric("kvmesh_kv_transfer_bytes_total", transport=t) for w in workers for t in ("shm", "zmq", "local")
    )
    assert overlapped >= 0.7 * received > 0


def test_a_decode_worker_that_stands_still_is_replaced_and_its_late_tokens_are_ignored(service: Deployment) -> None:
    prompt = [70 + i % 26 for i in range(4 * CHUNK)]
    request = Request(service, prompt, 150)
    wait_until(lambda: len(request.texts) > 10, "the stream runs")
    zombie = service.workers[busy(service, "decode")].process
    zombie.send_signal(signal.SIGSTOP)
    try:
        seen = len(request.texts)
        wait_until(lambda: len(request.texts) > seen + 10, "the stream goes on elsewhere")
    finally:
        zombie.send_signal(signal.SIGCONT)
    assert request.result() == expected(prompt, 150)
    service.assert_quiet()
