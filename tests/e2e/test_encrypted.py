"""A mesh of real processes over tcp with keys, and what a process says that lacks them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mesh.errors import EXIT_USAGE
from mesh.keys import create
from tests.byte_model import byte_model
from tests.chaos.sim_service import FLAGS, expected
from tests.e2e.processes import ROOT, deployment

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]

PROMPT = [3 + i % 90 for i in range(400)]
TOKENS = 24


def test_blocks_travel_encrypted_and_the_tokens_are_the_same(tmp_path: Path) -> None:
    create(tmp_path / "keys")
    with deployment(
        tmp_path,
        byte_model(),
        prefill=1,
        decode=1,
        flags=(*FLAGS, "--transport", "zmq"),
        proxy_flags=("--disaggregate-above", "32"),
        keys=tmp_path / "keys",
    ) as running:
        text = "".join(running.stream(PROMPT, TOKENS, extra_body={"ignore_eos": True}))
        assert text == expected(PROMPT, TOKENS)
        running.assert_quiet()
        decode = running.workers["decode-0"]
        assert decode.metric("kvmesh_kv_transfer_bytes_total", transport="zmq") > 0
        for worker in running.workers.values():
            for reason in ("forged", "replayed", "hello", "unknown_key", "client_key"):
                assert worker.metric("kvmesh_kv_unsealed_total", reason=reason) == 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--proxy", "tcp://10.1.2.3:7400"], "--proxy tcp://10.1.2.3:7400: without --keys"),
        (["--keys", "/nowhere"], "--keys: cannot read /nowhere/worker.secret"),
    ],
)
def test_a_worker_that_would_talk_in_plain_text_does_not_start(flags: list[str], said: str) -> None:
    command = [sys.executable, "-m", "decode", str(byte_model()), *FLAGS, *flags]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ended.returncode == EXIT_USAGE
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr
