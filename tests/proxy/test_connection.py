"""What comes over the socket: other protocols on offer, old versions, no HTTP at all, clients that stand still."""

from __future__ import annotations

import asyncio
import json
import re
import socket
from collections.abc import Iterator

import pytest

from proxy import connection
from proxy.connection import Outbox
from tests.e2e.processes import wait_until
from tests.proxy.api_client import MODEL, Api, error_of, events, reply
from tests.proxy.http_server import Server

OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
CLOSE = b"Connection: close\r\n"


@pytest.fixture
def api() -> Api:
    return Api("hello", max_model_len=8192)


@pytest.fixture
def server(api: Api) -> Iterator[Server]:
    with Server(api) as server:
        yield server


def head(more: bytes, length: int, version: bytes = b"1.1") -> bytes:
    lines = b"POST /v1/completions HTTP/%s\r\nHost: x\r\nContent-Type: application/json\r\n" % version
    return lines + b"Content-Length: %d\r\n" % length + more + b"\r\n"


def body(**fields: object) -> bytes:
    return json.dumps({"model": MODEL, "prompt": "hi", **fields}).encode()


def answers(client: socket.socket) -> bytes:
    """Everything until the server closes the connection."""
    received = b""
    while part := client.recv(65536):
        received += part
    return received


def statuses(received: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", received)]


@pytest.mark.parametrize("split", [0, 10])
def test_an_offer_to_upgrade_changes_nothing(server: Server, api: Api, split: int) -> None:
    """Java's clients offer HTTP/2 with every request over plain HTTP."""
    sent = body(prompt="offered")
    with server.connect() as client:
        client.sendall(head(OFFER, len(sent)) + sent[:split])
        client.sendall(sent[split:])
        client.sendall(head(CLOSE, len(sent)) + sent)
        received = answers(client)
    assert statuses(received) == [200, 200]
    assert received.count(b'"text":"hello"') == 2
    assert [g.request.tokens for g in api.dispatcher.generations] == [tuple(api.tokenizer.encode("offered"))] * 2


def test_an_offer_with_a_body_in_chunks(server: Server) -> None:
    sent = body()
    lines = head(OFFER + b"Transfer-Encoding: chunked\r\n", 0).replace(b"Content-Length: 0\r\n", b"")
    with server.connect() as client:
        client.sendall(lines + b"%x\r\n%s\r\n0\r\n\r\n" % (len(sent), sent))
        client.sendall(head(CLOSE, len(sent)) + sent)
        assert statuses(answers(client)) == [200, 200]


def test_an_offer_behind_an_unanswered_request_ends_the_connection_after_its_answer(server: Server) -> None:
    sent = body()
    with server.connect() as client:
        client.sendall(head(b"", len(sent)) + sent + head(OFFER, len(sent)) + sent)
        received = answers(client)
    assert statuses(received) == [200]
    assert received.endswith(b"}")


def test_http_1_0_gets_its_stream_without_chunks(server: Server) -> None:
    sent = body(stream=True)
    with server.connect() as client:
        client.sendall(head(b"", len(sent), b"1.0") + sent)
        lines, _, stream = answers(client).partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in lines.lower()
    assert "".join(c["text"] for e in events(stream) for c in e["choices"]) == "hello"


@pytest.mark.parametrize("junk", [b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9.9\r\n\r\n", head(CLOSE, -1)])
def test_what_is_no_http_gets_an_error_object(server: Server, junk: bytes) -> None:
    with server.connect() as client:
        client.sendall(junk + b"\r\n\r\n")
        received = answers(client)
    assert statuses(received) == [400]
    assert error_of(json.loads(received.partition(b"\r\n\r\n")[2]))["type"] == "invalid_request_error"


def test_a_head_without_end_is_refused(server: Server) -> None:
    with server.connect() as client:
        client.sendall(b"GET /health HTTP/1.1\r\nX: " + b"a" * connection.MAX_HEAD_BYTES)
        assert b"head is too large" in answers(client)


def test_a_refused_bodys_rest_is_not_taken_for_a_head(server: Server) -> None:
    rest = b"a" * (2 * connection.MAX_HEAD_BYTES)
    with server.connect() as client:
        client.sendall(head(b"", len(rest)).replace(b"completions", b"unknown"))
        client.recv(1)
        client.sendall(rest)
        client.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n")
        received = b"H" + answers(client)
    assert statuses(received) == [404, 200]


@pytest.mark.parametrize("begun", [b"", b"GET /health HT", head(OFFER, 0)[:-4]])
def test_a_connection_that_asks_for_nothing_is_closed(
    server: Server, begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_TIMEOUT_S", 0.05)
    with server.connect() as client:
        client.sendall(begun)
        assert answers(client) == b""


@pytest.mark.parametrize("offer", [b"", OFFER])
def test_a_client_that_reads_nothing_is_given_up(offer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "STALLED_S", 0.05)
    api = Api(reply("hello " * 300, pauses={500: asyncio.Event()}), max_model_len=8192)
    sent = body(stream=True, logprobs=5, n=8)
    with Server(api) as server, socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect(("127.0.0.1", server.port))
        client.sendall(head(offer, len(sent)) + sent)
        wait_until(lambda: bool(api.dispatcher.generations and api.dispatcher.generations[0].aborted), "the abort", 10)
        assert not answers(client).endswith(b"[DONE]\n\n")
    assert api.dispatcher.generations[0].aborted == ["client_disconnected"]


class Written(asyncio.Transport):
    def __init__(self, log: list[bytes], *, closing: bool = False) -> None:
        super().__init__()
        self._log = log
        self._closing = closing

    def is_closing(self) -> bool:
        return self._closing

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._log.append(bytes(data))


def test_a_turns_parts_are_written_in_order_before_a_task_that_they_are_followed_by() -> None:
    async def turn() -> list[bytes]:
        written: list[bytes] = []
        outbox, first, second = Outbox(), Written(written), Written(written)
        woken = asyncio.get_running_loop().create_future()

        async def last() -> None:
            await woken
            first.write(b"end")

        task = asyncio.create_task(last())
        await asyncio.sleep(0)
        outbox.put(first, b"1")
        outbox.put(second, b"2")
        outbox.put(Written(written, closing=True), b"to nobody")
        outbox.put(first, b"3")
        assert not written, "one write after the other, when all are there"
        woken.set_result(None)
        await task
        outbox.put(second, b"4")
        await asyncio.sleep(0)
        return written

    assert asyncio.run(turn()) == [b"1", b"2", b"3", b"end", b"4"]
