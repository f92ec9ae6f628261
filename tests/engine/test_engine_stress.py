"""Thousands of random operations on two small engines: every token right, no block lost, nothing stuck."""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random

import pytest

from engine.engine import Engine
from engine.request import EngineRequest, RequestState
from engine.sim_engine import SimRunner
from engine.step import Missing
from mesh.params import SamplingParams
from tests.engine.sim_decoding import AheadRunner
from tests.engine.sim_requests import engine, idle, oracle, prefill, prompt, request, state

MAX_TOKENS = 14


@dataclass
class World:
    """A prefilling and a decoding engine, and somebody who moves requests between them at random."""

    rng: Random
    source: Engine
    target: Engine
    live: dict[str, EngineRequest] = field(default_factory=dict)
    missing: dict[str, list[Missing]] = field(default_factory=dict)
    prompts: dict[str, list[int]] = field(default_factory=dict)
    got: dict[str, list[int]] = field(default_factory=dict)
    aborted: set[str] = field(default_factory=set)
    finished: int = 0
    known: set[bytes] = field(default_factory=set)
    count: int = 0

    def new_prompt(self) -> tuple[str, list[int]]:
        self.count += 1
        base = prompt(40, self.rng.randrange(3))[: self.rng.randrange(1, 33)]
        key = str(self.count)
        self.prompts[key] = base + prompt(self.rng.randrange(6), self.count)
        return key, list(self.prompts[key])

    def add(self) -> None:
        key, tokens = self.new_prompt()
        wants = self.rng.choice([None, None, None, 0])
        params = SamplingParams(max_tokens=self.rng.randrange(1, MAX_TOKENS), prompt_logprobs=wants)
        self.live[key] = request(key, tokens, params=params)
        self.target.add(self.live[key])

    def hand_over(self) -> None:
        key, tokens = self.new_prompt()
        self.source.add(prefill(key, tokens, MAX_TOKENS))
        self.live[key] = request(key, tokens, MAX_TOKENS)
        self.missing[key] = list(self.target.expect(self.live[key]))

    def fill(self) -> None:
        if self.missing:
            key = self.rng.choice(list(self.missing))
            for _ in range(min(len(self.missing[key]), self.rng.randrange(1, 5))):
                missing = self.missing[key].pop(self.rng.randrange(len(self.missing[key])))
                found = self.source.export(missing.hash)
                if found is not None and self.rng.random() < 0.9:
                    self.target.fill(key, missing.index, found[0])

    def ready(self) -> None:
        if self.missing:
            key = self.rng.choice(list(self.missing))
            del self.missing[key]
            first = oracle(self.prompts[key], 1) if self.rng.random() < 0.7 else []
            self.got[key] = list(first)
            self.target.ready(key, first)
            self.source.release(key)

    def abort(self) -> None:
        if self.live:
            key = self.rng.choice(list(self.live))
            self.target.abort(key)
            self.source.abort(key)
            self.missing.pop(key, None)
            assert state(self.live.pop(key)) is RequestState.FINISHED
            self.aborted.add(key)

    def step(self) -> None:
        for out in self.source.step().tokens:
            assert out.token == oracle(self.prompts[out.request.key], 1)[0]
            if out.request.key not in self.live or out.request.key not in self.missing:
                self.source.release(out.request.key)
        output = self.target.step()
        for out in output.tokens:
            key = out.request.key
            self.got.setdefault(key, []).append(out.token)
            assert out.index == len(self.got[key]) - 1
            if out.finish is not None:
                del self.live[key]
                self.finished += 1
                assert self.got[key] == oracle(self.prompts[key], len(self.got[key]))
                assert len(self.got[key]) == out.request.params.max_tokens
        assert set(output.removed) <= self.known
        self.known = (self.known - set(output.removed)) | set(output.stored)
        assert self.known == set(self.target.snapshot())


@pytest.mark.parametrize(
    ("seed", "runner"), [*((seed, SimRunner) for seed in range(4)), *((seed, AheadRunner) for seed in range(2))]
)
def test_random_operations_keep_tokens_and_books_right(seed: int, runner: type[SimRunner]) -> None:
    rng = Random(seed)
    world = World(
        rng,
        engine(num_blocks=rng.choice([20, 40]), seqs=4, budget=rng.choice([5, 16]), model_len=60),
        engine(
            num_blocks=rng.choice([14, 25, 60]),
            seqs=rng.choice([2, 6]),
            budget=rng.choice([7, 20]),
            model_len=60,
            runner=runner,
        ),
    )
    actions = [world.add, world.hand_over, world.fill, world.ready, world.abort, world.step]
    for _ in range(4000):
        crowded = len(world.live) > 12
        weights = [0 if crowded else 3, 0 if crowded else 4, 8, 4, 1, 12]
        rng.choices(actions, weights)[0]()
        world.source.check()
        world.target.check()
    for _ in range(2000):
        if not (world.live or world.source.has_work):
            break
        world.ready()
        world.step()
    assert not world.live, "nothing is stuck"
    assert world.finished > 150
    assert world.finished + len(world.aborted) == world.count
    assert world.target.num_preemptions > 0 or world.target.pool.num_blocks == 60
    for e in (world.source, world.target):
        assert not e.has_work
        idle(e)
