"""API keys: where they are asked for, in which headers they are found, and that nobody hears of them."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from mesh import terminal
from mesh.apikeys import read_keys
from mesh.errors import StartupError
from mesh.settings import ProxySettings
from mesh.sse import ApiError
from tests.proxy.api_client import CHAT, Api, error_of
from tests.proxy.http_server import Server

KEYS = "# ours\nsecret-one\n\n  secret-two  \n"
BODY = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5}


@pytest.fixture
def api(tmp_path: Path) -> Api:
    file = tmp_path / "keys"
    file.write_text(KEYS)
    return Api(settings=ProxySettings(api_key_file=str(file)))


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer secret-one"},
        {"authorization": "bearer  secret-two"},
        {"x-api-key": "secret-two"},
        {"api-key": "secret-one"},
    ],
)
def test_any_of_the_keys_in_any_of_the_headers_is_enough(api: Api, headers: dict[str, str]) -> None:
    assert api.http.post(CHAT, json=BODY, headers=headers).status_code == 200
    assert api.http.get("/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer "},
        {"authorization": "Bearer secret"},
        {"authorization": "Bearer # ours"},
        {"authorization": "Basic secret-one"},
        {"authorization": "secret-one"},
        {"x-api-key": "secret-one "[:-2]},
        {b"x-api-key": b"\xff\xfe"},
        {"authorization": "Bearer wrong", "x-api-key": "secret-one"},
    ],
)
def test_without_one_everything_but_the_probes_is_closed(api: Api, headers: dict[str, str]) -> None:
    for method, path in (
        ("POST", CHAT),
        ("POST", "/v1/responses"),
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("GET", "/nothing"),
    ):
        answer = api.http.request(method, path, json=BODY, headers=headers)
        assert answer.status_code == 401, path
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.headers["x-request-id"]
        assert error_of(answer.json())["code"] == "invalid_api_key"
    assert not api.dispatcher.generations
    for path in ("/health", "/ready"):
        assert api.http.get(path, headers=headers).status_code == 200


def test_anthropics_clients_hear_of_it_in_their_own_form(api: Api) -> None:
    answer = api.http.post("/v1/messages", json=BODY)
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")
    assert api.http.post("/v1/messages", json=BODY, headers={"x-api-key": "secret-one"}).status_code == 200


def test_without_a_file_no_key_is_asked_for() -> None:
    assert Api().http.post(CHAT, json=BODY, headers={"authorization": "Bearer any"}).status_code == 200


@pytest.mark.parametrize("content", [None, b"", b"\n# one\n", b"\xff\xfe"])
def test_a_file_without_a_key_ends_the_start(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(StartupError, match="--api-key-file"):
        read_keys(str(file))


def test_a_key_is_in_no_log_and_no_error(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    answer = api.http.post(CHAT, json=BODY, headers={"authorization": "Bearer secret-guess"})
    api.http.post(CHAT, json=BODY, headers={"authorization": "Bearer secret-one"})
    assert "secret" not in answer.text + caplog.text


def test_our_own_client_sends_the_files_first_key(api: Api, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Server(api) as server:
        url = f"http://127.0.0.1:{server.port}"
        terminal.chat(["hi", "--url", url, "--api-key-file", str(tmp_path / "keys")])
        assert capsys.readouterr().out == "hello world\n"
        with pytest.raises(ApiError, match="key"):
            terminal.chat(["hi", "--url", url])
