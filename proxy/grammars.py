"""Grammars of clients, tried in a process of their own (`proxy.grammarcheck`) before a worker sees them."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
import weakref
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor

from mesh.errors import GrammarError, RequestError
from mesh.grammar import MAX_GRAMMAR_BYTES, Vocabulary
from mesh.tokenizer import Tokenizer
from proxy.grammarcheck import Verdict, read_frame, write_frame

MAX_WAITING = 32
"""One grammar takes 5 ms, a hostile one half a second: those behind so many would wait too long."""
MAX_KNOWN = 512
"""Verdicts kept, of at most 64 KiB each: clients repeat their schemas."""


class GrammarCheck:
    """Asks the process, which starts with the first grammar and again after it died. Called in the event loop, which
    never waits: a thread talks to the process."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: OrderedDict[tuple[str, bool], Verdict] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._waiting = 0
        self._process: subprocess.Popen[bytes] | None = None

    async def check(self, grammar: str, *, converts: bool = False) -> str:
        """`grammar` as it may travel to the workers; with `converts` it may be EBNF. Raises `GrammarError`, and
        `RequestError` 503 while too many wait."""
        if len(grammar.encode()) > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"it is larger than {MAX_GRAMMAR_BYTES} bytes")
        key = (grammar, converts)
        verdict = self._known.get(key)
        if verdict is None:
            verdict = await self._tried(key)
            self._known[key] = verdict
            if len(self._known) > MAX_KNOWN:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        accepted, text = verdict
        if not accepted:
            raise GrammarError(text)
        return text

    async def _tried(self, key: tuple[str, bool]) -> Verdict:
        if self._waiting >= MAX_WAITING:
            raise RequestError(
                503,
                "Too many new schemas are being compiled. Please try again shortly.",
                type="server_error",
                code="overloaded",
                retry_after=1,
            )
        self._waiting += 1
        try:
            return await asyncio.wrap_future(self._thread.submit(self._ask, key))
        finally:
            self._waiting -= 1

    def _ask(self, key: tuple[str, bool]) -> Verdict:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        write_frame(process.stdin, key)
        accepted, text = read_frame(process.stdout)
        return accepted, text

    def _start(self) -> subprocess.Popen[bytes]:
        vocabulary = Vocabulary.of(self._tokenizer)
        if not vocabulary.eos:
            raise GrammarError("this model has no end-of-sequence token, so no grammar could end")
        process = subprocess.Popen(
            [sys.executable, "-m", "proxy.grammarcheck"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a terminal's Ctrl-C is not for it; it ends when its standard input does
        )
        weakref.finalize(self, _end, process)
        assert process.stdin is not None
        write_frame(process.stdin, (vocabulary.tokens, vocabulary.special, vocabulary.eos))
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.wait()
