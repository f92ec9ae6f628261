"""A client on a thread of its own: streams one answer and holds every token against an undisturbed run's."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Generator
from contextlib import closing
from typing import Any

from openai import APIError, APIStatusError, OpenAI

from tests.faults.plan import OPENAI, Ask, answer

CLEAR = frozenset({"no_workers", "worker_lost"})
"""Errors that docs/api.md names for a fleet that lost its workers."""
SILENCE_S = 60.0
"""A stream that says nothing for so long hangs; the proxy ends a request by then."""
LEFT, DONE = "left", "done"

Frame = dict[str, Any]


class Violation(AssertionError):
    """What no client may see."""


class Client(threading.Thread):
    """After its end: `outcome`, or `violation`."""

    def __init__(self, ask: Ask, name: str, port: int, model: str, began: float) -> None:
        super().__init__(name=name, daemon=True)
        self.outcome = ""
        self.violation = ""
        self.seconds = 0.0
        self._ask = ask
        self._port = port
        self._body = {
            "model": model,
            "prompt": list(ask.prompt),
            "max_tokens": ask.max_tokens,
            "n": ask.n,
            "stream": True,
        }
        self._more: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
        if ask.stop is not None:
            self._more |= {"stop_token_ids": [ask.stop]}
        self._right, self._finish = answer(ask)
        self._got: list[list[int]] = [[] for _ in range(ask.n)]
        self._finished: set[int] = set()
        self._began = began

    def run(self) -> None:
        time.sleep(max(0.0, self._began + self._ask.at - time.monotonic()))
        asked = time.monotonic()
        try:
            self.outcome = self._stream()
        except Violation as violation:
            self.violation = f"{self.name} {violation}"
        except Exception as error:
            self.violation = f"{self.name} after {[len(got) for got in self._got]} tokens: {error!r}"
        self.seconds = time.monotonic() - asked

    def _stream(self) -> str:
        frames = self._openai() if self._ask.client == OPENAI else self._plain()
        with closing(frames):
            for frame in frames:
                if "error" in frame:
                    return self._failed(frame["error"].get("code"))
                for choice in frame["choices"]:
                    self._take(choice["index"], choice.get("token_ids") or [], choice.get("finish_reason"))
                if self._ask.leaves_after is not None and len(self._got[0]) >= self._ask.leaves_after:
                    return LEFT
        if len(self._finished) != self._ask.n:
            raise Violation(f"ended without a finish, after {[len(got) for got in self._got]} tokens")
        return DONE

    def _take(self, choice: int, tokens: list[int], finish: str | None) -> None:
        got = self._got[choice]
        if choice in self._finished:
            raise Violation(f"gets more after its finish: {tokens}, {finish}")
        right = self._right[len(got) : len(got) + len(tokens)]
        if tokens != right:
            raise Violation(f"gets {tokens} as tokens {len(got)} of choice {choice}, not {right}")
        got += tokens
        if finish is None:
            return
        self._finished.add(choice)
        if got != self._right or finish != self._finish:
            raise Violation(f"ends by {finish} after {len(got)} tokens, not by {self._finish} after {len(self._right)}")

    def _failed(self, code: Any) -> str:
        if code not in CLEAR:
            raise Violation(f"fails by {code} after {[len(got) for got in self._got]} tokens")
        return str(code)

    def _plain(self) -> Generator[Frame, None, None]:
        """The frames as they are sent, or an error's body."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=SILENCE_S)
        with closing(connection):
            body = json.dumps(self._body | self._more).encode()
            connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status != 200:
                yield json.loads(response.read())
                return
            for line in iter(response.readline, b""):
                if line.startswith(b"data: [DONE]"):
                    return
                if line.startswith(b"data: "):
                    yield json.loads(line.removeprefix(b"data: "))
        raise Violation("ended without [DONE]")

    def _openai(self) -> Generator[Frame, None, None]:
        with OpenAI(
            base_url=f"http://127.0.0.1:{self._port}/v1", api_key="unused", max_retries=0, timeout=SILENCE_S
        ) as client:
            try:
                with client.completions.create(**self._body, extra_body=self._more) as stream:  # type: ignore[call-overload]
                    for event in stream:
                        yield event.model_dump()
            except APIStatusError as error:
                yield {"error": error.body}
            except APIError as error:
                yield {"error": {"code": error.code}}
