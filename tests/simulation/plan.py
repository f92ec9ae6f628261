"""What one seed plays: the fleet, the requests, the faults; all of it drawn before anything happens."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from tests.simulation.client import NO_DEADLINE_S
from tests.simulation.faults import Blow, draw_blows
from tests.simulation.oracle import VOCAB, answer

MAX_MODEL_LEN = 96
BLOCK_TOKENS = 4
LARGE_BLOCK_TOKENS = 8
LONGEST = 80
"""Tokens of a prompt with its answer: a pool of twenty pages holds one of them, and little else."""

LAST_REQUEST_S = 7.0
"""Well before the last faults, so that those which are late by then, and all that follows from it, are hit as well."""


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    name: str
    role: str
    blocks: int
    max_num_seqs: int
    max_batched_tokens: int
    step_s: float
    clock_rate: float
    block_tokens: int = BLOCK_TOKENS


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """Some prompts go on from another request's prompt and answer, as a conversation does."""

    name: str
    at: float
    proxy: str
    prompt: tuple[int, ...]
    max_tokens: int
    stops: tuple[int, ...]
    n: int
    deadline_s: float
    priority: int


@dataclass(frozen=True, slots=True)
class Plan:
    """A seed, drawn."""

    seed: int
    calm: bool
    """Nothing goes wrong but that clients leave, so nothing may be lost, late or done twice."""
    gentle: bool
    """At most one message between any two KV endpoints is hit: that is repaired, and nobody notices."""
    workers: tuple[WorkerPlan, ...]
    proxies: tuple[str, ...]
    requests: tuple[RequestPlan, ...]
    blows: tuple[Blow, ...]
    rates: dict[str, float]
    transports: tuple[str, ...]
    disaggregate_above: int


def draw(seed: int) -> Plan:
    chance = random.Random(seed)
    calm = seed % 24 == 0
    gentle = seed % 12 == 0
    prefills = [f"prefill-{i}" for i in range(chance.choice((1, 1, 2, 3)))]
    decodes = [f"decode-{i}" for i in range(chance.choice((1, 2, 2, 3)))]
    proxies = [f"proxy-{i}" for i in range(chance.choice((1, 1, 2)))]
    workers = tuple(_worker(chance, name, gentle) for name in (*prefills, *decodes))
    if seed % 5 == 4 and not gentle:
        workers = tuple(replace(w, block_tokens=size) for w, size in zip(workers, _sizes(seed), strict=False))
    requests = _requests(chance, proxies, gentle)
    blows: list[Blow] = []
    rates: dict[str, float] = {}
    names = [r.name for r in requests]
    if calm:
        blows = [Blow(r.at + chance.uniform(0.0, 0.3), "cancel", r.name) for r in requests[::2]]
    elif gentle:
        rates = {"kv": 0.3}
    else:
        count = chance.choice((0, 0, 2, 4, 8, 16, 32, 48))
        blows = draw_blows(chance, count, [*prefills, *decodes], proxies, names)
        rates = {kind: chance.choice((0.6, 0.9, 1.0, 1.0)) for kind in ("kv", "control")}
    return Plan(
        seed,
        calm,
        gentle,
        workers,
        tuple(proxies),
        requests,
        tuple(blows),
        rates,
        chance.choice((("zmq",), ("zmq",), ("local", "zmq"))),
        chance.choice((6, 6, 16, -1)),
    )


def _sizes(seed: int) -> Iterator[int]:
    """Of each worker's blocks, in a fleet of unequal ones."""
    chance = random.Random(f"sizes of {seed}")
    while True:
        yield chance.choice((BLOCK_TOKENS, LARGE_BLOCK_TOKENS))


def _worker(chance: random.Random, name: str, gentle: bool) -> WorkerPlan:
    return WorkerPlan(
        name,
        name.split("-")[0],
        blocks=chance.choice((40, 64)) if gentle else chance.randrange(20, 36),
        max_num_seqs=chance.choice((2, 4)),
        max_batched_tokens=chance.choice((8, 16)),
        step_s=chance.choice((0.01, 0.03)),
        clock_rate=1.0 if gentle else chance.choice((1.0, 0.9, 1.1)),
    )


def _requests(chance: random.Random, proxies: list[str], gentle: bool) -> tuple[RequestPlan, ...]:
    topics = [[chance.randrange(1, VOCAB) for _ in range(24)] for _ in range(2)]
    moments = [chance.uniform(0.5, LAST_REQUEST_S) for _ in range(chance.choice((4, 16, 64)))]
    requests: list[RequestPlan] = []
    for number in range(chance.randrange(32, 80)):
        shared = chance.choice(topics)[: chance.choice((0, 8, 12, 24))]
        own = [chance.randrange(1, VOCAB) for _ in range(chance.randrange(1, 20))]
        max_tokens = chance.choice((1, 2, 8, 16, 24))
        if requests and chance.random() < 0.25:
            before = chance.choice(requests)
            if len(before.prompt) + before.max_tokens + len(own) + max_tokens <= LONGEST:
                shared = [*before.prompt, *answer(before.prompt, before.max_tokens, before.stops)]
        prompt = (*shared, *own)
        stops = (answer(prompt, max_tokens)[chance.randrange(max_tokens)],) if chance.random() < 0.2 else ()
        requests.append(
            RequestPlan(
                f"r{number}",
                chance.choice(moments) + chance.uniform(0.0, 0.05),
                chance.choice(proxies),
                prompt,
                max_tokens,
                stops,
                2 if chance.random() < 0.15 else 1,
                NO_DEADLINE_S if gentle or chance.random() < 0.8 else chance.choice((0.2, 2.0, 6.0)),
                chance.choice((0, 0, 0, 1)),
            )
        )
    return tuple(requests)
