"""Tenants: their keys, the models that are theirs, what is left of their limits; none sees anything of another."""

from __future__ import annotations

import asyncio
from pathlib import Path
from time import monotonic
from typing import Any

import anthropic
import httpx2
import openai
import pytest

from mesh.errors import EXIT_USAGE, RequestError, StartupError
from mesh.settings import ProxySettings
from proxy.api import submit
from proxy.api.tenants import read_tenants
from tests.proxy.api_client import CHAT, MODEL, Api, Call, error_of, reply
from tests.proxy.http_server import Server

FILE = """
[search]
keys = ["search-key", "search-second"]

[chat]
keys = ["chat-key"]
models = ["tiny-chat"]
requests_per_minute = 3
tokens_per_minute = 100000

[batch]
keys = ["batch-key"]
concurrent_requests = 1
"""
ALIASES = ("tiny-chat",)
BODY = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


def api_of(folder: Path, text: str = FILE, **more: Any) -> Api:
    file = folder / "tenants.toml"
    file.write_text(text)
    return Api(settings=ProxySettings(tenants=str(file)), aliases=ALIASES, **more)


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def chat(api: Api, key: str, model: str = MODEL) -> Any:
    return api.http.post(CHAT, json={"model": model, **BODY}, headers=bearer(key))


def test_any_key_of_a_tenant_is_good_and_no_other(tmp_path: Path) -> None:
    api = api_of(tmp_path)
    assert [chat(api, key).status_code for key in ("search-key", "search-second", "nobody")] == [200, 200, 401]


def test_a_model_that_is_not_the_tenants_is_403(tmp_path: Path) -> None:
    api = api_of(tmp_path)
    refused = chat(api, "chat-key")
    error = error_of(refused.json())
    assert (refused.status_code, error["type"], error["code"], error["param"]) == (
        403,
        "permission_error",
        "model_not_allowed",
        "model",
    )
    assert not api.dispatcher.generations
    assert chat(api, "chat-key", "tiny-chat").status_code == 200
    assert chat(api, "chat-key", "none").status_code == 404, "no name is told from another that is not served"
    assert chat(api, "search-key", "tiny-chat").status_code == 200
    unnamed = api.http.post("/tokenize", json={"prompt": "a"}, headers=bearer("chat-key"))
    assert unnamed.status_code == 403, "the model that is meant when none is named is not its either"


def test_the_list_of_models_is_the_tenants(tmp_path: Path) -> None:
    api = api_of(tmp_path)

    def listed(key: str) -> list[str]:
        return [card["id"] for card in api.http.get("/v1/models", headers=bearer(key)).json()["data"]]

    assert listed("search-key") == [MODEL, "tiny-chat"]
    assert listed("chat-key") == ["tiny-chat"]
    one = api.http.get(f"/v1/models/{MODEL}", headers=bearer("chat-key"))
    assert (one.status_code, error_of(one.json())["code"]) == (403, "model_not_allowed")


def test_over_the_limit_is_429_with_the_time_to_wait(tmp_path: Path) -> None:
    api = api_of(tmp_path)
    answers = [chat(api, "chat-key", "tiny-chat") for _ in range(3)]
    assert [a.headers["x-ratelimit-remaining-requests"] for a in answers] == ["2", "1", "0"]
    assert int(answers[0].headers["x-ratelimit-remaining-tokens"]) < 100_000
    refused = chat(api, "chat-key", "tiny-chat")
    error = error_of(refused.json())
    assert (refused.status_code, error["type"], error["code"]) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert "3 requests per minute" in error["message"]
    assert 1 <= int(refused.headers["retry-after"]) <= 20
    assert 0 < int(refused.headers["retry-after-ms"]) <= 20_000
    assert refused.headers["x-ratelimit-limit-requests"] == "3"
    assert len(api.dispatcher.generations) == 3
    assert chat(api, "search-key").status_code == 200, "others go on"
    assert "x-ratelimit-limit-requests" not in chat(api, "search-key").headers
    metrics = api.http.get("/metrics", headers=bearer("search-key")).text
    assert 'reason="quota"} 1.0' in metrics


