"""`kvmesh chat` and `kvmesh complete`: stream an answer to the terminal and say what it took."""

from __future__ import annotations

import readline
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TextIO

from mesh import options, sse
from mesh.apikeys import read_keys
from mesh.errors import EXIT_USAGE, StartupError
from mesh.settings import ChatSettings, CompleteSettings
from mesh.startup import EXIT_INTERRUPTED

CONTROL_CHARACTERS = {code: "�" for code in (*range(0x20), 0x7F, *range(0x80, 0xA0)) if chr(code) not in "\n\t"}
"""A model's output must not move the cursor or name the window of a terminal."""
HISTORY_LINES = 1000


@dataclass(slots=True, eq=False)
class Answer:
    """One streamed answer and its times; `clock` in seconds."""

    clock: Callable[[], float] = time.monotonic
    text: list[str] = field(default_factory=list)
    asked: float = 0.0
    first: float | None = None
    last: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)
    route: dict[str, Any] = field(default_factory=dict)
    finish: str | None = None

    def __post_init__(self) -> None:
        self.asked = self.last = self.clock()

    def read(self, events: Iterable[dict[str, Any]]) -> Iterator[str]:
        """The pieces of text as they arrive; the numbers stand in the fields afterwards."""
        for event in events:
            self.usage = event.get("usage") or self.usage
            self.route = event.get("kvmesh") or self.route
            for choice in event.get("choices", ()):
                self.finish = choice.get("finish_reason") or self.finish
                piece = choice.get("text") or (choice.get("delta") or {}).get("content") or ""
                if piece:
                    self.last = self.clock()
                    self.first = self.last if self.first is None else self.first
                    self.text.append(piece)
                    yield piece
        if self.finish is None:
            raise sse.ApiError("the server ended its answer without a finish reason")

    def summary(self) -> str:
        """`first token 52 ms · 41.2 tokens/s · 120 tokens · prompt 35, 16 cached · prefill-0 → decode-0`."""
        tokens = int(self.usage.get("completion_tokens", 0))
        words = []
        if self.first is not None:
            words.append(f"first token {1000 * (self.first - self.asked):.0f} ms")
            if tokens > 1 and self.last > self.first:
                words.append(f"{(tokens - 1) / (self.last - self.first):.1f} tokens/s")
        words.append(f"{tokens} token{'s' * (tokens != 1)}")
        if "prompt_tokens" in self.usage:
            words.append(f"prompt {self.usage['prompt_tokens']}, {self._cached()} cached")
        if self.route.get("decode"):
            words.append(" → ".join(str(w) for w in (self.route.get("prefill"), self.route["decode"]) if w))
            if int(self.route.get("attempts", 1)) > 1:
                words.append(f"{self.route['attempts']} attempts")
        return " · ".join(words)

    def _cached(self) -> int:
        details = self.usage.get("prompt_tokens_details") or {}
        return int(self.route.get("cached_tokens", details.get("cached_tokens") or 0))


def chat(argv: Sequence[str]) -> int:
    """One answer, or a conversation when no message is given at a terminal. Raises `StartupError`."""
    settings = options.parse(
        ChatSettings, argv, prog="kvmesh chat", description="Talk to a running mesh; without MESSAGE, converse."
    )
    model = settings.model or first_model(settings.url, key_of(settings))
    messages = [{"role": "system", "content": settings.system}] if settings.system else []
    if not settings.message and sys.stdin.isatty():
        return converse(settings, model, messages)
    text = " ".join(settings.message) or sys.stdin.read()
    if not text.strip():
        raise StartupError('give a message: kvmesh chat "Hello"', EXIT_USAGE)
    say(settings, model, [*messages, {"role": "user", "content": text}], sys.stdout)
    return 0


def complete(argv: Sequence[str]) -> int:
    """One continuation. Raises `StartupError`."""
    settings = options.parse(
        CompleteSettings, argv, prog="kvmesh complete", description="Continue a text; without PROMPT, standard input."
    )
    prompt = " ".join(settings.prompt)
    if not prompt and not sys.stdin.isatty():
        prompt = sys.stdin.read()
    if not prompt:
        raise StartupError('give a text: kvmesh complete "Once upon a time"', EXIT_USAGE)
    body = {
        "model": settings.model or first_model(settings.url, key_of(settings)),
        "prompt": prompt,
        "max_tokens": settings.max_tokens,
        "temperature": settings.temperature,
    }
    show(settings, "/v1/completions", body, sys.stdout)
    return 0


def key_of(settings: ChatSettings | CompleteSettings) -> str:
    """The API key to send; empty for none."""
    return read_keys(settings.api_key_file)[0] if settings.api_key_file else ""


def first_model(url: str, key: str) -> str:
    """The model that the server lists first."""
    match sse.get(url, "/v1/models", key):
        case {"data": [{"id": str(name)}, *_]}:
            return name
        case _:
            raise sse.ApiError(f"the server at {url} lists no model")


def converse(settings: ChatSettings, model: str, messages: list[dict[str, str]]) -> int:
    """Until end of input; Ctrl-C ends the answer that runs, and at the prompt the conversation."""
    readline.set_history_length(HISTORY_LINES)
    print(f"{model} at {settings.url}; Ctrl-D ends")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            return EXIT_INTERRUPTED
        if not text:
            continue
        turn = [*messages, {"role": "user", "content": text}]
        try:
            messages[:] = [*turn, {"role": "assistant", "content": say(settings, model, turn, sys.stdout)}]
        except KeyboardInterrupt:
            print("\n(stopped)")
        except sse.ApiError as error:
            print(f"kvmesh: {error}", file=sys.stderr)


def say(settings: ChatSettings, model: str, messages: list[dict[str, str]], out: TextIO) -> str:
    """Streams the answer to `messages`; returns its text."""
    body: dict[str, Any] = {"model": model, "messages": messages, "max_tokens": settings.max_tokens}
    if settings.temperature >= 0:
        body["temperature"] = settings.temperature
    return show(settings, "/v1/chat/completions", body, out)


def show(settings: ChatSettings | CompleteSettings, path: str, body: dict[str, Any], out: TextIO) -> str:
    """Prints the streamed text to `out` and its summary to stderr; returns the text."""
    answer = Answer()
    request = {**body, "stream": True, "stream_options": {"include_usage": True}}
    with closing(sse.stream(settings.url, path, request, key_of(settings))) as events:
        try:
            for piece in answer.read(events):
                out.write(printable(piece) if out.isatty() else piece)
                out.flush()
        finally:
            out.write("\n")
            out.flush()
    if not settings.quiet:
        print(f"[{answer.summary()}]", file=sys.stderr, flush=True)
    return "".join(answer.text)


def printable(text: str) -> str:
    """`text` without what a terminal would obey."""
    return text.translate(CONTROL_CHARACTERS)
