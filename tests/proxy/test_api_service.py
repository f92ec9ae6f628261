"""Models, health, version, the API's own description and metrics."""

from __future__ import annotations

import re

import pytest

from mesh import __version__
from proxy.api.door import Door
from proxy.metrics import ProxyMetrics
from tests.proxy.api_client import CHAT, COMPLETIONS, Api, error_of, reply

OPENMETRICS = {"accept": "application/openmetrics-text;version=1.0.0"}


def metric(api: Api, line: str) -> float:
    found = re.search(rf"^{re.escape(line)} (\S+)$", api.http.get("/metrics").text, re.MULTILINE)
    assert found is not None, line
    return float(found.group(1))


def test_the_model_list_has_the_served_model() -> None:
    listing = Api().http.get("/v1/models").json()
    assert listing["object"] == "list"
    [card] = listing["data"]
    assert (card["id"], card["object"], card["owned_by"], card["max_model_len"]) == ("tiny", "model", "kvmesh", 256)
    assert {"created", "root", "parent", "permission"} < card.keys()


def test_an_answer_says_which_system_made_it() -> None:
    api = Api()
    name = f"kvmesh-{__version__}-00000000"
    assert api.chat()["system_fingerprint"] == api.complete()["system_fingerprint"] == name
    assert {event["system_fingerprint"] for event in api.chat_stream()} == {name}


def test_one_model() -> None:
    api = Api()
    assert api.http.get("/v1/models/tiny").json()["id"] == "tiny"
    missing = api.http.get("/v1/models/org/other")
    assert (missing.status_code, error_of(missing.json())["code"]) == (404, "model_not_found")


def test_an_alias_is_listed_and_the_answer_has_the_name_asked_for() -> None:
    api = Api(aliases=["gpt-4o"])
    cards = api.http.get("/v1/models").json()["data"]
    assert [(c["id"], c["root"]) for c in cards] == [("tiny", "tiny"), ("gpt-4o", "tiny")]
    assert api.http.get("/v1/models/gpt-4o").json()["id"] == "gpt-4o"
    assert (api.chat(model="gpt-4o")["model"], api.complete(model="tiny")["model"]) == ("gpt-4o", "tiny")
    assert {event["model"] for event in api.chat_stream(model="gpt-4o")} == {"gpt-4o"}


def test_the_model_is_listed_before_a_worker_came() -> None:
    api = Api()
    api.dispatcher.facts = None
    assert api.http.get("/v1/models").json()["data"][0]["max_model_len"] is None


def test_ready_follows_workers_and_health_does_not() -> None:
    api = Api()
    assert (api.http.get("/health").status_code, api.http.get("/ready").status_code) == (200, 200)
    api.dispatcher.facts = None
    assert (api.http.get("/health").status_code, api.http.get("/ready").status_code) == (200, 503)


def test_a_draining_server_is_not_ready() -> None:
    door = Door(8)
    api = Api(door=door)
    door.draining = True
    assert api.http.get("/ready").status_code == 503


def test_version() -> None:
    assert Api().http.get("/version").json() == {"version": __version__}


def test_every_answer_has_a_request_id() -> None:
    api = Api()
    for path in ("/health", "/metrics", "/nope", "/v1/models"):
        assert api.http.get(path).headers["x-request-id"].startswith("req-")


def test_the_description_has_the_bodies_without_references() -> None:
    description = Api().http.get("/openapi.json").json()
    for path, field in ((CHAT, "messages"), (COMPLETIONS, "prompt")):
        body = description["paths"][path]["post"]["requestBody"]
        schema = body["content"]["application/json"]["schema"]
        assert field in schema["required"]
        assert schema["properties"]["temperature"]["anyOf"][0]["maximum"] == 2
        assert "$ref" not in str(schema)


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_no_page_loads_scripts_from_elsewhere(path: str) -> None:
    assert Api().http.get(path).status_code == 404


def test_requests_are_measured_when_they_end() -> None:
    api = Api("abc")
    api.chat()
    api.chat_stream(n=2)
    api.chat(max_tokens=2)
    label = '{model_name="tiny"}'
    assert metric(api, f"vllm:time_to_first_token_seconds_count{label}") == 3
    assert metric(api, f"vllm:e2e_request_latency_seconds_count{label}") == 3
    assert metric(api, f"vllm:inter_token_latency_seconds_count{label}") == 3 + 2 * 3 + 1
    assert metric(api, f"vllm:request_generation_tokens_sum{label}") == 4 + 8 + 2
    assert metric(api, f"vllm:request_prompt_tokens_sum{label}") == 3 * len(api.sent.tokens)
    assert metric(api, f"vllm:request_queue_time_seconds_count{label}") == 3
    assert metric(api, 'vllm:request_success_total{finished_reason="stop",model_name="tiny"}') == 3
    assert metric(api, 'vllm:request_success_total{finished_reason="length",model_name="tiny"}') == 1
    assert metric(api, f'http_requests_total{{handler="{CHAT}",method="POST",status="2xx"}}') == 3


def test_a_failure_is_measured() -> None:
    api = Api(reply("abc", fail_at=1))
    api.chat_error(500)
    assert metric(api, 'vllm:request_success_total{finished_reason="error",model_name="tiny"}') == 1
    assert metric(api, f'http_requests_total{{handler="{CHAT}",method="POST",status="5xx"}}') == 1


def test_counters_exist_before_their_first_event() -> None:
    api = Api()
    assert metric(api, 'vllm:request_success_total{finished_reason="abort",model_name="tiny"}') == 0
    assert metric(api, 'vllm:admission_rejections_total{model_name="tiny",reason="draining"}') == 0


def test_nothing_a_client_writes_becomes_a_label() -> None:
    api = Api()
    for i in range(20):
        api.http.get(f"/secret-{i}")
        api.http.get(f"/v1/models/secret-{i}")
        api.http.request(f"SECRET{i}", "/health", headers={"x-request-id": f"secret-{i}"})
    text = api.http.get("/metrics").text
    assert "secret" not in text.lower()
    assert 'handler="none"' in text


def test_openmetrics_keeps_the_colon() -> None:
    answer = Api().http.get("/metrics", headers=OPENMETRICS)
    assert "application/openmetrics-text" in answer.headers["content-type"]
    assert "\nvllm:time_to_first_token_seconds_count" in answer.text
    assert "vllm_" not in answer.text
    assert answer.text.endswith("# EOF\n")


def test_text_of_others_is_added() -> None:
    api = Api(metrics_text=lambda: b"other_total 1.0\n")
    answer = api.http.get("/metrics", headers=OPENMETRICS)
    assert answer.headers["content-type"].startswith("text/plain")
    assert answer.text.endswith("\nother_total 1.0\n")


def test_two_proxies_do_not_share_metrics() -> None:
    first, second = ProxyMetrics("tiny"), ProxyMetrics("tiny")
    first.count_rejection("draining")
    assert b'reason="draining"} 1.0' in first.render("")[0]
    assert b'reason="draining"} 1.0' not in second.render("")[0]