def test_what_an_answer_cost_is_taken_when_it_is_over(tmp_path: Path) -> None:
    api = api_of(tmp_path, '[a]\nkeys = ["k"]\ntokens_per_minute = 60')
    first = chat(api, "k")
    used = first.json()["usage"]
    left = chat(api, "k")
    assert int(left.headers["x-ratelimit-remaining-tokens"]) == 60 - used["total_tokens"] - used["prompt_tokens"]
    metrics = api.http.get("/metrics", headers=bearer("k")).text
    assert f'kind="completion",model_name="{MODEL}",tenant="a"}} {2.0 * used["completion_tokens"]}' in metrics


def test_a_place_is_free_again_when_its_answer_ends(tmp_path: Path) -> None:
    asyncio.run(_one_at_a_time(tmp_path))


async def _one_at_a_time(folder: Path) -> None:
    pause = asyncio.Event()
    api = api_of(folder, script=reply("hello", pauses={2: pause}))
    client = openai.AsyncOpenAI(
        api_key="batch-key",
        base_url="http://test/v1",
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=httpx2.ASGITransport(api.app)),
    )

    async def ask(text: str) -> str | None:
        answer = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": text}])
        return answer.choices[0].message.content

    first = asyncio.create_task(ask("one"))
    while not api.dispatcher.generations:
        await asyncio.sleep(0)
    with pytest.raises(openai.RateLimitError, match="1 requests at once"):
        await ask("two")
    pause.set()
    assert await first == "hello"
    assert await ask("three") == "hello"


def test_a_place_is_free_again_when_its_client_leaves(tmp_path: Path) -> None:
    asyncio.run(_left(tmp_path))


async def _left(folder: Path) -> None:
    api = api_of(folder, script=reply("hello", pauses={2: asyncio.Event()}))
    call = Call(api.app, CHAT, {**BODY, "stream": True}, **bearer("batch-key"))
    await call.next_write()
    call.disconnect()
    await call.task
    api.dispatcher.script = reply("hello")
    second = Call(api.app, CHAT, BODY, **bearer("batch-key"))
    await second.task
    assert second.status == 200


def test_a_request_that_no_worker_takes_gives_its_place_back(tmp_path: Path) -> None:
    api = api_of(tmp_path)
    api.dispatcher.refusals = [RequestError(503, "Not now.", code="overloaded", retry_after=1)] * 2
    assert [chat(api, "batch-key").status_code for _ in range(3)] == [503, 503, 200]


def test_blocks_are_shared_within_a_tenant_only(tmp_path: Path) -> None:
    api = api_of(tmp_path)
    salts = []
    for key, salt in (("search-key", None), ("search-second", None), ("batch-key", None), ("batch-key", "search")):
        body = {"model": MODEL, **BODY, **({} if salt is None else {"cache_salt": salt})}
        assert api.http.post(CHAT, json=body, headers=bearer(key)).status_code == 200
        salts.append(api.sent.cache_salt)
    assert salts[0] == salts[1]
    assert len(set(salts)) == 3


def test_a_stored_response_is_its_tenants_alone(tmp_path: Path) -> None:
    api = api_of(tmp_path)
    body = {"model": MODEL, "input": "hi"}
    made = api.http.post("/v1/responses", json=body, headers=bearer("search-key")).json()
    path = f"/v1/responses/{made['id']}"
    assert api.http.get(path, headers=bearer("search-second")).status_code == 200
    for method, at in (("GET", path), ("GET", f"{path}/input_items"), ("DELETE", path), ("POST", f"{path}/cancel")):
        assert api.http.request(method, at, headers=bearer("batch-key")).status_code == 404
    next_body = {**body, "previous_response_id": made["id"]}
    assert api.http.post("/v1/responses", json=next_body, headers=bearer("batch-key")).status_code == 404
    assert api.http.post("/v1/responses", json=next_body, headers=bearer("search-key")).status_code == 200


