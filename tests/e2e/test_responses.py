"""Responses over real processes: what they said outlives the proxy, and a shutdown waits for what runs detached."""

from __future__ import annotations

from pathlib import Path

import pytest
from openai import NotFoundError

from tests.byte_model import byte_model
from tests.chaos.sim_service import FLAGS
from tests.e2e.processes import deployment, wait_until
from tests.proxy.redis_server import RedisServer

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(240)]


def test_responses_outlive_their_proxy(tmp_path: Path) -> None:
    redis = RedisServer(tmp_path)
    redis.start()
    try:
        with deployment(tmp_path, byte_model(), prefill=1, decode=1, flags=FLAGS, store=redis.url) as service:
            ask, model = service.client.responses, service.model_name
            first = ask.create(model=model, input="one", max_output_tokens=8)
            assert first.status == "incomplete"
            running = ask.create(
                model=model, input="two", previous_response_id=first.id, background=True, max_output_tokens=60
            )
            stopped = ask.create(model=model, input="three", background=True, max_output_tokens=2000)
            assert ask.cancel(stopped.id).status == "cancelled"
            assert service.proxy is not None
            wait_until(lambda: ask.retrieve(running.id).status == "in_progress", "the run begins")
            service.proxy.terminate()
            assert service.proxy.wait(60) == 0
            service.start_proxy()
            service.wait_ready()
            done = ask.retrieve(running.id)
            assert done.usage is not None
            assert (done.status, done.usage.output_tokens) == ("incomplete", 60)
            assert done.output_text
            last = ask.create(model=model, input="four", previous_response_id=done.id, max_output_tokens=8)
            assert [item.type for item in ask.input_items.list(last.id)] == ["message"] * 5
            ask.delete(first.id)
            with pytest.raises(NotFoundError):
                ask.retrieve(first.id)
            service.assert_quiet()
    finally:
        redis.kill()
