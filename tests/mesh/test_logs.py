"""Log lines: their two forms, and what never stands in them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from mesh import logs


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _restored_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:], root.level = handlers, level
    logging.captureWarnings(False)


def test_a_pipe_gets_one_json_object_per_record() -> None:
    out = io.StringIO()
    logs.setup("info", "decode-0", out)
    logging.getLogger("worker").info("step %d", 7, extra={"fields": {"request_id": "r1"}})
    logging.getLogger("worker").debug("not asked for")
    (line,) = out.getvalue().splitlines()
    entry = json.loads(line)
    assert entry["ts"] > 0
    assert {k: v for k, v in entry.items() if k != "ts"} == {
        "level": "info",
        "logger": "worker",
        "msg": "step 7",
        "worker": "decode-0",
        "request_id": "r1",
    }


def test_a_terminal_gets_a_line_for_people() -> None:
    out = Terminal()
    logs.setup("info", "decode-0", out)
    logging.getLogger("worker").warning("slow")
    assert "decode-0" in out.getvalue()
    assert "WARNING" in out.getvalue()
    assert "slow" in out.getvalue()
    assert "\x1b[" in out.getvalue()


def test_an_exception_stays_in_its_record() -> None:
    out = io.StringIO()
    logs.setup("info", "w", out)
    try:
        raise ValueError("redis://u:hunter22@h/0")
    except ValueError:
        logging.getLogger().exception("failed")
    (line,) = out.getvalue().splitlines()
    assert "ValueError" in json.loads(line)["exc"]
    assert "hunter22" not in line


@pytest.mark.parametrize(
    "secret",
    [
        "redis://user:hunter22@host:6379/0",
        "redis://:hunter22@host",
        "Authorization: Bearer hunter22",
        "api_key=hunter22",
        '{"password": "hunter22"}',
        "KVMESH_SECRET=hunter22",
        "sk-hunter22hunter22",
    ],
)
def test_secrets_are_never_logged(secret: str) -> None:
    out = io.StringIO()
    logs.setup("info", "w", out)
    logging.getLogger().info("with %s in it", secret, extra={"fields": {"detail": secret}})
    assert "hunter22" not in out.getvalue()
    assert "***" in out.getvalue()


@pytest.mark.parametrize(
    "text", ["12 tokens: 7 cached", "max_tokens=4096", "redis://host:6379/0", "token=15043 at 7", "ipc:///tmp/a:b"]
)
def test_harmless_text_is_kept(text: str) -> None:
    assert logs.redact(text) == text


def test_a_json_line_of_a_child_is_read_back() -> None:
    assert logs.parse_line('{"msg": "hello", "ts": 1}') == {"msg": "hello", "ts": 1}
    for other in ("hello", "{", '{"a": 1}', '{"msg": 1}', "[]", "{" * 99999):
        assert logs.parse_line(other) is None
