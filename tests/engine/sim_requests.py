"""Simulated engines and requests that the engine tests share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from random import Random

from engine.engine import Engine, EngineConfig
from engine.request import EngineRequest, RequestState
from engine.sim_engine import SimRunner, expected_tokens
from engine.step import BlockReady, StepOutput
from mesh.params import SamplingParams

VOCAB = 1 << 20
"""So large that a wrong block cannot give the right token by chance."""
BLOCK = 4
ROOT = b"r" * 16


def engine(
    num_blocks: int = 64,
    *,
    seqs: int = 8,
    budget: int = 16,
    model_len: int = 200,
    clock: Callable[[], float] = time.monotonic,
    runner: type[SimRunner] = SimRunner,
) -> Engine:
    return Engine(runner(num_blocks, BLOCK, VOCAB), EngineConfig(seqs, budget, model_len), clock)


def request(
    key: str,
    tokens: Iterable[int],
    max_tokens: int = 4,
    *,
    num_prompt_tokens: int | None = None,
    stop_after: int | None = None,
    hold: bool = False,
    params: SamplingParams | None = None,
) -> EngineRequest:
    ids = list(tokens)
    return EngineRequest(
        key,
        ids,
        len(ids) if num_prompt_tokens is None else num_prompt_tokens,
        params or SamplingParams(max_tokens=max_tokens),
        ROOT,
        stop_after=stop_after,
        hold=hold,
    )


def prefill(key: str, tokens: Iterable[int], max_tokens: int = 4) -> EngineRequest:
    """As a prefill worker runs it: leaves after one token, blocks held."""
    return request(key, tokens, max_tokens, stop_after=1, hold=True)


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    rng = Random(seed)
    return [rng.randrange(VOCAB) for _ in range(num_tokens)]


def oracle(tokens: list[int], num_tokens: int) -> list[int]:
    return expected_tokens(tokens, num_tokens, VOCAB)


def run(engine: Engine, max_steps: int = 2000) -> dict[str, list[int]]:
    """Steps until nothing can be computed any more; the new tokens by request. Checks the books after every step."""
    tokens: dict[str, list[int]] = {}
    for output in steps(engine, max_steps):
        for out in output.tokens:
            tokens.setdefault(out.request.key, []).append(out.token)
    return tokens


def steps(engine: Engine, max_steps: int = 2000) -> list[StepOutput]:
    outputs: list[StepOutput] = []
    while engine.has_work:
        assert len(outputs) < max_steps, "no progress"
        outputs.append(engine.step())
        engine.check()
        if outputs[-1].num_scheduled_tokens == 0:
            break
    return outputs


def ready_blocks(outputs: Iterable[StepOutput]) -> list[BlockReady]:
    return [ready for output in outputs for ready in output.ready]


def carry(source: Engine, target: Engine, wanted: EngineRequest) -> int:
    """Fetches what `wanted` lacks from `source`; the number of blocks that came."""
    count = 0
    for missing in target.expect(wanted):
        found = source.export(missing.hash)
        if found is not None:
            assert found[1] == missing.valid_tokens
            count += target.fill(wanted.key, missing.index, found[0])
    return count


def state(request: EngineRequest) -> RequestState:
    return request.state


def idle(engine: Engine) -> None:
    """Asserts that nothing is held or known any more."""
    engine.check()
    load = engine.load()
    assert (load.running, load.waiting, load.fetching, load.held) == (0, 0, 0, 0)
    assert load.held_blocks == 0
    assert load.free_blocks + load.cached_blocks == engine.pool.num_blocks
