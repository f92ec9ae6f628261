"""What a worker computes before it tells anybody that it is there."""

from __future__ import annotations

import pytest

from engine.engine import Engine, EngineConfig
from engine.sim_engine import SimRunner
from worker.main import MIN_STEP_BOUND_S, STEP_BOUND_FACTOR, warm_up


@pytest.mark.parametrize(("blocks", "max_len"), [(64, 512), (2, 16), (2, 6)])
def test_it_decodes_often_enough_for_what_is_compiled_and_leaves_nothing(blocks: int, max_len: int) -> None:
    engine = Engine(SimRunner(blocks, 8), EngineConfig(4, 256, max_len))
    assert warm_up(engine, 256) >= MIN_STEP_BOUND_S
    assert engine.num_steps >= 4
    assert not engine.has_work
    engine.check()


def test_a_steps_bound_is_measured_on_the_prompt_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine(SimRunner(64, 8), EngineConfig(4, 256, 512))
    monkeypatch.setattr("time.monotonic", lambda: 100.0 * engine.num_steps)
    assert warm_up(engine, 256) == 100.0 * STEP_BOUND_FACTOR