def test_one_in_the_background_is_its_tenants_too(tmp_path: Path) -> None:
    with Server(api_of(tmp_path)) as server:
        ours = _openai(server, "search-key").responses
        made = ours.create(model=MODEL, input="hi", background=True)
        with pytest.raises(openai.NotFoundError):
            _openai(server, "batch-key").responses.retrieve(made.id)
        while (now := ours.retrieve(made.id)).status in ("queued", "in_progress"):
            pass
        assert now.status == "completed"


def test_the_clients_raise_their_own_classes(tmp_path: Path) -> None:
    with Server(api_of(tmp_path)) as server:
        client = _openai(server, "chat-key")
        with pytest.raises(openai.PermissionDeniedError, match="may not use"):
            client.models.retrieve(MODEL)
        for _ in range(3):
            client.completions.create(model="tiny-chat", prompt="a")
        with pytest.raises(openai.RateLimitError, match="per minute"):
            client.completions.create(model="tiny-chat", prompt="a")
        claude = anthropic.Anthropic(base_url=f"http://127.0.0.1:{server.port}", api_key="chat-key", max_retries=0)
        with pytest.raises(anthropic.RateLimitError) as limited:
            claude.messages.create(model="tiny-chat", max_tokens=3, messages=[{"role": "user", "content": "a"}])
        assert isinstance(limited.value.body, dict)
        assert limited.value.body["error"]["type"] == "rate_limit_error"
        with pytest.raises(anthropic.PermissionDeniedError):
            claude.messages.create(model=MODEL, max_tokens=3, messages=[{"role": "user", "content": "a"}])


def test_a_client_that_waits_as_told_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit's clock stands still until one is refused, and is then on by more than the client was told to wait."""
    api = api_of(tmp_path, '[a]\nkeys = ["k"]\nrequests_per_minute = 60')
    began, asked = monotonic(), 0

    def clock() -> float:
        nonlocal asked
        asked += 1
        return began + 1.5 * (asked > 61)

    monkeypatch.setattr(submit, "monotonic", clock)
    with Server(api) as server:
        client = _openai(server, "k", retries=1)
        for _ in range(61):
            assert client.completions.create(model=MODEL, prompt="a", max_tokens=1).choices
    assert asked == 62
    assert len(api.dispatcher.generations) == 61


def _openai(server: Server, key: str, retries: int = 0) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key=key, max_retries=retries, timeout=10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "there is no tenant in it"),
        ("[a]", "a.keys: Field required"),
        ("[a]\nkeys = []", "a.keys"),
        ('[a]\nkeys = [""]', "a.keys.0"),
        ("[a]\nkeys = [1]", "a.keys.0"),
        ('[a]\nkeys = ["hush"]\nkey = "x"', "a.key: Extra"),
        ('[a]\nkeys = ["hush"]\nmodels = ["huge"]', "a: the model 'huge' is not served"),
        ('[a]\nkeys = ["hush"]\nrequests_per_minute = 0', "a.requests_per_minute"),
        ('[a]\nkeys = ["hush"]\n[b]\nkeys = ["hush"]', "b and a have the same key"),
        ('["a/b"]\nkeys = ["hush"]', "a/b"),
        ('[a]\nkeys = ["hush', "Unterminated string"),
        ("keys = 3", "keys"),
    ],
)
def test_a_file_that_is_wrong_ends_the_start_and_tells_no_key(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "tenants.toml"
    file.write_text(text)
    with pytest.raises(StartupError) as failure:
        read_tenants(str(file), [MODEL])
    assert str(failure.value).startswith(f"--tenants {file}: ")
    assert message in str(failure.value)
    assert "hush" not in str(failure.value)
    assert failure.value.exit_code == EXIT_USAGE


def test_a_file_that_is_not_there_or_no_text_ends_the_start(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="No such file"):
        read_tenants(str(tmp_path / "none"), [MODEL])
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(StartupError, match="no text"):
        read_tenants(str(tmp_path / "bytes"), [MODEL])


def test_keys_come_from_one_file(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("k")
    (tmp_path / "tenants").write_text(FILE)
    with pytest.raises(StartupError, match="exclude each other"):
        Api(settings=ProxySettings(api_key_file=str(tmp_path / "keys"), tenants=str(tmp_path / "tenants")))
