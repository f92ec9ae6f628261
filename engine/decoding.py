"""Decoding ahead: the next step is under way before this one's tokens are read.

    device   |  step N          |  step N+1        |  step N+2
    host     read N-1, update, schedule, begin N+1 │ read N, update, schedule, begin N+2 │ ...

A step's tokens are the next one's input without passing through the host, so `run` begins the next step for all rows
that look as if they went on, and only then waits for those of this one. The caller knows nothing of it: it schedules
what it wants, and what was begun for a row is used where the row is scheduled again, or dropped. Dropping costs nothing
but the computing: the step wrote one position of pages that were the request's own when it began, and whoever gets them
next writes after it, because the device does one thing after another.

Rows whose sampling needs the host (grammars, penalties, log-probabilities ...) are not computed ahead, nor is any row
beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.decode_step import NOBODY, DecodeStep
from engine.places import Places
from engine.request import EngineRequest
from engine.sampler import draws, needs_host, sample
from engine.step import Row, Sampled
from kernels.sampling import Draw
from kernels.upload import upload


@dataclass(slots=True)
class _Share:
    """One request's part in a step."""

    request: EngineRequest
    position: int
    token: int = 0
    source: int = NOBODY
    """Its place in the step before, whose token it continues; then `token` is not known yet."""


@dataclass(slots=True)
class _Begun:
    """A step under way."""

    shares: Mapping[str, tuple[int, _Share, int]]
    """By request key: its place, its share, and its preemptions by then."""
    tokens: Tensor
    """`[places]` int64, on the device."""
    read: Callable[[], list[int]]
    """Waits for the tokens."""

    def place(self, row: Row) -> int:
        """Where `row` is computed, or `NOBODY`."""
        found = self.shares.get(row.request.key)
        if found is None:
            return NOBODY
        place, share, num_preemptions = found
        request = row.request
        same = share.request is request and num_preemptions == request.num_preemptions
        return place if same and share.position == request.num_computed_tokens else NOBODY


class Decoding:
    """The rows of one token of consecutive steps. Used by one thread."""

    def __init__(self, step: DecodeStep, block_tokens: int, draw: Draw) -> None:
        self.num_ahead = 0
        """Tokens that were computed ahead and used, since the start."""
        self._step = step
        self._block_tokens = block_tokens
        self._draw = draw
        self._places = Places()
        self._begun: _Begun | None = None

    def run(self, rows: Sequence[Row], compute: Callable[[Sequence[Row]], list[Sampled]]) -> list[Sampled]:
        """One result per row; `compute` gives those of rows that are no decoding."""
        decoding = [row.num_tokens == 1 and row.samples for row in rows]
        if all(decoding):
            return self._decode(rows, {})
        others = [row for row, decodes in zip(rows, decoding, strict=True) if not decodes]
        computed = compute(others)
        joining = {row.request: one.token for row, one in zip(others, computed, strict=True)}
        decoded = iter(self._decode([row for row, decodes in zip(rows, decoding, strict=True) if decodes], joining))
        rest = iter(computed)
        return [next(decoded if decodes else rest) for decodes in decoding]

    def _decode(self, rows: Sequence[Row], joining: Mapping[EngineRequest, int | None]) -> list[Sampled]:
        """`joining`: the tokens of requests that are decoded from the next step on."""
        begun, self._begun = self._begun, None
        places = [NOBODY if begun is None else begun.place(row) for row in rows]
        ahead = [(row.request, place) for row, place in zip(rows, places, strict=True) if place != NOBODY]
        late = [row.request for row, place in zip(rows, places, strict=True) if place == NOBODY]
        results = self._compute(late, [request for request, _ in ahead]) if late else {}

        shares = [_Share(request, request.num_tokens, source=place) for request, place in ahead]
        known = {**{request: result.token for request, result in results.items()}, **joining}
        shares += [_Share(r, r.num_tokens, token) for r, token in known.items() if token is not None]
        shares = [share for share in shares if self._goes_on(share)]
        if shares and not any(needs_host(share.request) for share in shares):
            self._begun = self._begin(shares, (), None if begun is None else begun.tokens)

        if begun is not None and ahead:
            tokens = begun.read()
            self.num_ahead += len(ahead)
            results.update({request: Sampled(tokens[place]) for request, place in ahead})
        return [results[row.request] for row in rows]

    def _goes_on(self, share: _Share) -> bool:
        """Unless its next token stops it; and there is a page for it already."""
        request, position = share.request, share.position
        if request.num_new_tokens + 1 == request.stop_after:
            return False
        if position + 1 - request.num_prompt_tokens >= request.params.max_tokens:
            return False
        return position < min(len(request.block_table), self._step.max_blocks) * self._block_tokens

    def _compute(
        self, requests: Sequence[EngineRequest], kept: Sequence[EngineRequest]
    ) -> dict[EngineRequest, Sampled]:
        """A step for these alone, waited for; those `kept` keep their places."""
        shares = [_Share(request, request.num_computed_tokens, request.tokens[-1]) for request in requests]
        if not any(needs_host(request) for request in requests):
            begun = self._begin(shares, kept, None)
            tokens = begun.read()
            return {request: Sampled(tokens[begun.shares[request.key][0]]) for request in requests}
        places, logits = self._launch(shares, kept, None)
        rows = upload(np.array([places[request.key] for request in requests], np.int64), logits.device)
        return dict(zip(requests, sample(logits[rows], requests, self._draw), strict=True))

    def _begin(self, shares: Sequence[_Share], kept: Sequence[EngineRequest], drawn: Tensor | None) -> _Begun:
        places, logits = self._launch(shares, kept, drawn)
        static = self._step.static
        how = draws([share.request for share in shares], [share.position + 1 for share in shares])
        packed = static.pack_draws(how, logits.shape[1])
        numbers = np.zeros((len(logits), packed.shape[1]))
        numbers[[places[share.request.key] for share in shares]] = packed
        tokens = static.draw(logits, upload(numbers, logits.device))
        return _Begun(
            {s.request.key: (places[s.request.key], s, s.request.num_preemptions) for s in shares},
            tokens,
            _read_later(tokens),
        )

    def _launch(
        self, shares: Sequence[_Share], kept: Sequence[EngineRequest], drawn: Tensor | None
    ) -> tuple[dict[str, int], Tensor]:
        """Where each share is computed, and the logits of all places."""
        places = self._places.arrange([*kept, *(share.request for share in shares)])
        index = [places[share.request.key] for share in shares]
        untold = self._places.untold_pages(
            [(place, share.position // self._block_tokens + 1) for place, share in zip(index, shares, strict=True)]
        )
        if untold[0]:
            self._step.tell_pages(*untold)
        inputs = np.zeros((3, len(self._places)), np.int64)
        inputs[0] = inputs[2] = NOBODY
        inputs[0, index] = [share.position for share in shares]
        inputs[1, index] = [share.token for share in shares]
        inputs[2, index] = [share.source for share in shares]
        return places, self._step.run(inputs, drawn)


def _read_later(tokens: Tensor) -> Callable[[], list[int]]:
    """Begins to copy `tokens` to the host; what is returned waits for them."""
    if tokens.device.type == "cpu":
        return tokens.tolist
    there = torch.empty(len(tokens), dtype=tokens.dtype, pin_memory=True)
    there.copy_(tokens, non_blocking=True)
    copied = torch.cuda.current_stream().record_event()

    def read() -> list[int]:
        copied.synchronize()
        found: list[int] = there.tolist()
        return found

    return read
