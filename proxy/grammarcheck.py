"""The process that tries clients' grammars before any worker sees them: `python -m proxy.grammarcheck`.

A hostile grammar can take seconds, gigabytes, or the whole stack, with which its process dies. So each is tried in a
fork of this process, which the kernel ends at its limits; what dies there is refused. The stack is smaller than those
of the threads that compile and follow the grammar in a worker.

Standard input brings frames: first the vocabulary, then `(grammar, converts)` after `(grammar, converts)`. Each is
answered on standard output by `(accepted, text)`: the grammar as it may travel, or what is wrong with it.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import struct
import sys
import time
from random import Random
from typing import IO, Any

import msgpack
import numpy as np
from llguidance import LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark

from mesh.errors import GrammarError
from mesh.grammar import MAX_GRAMMAR_BYTES, Vocabulary, check_matcher, compile_grammar

CPU_S = 0.5
"""Ten times what the largest sensible schemas take; hostile ones would take minutes. Not wall time, which a busy
machine stretches."""
MEMORY_BYTES = 1 << 30
"""Beyond what the process has; a grammar at `mesh.grammar.LIMITS` takes less than a tenth."""
STACK_BYTES = 2 << 20
"""A worker's threads have four times that."""
TRIED_TOKENS = 48
"""An object with too many optional properties, or an ambiguous rule, shows after a few tokens."""
MASK_CPU_S = 0.03
"""For one of them: a worker computes a mask per token and row. Those of JSON take less than a fifth even at 128 k
tokens."""
TOO_COMPLEX = "it is too complex: it takes too much time, memory or recursion"
LENGTH = struct.Struct("<I")

Verdict = tuple[bool, str]


def read_frame(source: IO[bytes]) -> Any:
    """The next frame's value. Raises `EOFError`."""
    return msgpack.unpackb(_exactly(source, LENGTH.unpack(_exactly(source, LENGTH.size))[0]), use_list=False)


def _exactly(source: IO[bytes], size: int) -> bytes:
    data = source.read(size)
    if len(data) < size:
        raise EOFError
    return data


def write_frame(sink: IO[bytes], value: Any) -> None:
    body: bytes = msgpack.packb(value)
    sink.write(LENGTH.pack(len(body)) + body)
    sink.flush()


def main() -> None:
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    try:
        tokenizer = Vocabulary(*read_frame(source)).tokenizer()
        gc.freeze()  # so that forks share the pages
        while True:
            grammar, converts = read_frame(source)
            write_frame(sink, in_a_fork(tokenizer, grammar, converts=converts))
    except (EOFError, BrokenPipeError):
        return


def in_a_fork(tokenizer: LLTokenizer, grammar: str, *, converts: bool) -> Verdict:
    answer, tell = os.pipe()
    pid = os.fork()
    if not pid:
        status = 1
        try:
            os.close(answer)
            limit()
            with open(tell, "wb") as sink:
                write_frame(sink, verdict(tokenizer, grammar, converts=converts))
            status = 0
        finally:
            os._exit(status)
    os.close(tell)
    with open(answer, "rb") as source:
        try:
            accepted, text = read_frame(source)
        except EOFError:
            accepted, text = False, TOO_COMPLEX
    os.waitpid(pid, 0)
    return accepted, text


def limit() -> None:
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_STACK, (STACK_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())  # a crash's last words


def verdict(tokenizer: LLTokenizer, grammar: str, *, converts: bool) -> Verdict:
    """`converts`: the grammar may be EBNF as well, which becomes Lark."""
    try:
        text = converted(grammar) if converts else grammar
        if len(text.encode()) > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"it is larger than {MAX_GRAMMAR_BYTES} bytes")
        walk(tokenizer, text)
    except GrammarError as error:
        return False, str(error)
    return True, text


def converted(grammar: str) -> str:
    try:
        text: str = any_to_lark(grammar)
    except Exception as error:  # the library raises bare Exception
        raise GrammarError(f"it is neither Lark nor EBNF: {str(error)[:200]}") from None
    return text


def walk(tokenizer: LLTokenizer, grammar: str) -> None:
    """Compiles the grammar and follows it for some tokens. Raises `GrammarError`."""
    matcher = compile_grammar(tokenizer, grammar)
    random = Random(0)
    for _ in range(TRIED_TOKENS):
        began = time.process_time()
        mask = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        check_matcher(matcher)
        if time.process_time() - began > MASK_CPU_S:
            raise GrammarError(TOO_COMPLEX)
        allowed = np.flatnonzero(np.unpackbits(mask, bitorder="little"))
        if not len(allowed):
            raise GrammarError("no text of this model's tokens satisfies it")
        matcher.consume_token(int(random.choice(allowed)))
        check_matcher(matcher)
        if matcher.is_stopped():
            return


if __name__ == "__main__":
    main()
