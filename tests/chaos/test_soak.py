"""Many random requests over small pools: shared prefixes, choices, clients that leave, a worker that leaves.

The engine is the simulated one, whose next token depends on every KV value it reads, so that equality with the oracle
proves that no block was ever stale, mixed, missing or overwritten.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from engine.sim_engine import CostModel, SimRunner, expected_tokens
from engine.step import Row, Sampled
from mesh.params import SamplingParams
from proxy.generation import GenerateRequest
from tests.e2e.fleet import TIMEOUT_S, Fleet, Shape, fleet

VOCAB = 251
REQUESTS = 120
SHAPE = Shape(num_blocks=48, max_num_batched_tokens=48, max_num_seqs=8, max_model_len=256)


@dataclass(frozen=True, slots=True)
class Ask:
    """One client: what it asks, and after how many tokens it leaves (None: never)."""

    prompt: tuple[int, ...]
    tokens: int
    n: int
    leaves_after: int | None


def asks(seed: int) -> list[Ask]:
    draw = random.Random(seed)
    prefixes = [tuple(draw.randrange(VOCAB) for _ in range(draw.randrange(8, 120))) for _ in range(5)]
    made = []
    for _ in range(REQUESTS):
        prefix = draw.choice(prefixes)[: draw.randrange(1, 120)]
        tail = tuple(draw.randrange(VOCAB) for _ in range(draw.randrange(0, 60)))
        leaves = draw.randrange(1, 10) if draw.random() < 0.25 else None
        made.append(Ask(prefix + tail, draw.randrange(1, 24), draw.choice((1, 1, 1, 2, 3)), leaves))
    return made


def runner() -> SimRunner:
    return SimRunner(
        SHAPE.num_blocks,
        SHAPE.block_tokens,
        VOCAB,
        cost=CostModel(base_s=0.0005),
        max_model_len=SHAPE.max_model_len,
    )


async def client(running: Fleet, ask: Ask, number: int, places: asyncio.Semaphore) -> None:
    """Reads one request to its end, or leaves; checks every token on the way."""
    right = expected_tokens(ask.prompt, ask.tokens, VOCAB)
    async with places:
        params = SamplingParams(max_tokens=ask.tokens, temperature=0.0)
        request = GenerateRequest(f"soak-{number}", ask.prompt, params, ask.n, TIMEOUT_S)
        generation = running.door.dispatcher.submit(request)
        got: dict[int, list[int]] = {choice: [] for choice in range(ask.n)}
        finished: list[int] = []
        async for chunks in generation:
            for chunk in chunks:
                assert chunk.index == len(got[chunk.choice])
                got[chunk.choice] += chunk.tokens
                finished += [chunk.choice] if chunk.finish == "length" else []
            if ask.leaves_after is not None and len(got[0]) >= ask.leaves_after:
                generation.abort("the client leaves")
                break
        else:
            assert sorted(finished) == list(range(ask.n))
            assert all(tokens == right for tokens in got.values())
        assert all(tokens == right[: len(tokens)] for tokens in got.values())


async def everyone(running: Fleet, seed: int) -> None:
    places = asyncio.Semaphore(24)
    await asyncio.gather(*(client(running, ask, i + seed * REQUESTS, places) for i, ask in enumerate(asks(seed))))


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("transport", ["shm", "zmq"])
def test_random_traffic_is_exact_and_leaves_nothing(seed: int, transport: str, tmp_path: Path) -> None:
    shape = Shape(num_blocks=48, max_num_batched_tokens=48, max_num_seqs=8, max_model_len=256, transports=(transport,))
    with fleet(tmp_path, runner, shape, prefill=2, decode=2, disaggregate_above=9) as running:
        running.call(everyone(running, seed))
        running.assert_quiet()


def test_a_worker_that_drains_under_load_loses_nothing(tmp_path: Path) -> None:
    async def load_and_leave(running: Fleet) -> None:
        load = asyncio.gather(everyone(running, 3), everyone(running, 4))
        while running.workers["decode-1"].engine.num_steps < 20:
            await asyncio.sleep(0.001)
        running.workers["decode-1"].process.drain()
        running.workers["prefill-1"].process.drain()
        await load
        while any(running.workers[name].thread.is_alive() for name in ("decode-1", "prefill-1")):
            await asyncio.sleep(0.001)

    with fleet(tmp_path, runner, SHAPE, prefill=2, decode=2, disaggregate_above=9) as running:
        running.call(load_and_leave(running))
        running.assert_quiet()


class FailingRunner(SimRunner):
    """Its fifth step raises."""

    steps = 0

    def run(self, rows: Sequence[Row]) -> list[Sampled]:
        self.steps += 1
        if self.steps == 5:
            raise RuntimeError("a page is gone")
        return super().run(rows)


def test_a_worker_whose_engine_fails_says_so_before_its_silence_tells(tmp_path: Path) -> None:
    runners = iter([FailingRunner(SHAPE.num_blocks, SHAPE.block_tokens, VOCAB, max_model_len=SHAPE.max_model_len)])

    async def ask(running: Fleet) -> None:
        places = asyncio.Semaphore(8)
        async with asyncio.timeout(10):  # these workers count as silent after 30 s
            await asyncio.gather(*(client(running, Ask((i, 2, 3), 24, 1, None), i, places) for i in range(8)))

    with fleet(tmp_path, lambda: next(runners, None) or runner(), SHAPE, prefill=0, decode=2) as running:
        running.call(ask(running))
        assert not running.workers["decode-0"].thread.is_alive()
        running.assert_quiet()
