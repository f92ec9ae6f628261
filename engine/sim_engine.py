"""A runner without a model: it satisfies the engine's interface, and wrong content gives wrong tokens.

A position's KV is 8 bytes: a hash chain over the tokens up to it, continued from the previous position as read through
the request's block table. The next token is a hash over everything that is read back from all pages of the request, so
a stale, mixed, swapped or overwritten block changes it. A step takes the time that a cost model says.

With `M = 2^64`, `A` odd, `g` = splitmix64 and `v[-1] = seed`:

    v[p] = A * v[p-1] + g(token[p])            mod M     the content of position p
    d[n] = sum of (v[p] * B^p for p < n)       mod M     B odd: one changed position always changes the sum
    token[n] = first_token + g(d[n]) mod (vocab - first_token)

Where a request has a grammar, the next token is the `g(d[n])`-th, modulo their number, of those that may follow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from engine.request import EngineRequest
from engine.step import Row, Sampled
from mesh.errors import GrammarError
from mesh.layout import KvLayout
from mesh.messages import TokenLogprob
from mesh.pieces import Piece
from mesh.settings import WorkerSettings

Words = npt.NDArray[np.uint64]

MASK = (1 << 64) - 1
CHAIN = 0x9E3779B97F4A7C15 | 1
CHAIN_INVERSE = pow(CHAIN, -1, 1 << 64)
WEIGHT = 0xD1342543DE82EF95
PRINTABLE = range(32, 127)
DEFAULT_BLOCKS = 4096
DEFAULT_MODEL_LEN = 8192


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds of one step; the defaults cost nothing."""

    base_s: float = 0.0
    per_prefill_token_s: float = 0.0
    per_decode_token_s: float = 0.0

    def seconds(self, prefill_tokens: int, decode_tokens: int) -> float:
        return self.base_s + self.per_prefill_token_s * prefill_tokens + self.per_decode_token_s * decode_tokens


