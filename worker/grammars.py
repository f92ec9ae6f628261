"""Compiled grammars for the requests of one worker, made on a thread of their own: a step takes milliseconds, a large
grammar half a second."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from llguidance import LLTokenizer

from engine.grammar import Matcher
from mesh.errors import GrammarError
from mesh.grammar import Vocabulary, compile_grammar
from mesh.tokenizer import Tokenizer

MAX_CACHED = 64
"""A compiled schema of ten fields takes 0.1 MB, one of 1,500 seven."""


class Grammars:
    """The last grammars compiled; a request gets a copy (4 µs)."""

    def __init__(self, load: Callable[[], Tokenizer]) -> None:
        """Begins to prepare the vocabulary of `load()` at once, beside the weights."""
        self._cached: OrderedDict[str, Matcher] = OrderedDict()
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._prepared = self._thread.submit(_prepare, load)

    def compile(self, grammar: str, done: Callable[[Matcher | GrammarError], object]) -> None:
        """Calls `done` from the thread, with a matcher of its own or with what is wrong."""
        self._thread.submit(lambda: done(self._compiled(grammar)))

    def close(self) -> None:
        """Waits for the grammar that is being compiled; those behind it are not."""
        self._thread.shutdown(cancel_futures=True)

    def _compiled(self, grammar: str) -> Matcher | GrammarError:
        known = self._cached.get(grammar)
        if known is None:
            try:
                tokenizer, eos = self._prepared.result()
                known = Matcher(compile_grammar(tokenizer, grammar), tokenizer.vocab_size, eos)
            except GrammarError as error:
                return error
            except BaseException as error:  # no tokenizer, a panic in Rust: the request must hear of it
                return GrammarError(f"this worker cannot follow grammars: {error}")
            self._cached[grammar] = known
            if len(self._cached) > MAX_CACHED:
                self._cached.popitem(last=False)
        self._cached.move_to_end(grammar)
        return known.copy()


def _prepare(load: Callable[[], Tokenizer]) -> tuple[LLTokenizer, frozenset[int]]:
    vocabulary = Vocabulary.of(load())
    return vocabulary.tokenizer(), frozenset(vocabulary.eos)
