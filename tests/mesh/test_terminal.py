"""`kvmesh chat` and `kvmesh complete` against a server that says what the test wants."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

from mesh import sse, startup, terminal
from mesh.terminal import Answer, printable


@dataclass
class Script:
    """What the server answers to the next POST, and what it was asked."""

    url: str = ""
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)


def event(data: dict[str, Any] | str) -> bytes:
    return b"data: " + (data if isinstance(data, str) else json.dumps(data)).encode() + b"\n\n"


def piece(text: str, finish: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish}], "usage": None}


USAGE = {
    "choices": [],
    "usage": {"prompt_tokens": 35, "completion_tokens": 3, "prompt_tokens_details": {"cached_tokens": 16}},
    "kvmesh": {"prefill": "prefill-0", "decode": "decode-1", "attempts": 2, "cached_tokens": 16},
}
HELLO = b": keep-alive\n\n" + b"".join(
    event(e) for e in (piece(""), piece("Hel"), piece("lo\x1b[2J", "stop"), USAGE, "[DONE]")
)


@pytest.fixture
def script() -> Iterator[Script]:
    found = Script(body=HELLO)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(200, b'{"object": "list", "data": [{"id": "tiny"}]}', {})

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            found.asked.append((self.path, dict(self.headers), json.loads(body)))
            self._send(found.status, found.body, found.headers)

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    found.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def go(command: Callable[[list[str]], int], *argv: str) -> tuple[int, str, str]:
        code = startup.run("kvmesh", lambda: command(list(argv)))
        out, err = capsys.readouterr()
        return code, out, err

    return go


def test_chat_prints_the_answer_and_what_it_took(script: Script, run: Run) -> None:
    code, out, err = run(terminal.chat, "--url", script.url, "--system", "be brief", "Hello", "there")
    assert code == 0
    assert out == "Hello\x1b[2J\n"
    assert "3 tokens · prompt 35, 16 cached · prefill-0 → decode-1 · 2 attempts" in err
    assert "first token" in err
    path, headers, body = script.asked[0]
    assert path == "/v1/chat/completions"
    assert headers["x-kvmesh-route"] == "1"
    assert body["messages"] == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "Hello there"},
    ]
    assert body["model"] == "tiny"
    assert body["stream"] is True
    assert body["stream_options"] == {"include_usage": True}


def test_complete_sends_its_prompt_and_limits(script: Script, run: Run) -> None:
    done = {"choices": [{"index": 0, "text": " a time", "finish_reason": "length"}]}
    script.body = event(done) + event("[DONE]")
    code, out, err = run(terminal.complete, "--url", script.url + "/v1", "--max-tokens", "5", "--quiet", "Once upon")
    assert (code, out, err) == (0, " a time\n", "")
    path, _, body = script.asked[0]
    assert path == "/v1/completions"
    assert (body["prompt"], body["max_tokens"], body["temperature"]) == ("Once upon", 5, 0.0)


def test_a_message_may_come_from_a_pipe(script: Script, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert run(terminal.chat, "--url", script.url)[0] == 0
    assert script.asked[0][2]["messages"][-1]["content"] == "from a pipe"


@pytest.mark.parametrize(
    ("status", "body", "headers", "text"),
    [
        (404, b'{"error": {"message": "no model\\nof that name"}}', {}, "kvmesh: no model of that name\n"),
        (503, b'{"error": {"message": "no workers"}}', {"Retry-After": "2"}, "no workers (try again in 2 s)"),
        (500, b"<html>", {}, "the server answered 500 Internal Server Error"),
        (200, event(piece("a")) + event({"error": {"message": "worker lost"}}), {}, "kvmesh: worker lost\n"),
        (200, event(piece("a")), {}, "the server ended its answer early"),
        (200, event(piece("a")) + event("[DONE]"), {}, "without a finish reason"),
        (200, event("{"), {}, "not what a kvmesh proxy sends"),
        (200, event("[]"), {}, "an event that is no object"),
        (200, event(piece("a")), {"Content-Length": "9999"}, "the server ended its answer early"),
    ],
)
def test_a_failed_answer_is_one_line_and_exit_code_1(
    script: Script, run: Run, status: int, body: bytes, headers: dict[str, str], text: str
) -> None:
    script.status, script.body, script.headers = status, body, headers
    code, _, err = run(terminal.chat, "--url", script.url, "hi")
    assert code == 1
    assert text in err
    assert len(err.splitlines()) == 1


def test_a_conversation_remembers(script: Script, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["first", "", "second"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    class Keyboard(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr("sys.stdin", Keyboard())
    assert run(terminal.chat, "--url", script.url)[0] == 0
    roles = [m["role"] for m in script.asked[1][2]["messages"]]
    assert roles == ["user", "assistant", "user"]


def test_the_times_of_an_answer() -> None:
    now = iter([10.0, 10.5, 11.5])
    answer = Answer(clock=lambda: next(now))
    events = [piece("a"), piece("b", "stop"), {"choices": [], "usage": {"completion_tokens": 5}}]
    assert list(answer.read(events)) == ["a", "b"]
    assert answer.summary() == "first token 500 ms · 4.0 tokens/s · 5 tokens"


def test_a_model_cannot_drive_the_terminal() -> None:
    assert printable("a\x1b[2J\x07\x9b\tb\né") == "a�[2J��\tb\né"


def test_events_of_several_data_lines_are_joined() -> None:
    lines = [b'data: {"a":\r\n', b"data: 1}\r\n", b"\r\n", b"data: [DONE]\n", b"\n"]
    assert list(sse.events(lines)) == [{"a": 1}]