def splitmix64(x: int) -> int:
    """The finalizer of Steele, Lea and Flood's SplitMix (OOPSLA 2014), on one unsigned 64-bit number."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def expected_tokens(
    prompt: Sequence[int], num_tokens: int, vocab: int, *, first_token: int = 0, seed: int = 0
) -> list[int]:
    """The tokens that an undamaged simulated engine generates after `prompt`; a plain loop, no pages, no numpy."""
    value, digest, weight = seed, 0, 1
    output: list[int] = []
    pending = list(prompt)
    for _ in range(num_tokens):
        for token in pending:
            value = (CHAIN * value + splitmix64(token)) & MASK
            digest = (digest + value * weight) & MASK
            weight = (weight * WEIGHT) & MASK
        pending = [first_token + splitmix64(digest) % (vocab - first_token)]
        output += pending
    return output


class SimRunner:
    """See `engine.step.Runner`. Sampling params are ignored, except that grammars hold and log-probabilities have the
    asked-for shape (0.0 for the token itself)."""

    decodes_ahead: bool = False

    def __init__(
        self,
        num_blocks: int,
        block_tokens: int,
        vocab: int = 256,
        *,
        first_token: int = 0,
        seed: int = 0,
        cost: CostModel | None = None,
        sleep: Callable[[float], None] = time.sleep,
        max_model_len: int = DEFAULT_MODEL_LEN,
    ) -> None:
        self.layout = KvLayout(layers=1, kv_heads=1, head_dim=4, block_tokens=block_tokens, dtype="uint8")
        self.num_blocks = num_blocks
        self.max_model_len = max_model_len
        self.digest = blake2b(f"sim {vocab} {first_token} {seed}".encode(), digest_size=16).digest()
        """Of the "model": equal on two runners exactly when they generate the same tokens."""
        self._vocab = vocab
        self._first_token = first_token
        self._seed = seed
        self._cost = cost or CostModel()
        self._sleep = sleep
        self._pool: Words = np.zeros((num_blocks, block_tokens), np.uint64)
        self._powers = _Powers()

    @classmethod
    def from_settings(cls, settings: WorkerSettings) -> SimRunner:
        """A worker's runner; its output is printable ASCII, which any byte tokenizer shows."""
        return cls(
            settings.kv_blocks or DEFAULT_BLOCKS,
            settings.block_tokens,
            vocab=PRINTABLE.stop,
            first_token=PRINTABLE.start,
            cost=CostModel(settings.sim_step_s, settings.sim_prefill_token_s),
            max_model_len=settings.max_model_len or DEFAULT_MODEL_LEN,
        )

    def run(self, rows: Sequence[Row]) -> list[Sampled]:
        """Writes the rows' content into their pages, reads whole histories back, takes the cost model's time."""
        decode = 0
        for row in rows:
            if row.num_tokens == 1:
                decode += 1
                self._write_single(row.request)
            else:
                self._write_chunk(row)
        results = [self._result(row, self._read(row.request) if row.samples else None) for row in rows]
        seconds = self._cost.seconds(sum(row.num_tokens for row in rows) - decode, decode)
        if seconds > 0:
            self._sleep(seconds)
        return results

    def read_block(self, block: int, valid_tokens: int) -> bytes:
        """A copy of the page, `block_bytes` long, zero from position `valid_tokens` on."""
        page = self._pool[block].copy()
        page[valid_tokens:] = 0
        return bytes(page.tobytes())

    def write_block(self, block: int, payload: bytes | memoryview) -> None:
        """Overwrites the page; raises `ValueError` for a payload of another size than `block_bytes`."""
        self._pool[block] = np.frombuffer(payload, np.uint64).reshape(self.layout.block_tokens)

    def write_parts(self, payload: bytes | memoryview, theirs: KvLayout, parts: Sequence[tuple[int, Piece]]) -> None:
        """Writes parts of one block of another simulated worker, whose blocks may have another size."""
        words = np.frombuffer(payload, np.uint64).reshape(theirs.block_tokens)
        for block, piece in parts:
            self._pool[block, piece.target[1]] = words[piece.source[1]]

    def _write_single(self, request: EngineRequest) -> None:
        position, table, size = request.num_computed_tokens, request.block_table, self.layout.block_tokens
        last = position - 1
        before = int(self._pool[table[last // size], last % size]) if position else self._seed
        value = (CHAIN * before + splitmix64(request.tokens[position])) & MASK
        self._pool[table[position // size], position % size] = value

    def _write_chunk(self, row: Row) -> None:
        request, size = row.request, self.layout.block_tokens
        start, count = request.num_computed_tokens, row.num_tokens
        position = np.arange(start, start + count)
        table = np.array(request.block_table, np.int64)
        before = self._pool[table[(start - 1) // size], (start - 1) % size] if start else np.uint64(self._seed)
        tokens = np.array(request.tokens[start : start + count], np.uint64)
        # v[k] = A^(k+1) * (v[-1] + sum of A^-(j+1) * g(token[j]) for j <= k): the recurrence as one running sum
        inner = np.cumsum(_mix(tokens) * self._powers.inverse(count), dtype=np.uint64) + before
        self._pool[table[position // size], position % size] = inner * self._powers.chain(count)

    def _read(self, request: EngineRequest) -> int:
        """`d[n]`, over all pages."""
        length = len(request.tokens)
        values = self._pool[request.block_table].reshape(-1)[:length]
        return int(values @ self._powers.weight(length))

    def _result(self, row: Row, digest: int | None) -> Sampled:
        request = row.request
        prompt = self._prompt_logprobs(row) if request.wants_prompt_logprobs else ()
        if digest is None:
            return Sampled(None, prompt_logprobs=prompt)
        number = splitmix64(digest)
        token = self._first_token + number % (self._vocab - self._first_token)
        try:
            flags = request.allowed()
        except GrammarError as error:
            return Sampled(None, failure=str(error))
        if flags is not None:
            allowed = np.flatnonzero(flags)
            token = int(allowed[number % len(allowed)])
        top = request.params.logprobs
        return Sampled(token, None if top is None else self._logprob(token, top), prompt)

    def _prompt_logprobs(self, row: Row) -> tuple[TokenLogprob, ...]:
        request, start = row.request, row.request.num_computed_tokens + 1
        stop = min(start + row.num_tokens, request.num_prompt_tokens)
        top = request.params.prompt_logprobs or 0
        return tuple([self._logprob(token, top) for token in request.tokens[start:stop]])

    def _logprob(self, token: int, top: int) -> TokenLogprob:
        others = tuple((token + i) % self._vocab for i in range(min(top, self._vocab)))
        return TokenLogprob(token, 0.0, others, tuple(-20.0 * (i > 0) for i in range(len(others))))


class _Powers:
    """Tables of powers modulo 2^64, made once and grown as longer prompts come."""

    def __init__(self) -> None:
        self._tables: dict[int, Words] = {}

    def chain(self, count: int) -> Words:
        """`A^1 .. A^count`."""
        return self._of(CHAIN, count + 1)[1:]

    def inverse(self, count: int) -> Words:
        """`A^-1 .. A^-count`."""
        return self._of(CHAIN_INVERSE, count + 1)[1:]

    def weight(self, count: int) -> Words:
        """`B^0 .. B^(count-1)`."""
        return self._of(WEIGHT, count)

    def _of(self, base: int, count: int) -> Words:
        table = self._tables.get(base)
        if table is None or len(table) < count:
            factors = np.full(max(count, 1024, 2 * len(table) if table is not None else 0), base, np.uint64)
            factors[0] = 1
            table = self._tables[base] = np.cumprod(factors, dtype=np.uint64)
        return table[:count]


def _mix(x: Words) -> Words:
    """`splitmix64` of every element."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
