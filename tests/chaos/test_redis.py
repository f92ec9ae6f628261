"""Redis holds hints: it is killed, empty when it comes back, and no request notices."""

from __future__ import annotations

import subprocess
import threading
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import ConnectionError as RedisConnectionError

from tests.byte_model import byte_model
from tests.chaos.sim_service import FLAGS, expected
from tests.e2e.processes import Deployment, deployment, free_port, wait_until

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def start_redis(port: int) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
    )

    def answers() -> bool:
        with Redis(port=port) as client:
            try:
                return bool(client.ping())
            except RedisConnectionError:
                return False

    wait_until(answers, "redis answers")
    return process


def keep_asking(service: Deployment, number: int, stop: threading.Event, errors: list[str], done: list[int]) -> None:
    """Asks the same question until told to stop; every answer must be right."""
    prompt = [65 + (number * 7 + i) % 26 for i in range(100)]
    right = expected(prompt, 6)
    while not stop.is_set():
        try:
            text = "".join(service.stream(prompt, 6, extra_body={"ignore_eos": True}))
        except Exception as error:
            errors.append(repr(error))
            return
        if text != right:
            errors.append(f"{text!r} is not {right!r}")
        done.append(number)


def test_redis_may_die_and_return_under_load(tmp_path: Path) -> None:
    port = free_port()
    redis = start_redis(port)
    try:
        with deployment(
            tmp_path, byte_model(), prefill=1, decode=1, flags=FLAGS, store=f"redis://127.0.0.1:{port}/0"
        ) as service:
            stop, errors, done = threading.Event(), list[str](), list[int]()
            threads = [threading.Thread(target=keep_asking, args=(service, i, stop, errors, done)) for i in range(6)]
            for thread in threads:
                thread.start()
            wait_until(lambda: len(done) > 10 or bool(errors), "answers with Redis")
            redis.kill()
            redis.wait()
            before = len(done)
            wait_until(lambda: len(done) > before + 15 or bool(errors), "answers without Redis")
            redis = start_redis(port)
            before = len(done)
            wait_until(lambda: len(done) > before + 15 or bool(errors), "answers with an empty Redis")
            stop.set()
            for thread in threads:
                thread.join(60)
            assert errors == []
            service.assert_quiet()
            with Redis(port=port) as client:
                wait_until(lambda: client.dbsize() > 0, "residency is told again")
    finally:
        redis.kill()
        redis.wait()
