"""The simulated model: right content gives the oracle's tokens, any other content does not."""

from __future__ import annotations

import time
from random import Random

import pytest

from engine.engine import Engine, EngineConfig
from engine.sim_engine import CostModel, SimRunner, expected_tokens, splitmix64
from engine.step import Row
from mesh.settings import WorkerSettings
from tests.engine.sim_requests import VOCAB, oracle, prompt, request, run

CONFIG = EngineConfig(8, 64, 200)


def written(runner: SimRunner, tokens: list[int], table: list[int]) -> Row:
    """A request whose tokens but the last are computed into the pages of `table`."""
    r = request("a", tokens)
    r.block_table = table
    runner.run([Row(r, len(tokens) - 1)])
    r.num_computed_tokens = len(tokens) - 1
    return Row(r, 1)


def token(runner: SimRunner, row: Row) -> int:
    (sampled,) = runner.run([row])
    assert sampled.token is not None
    return sampled.token


def test_splitmix64_gives_the_published_sequence() -> None:
    gamma = 0x9E3779B97F4A7C15
    assert [splitmix64(i * gamma & (1 << 64) - 1) for i in range(2)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
    ]


def test_pages_in_any_order_give_the_oracles_token() -> None:
    runner = SimRunner(8, 4, VOCAB)
    assert token(runner, written(runner, prompt(14), [5, 0, 7, 2])) == oracle(prompt(14), 1)[0]


def test_a_row_that_does_not_catch_up_gives_no_token() -> None:
    runner = SimRunner(8, 4, VOCAB)
    r = request("a", prompt(14))
    r.block_table = [0, 1]
    assert runner.run([Row(r, 8)])[0].token is None


@pytest.mark.parametrize("position", range(13))
def test_one_changed_byte_anywhere_changes_the_token(position: int) -> None:
    runner = SimRunner(8, 4, VOCAB)
    row = written(runner, prompt(14), [0, 1, 2, 3])
    page = bytearray(runner.read_block(position // 4, 4))
    page[8 * (position % 4)] ^= 1
    runner.write_block(position // 4, bytes(page))
    assert token(runner, row) != oracle(prompt(14), 1)[0]


def test_swapped_blocks_change_the_token() -> None:
    runner = SimRunner(8, 4, VOCAB)
    row = written(runner, prompt(14), [0, 1, 2, 3])
    row.request.block_table = [0, 2, 1, 3]
    assert token(runner, row) != oracle(prompt(14), 1)[0]


def test_a_block_of_another_prompt_changes_the_token() -> None:
    runner = SimRunner(8, 4, VOCAB)
    written(runner, prompt(14, 1), [4, 5, 6, 7])
    row = written(runner, prompt(14), [0, 1, 2, 3])
    row.request.block_table = [4, 1, 2, 3]
    assert token(runner, row) != oracle(prompt(14), 1)[0]


def test_a_block_travels_between_runners_and_its_unused_end_does_not() -> None:
    source, target = SimRunner(8, 4, VOCAB), SimRunner(8, 4, VOCAB)
    row = written(source, prompt(7), [3, 6])
    row.request.block_table = [1, 0]
    target.write_block(1, source.read_block(3, 4))
    target.write_block(0, memoryview(source.read_block(6, 2)))
    assert token(target, row) == oracle(prompt(7), 1)[0]
    assert source.read_block(6, 1)[8:] == bytes(24)
    assert len(source.read_block(6, 1)) == source.layout.block_bytes == 32


def test_a_page_of_the_wrong_size_is_refused() -> None:
    with pytest.raises(ValueError, match="reshape"):
        SimRunner(8, 4).write_block(0, bytes(24))


def test_vocabulary_and_first_token_bound_the_output() -> None:
    runner = SimRunner(32, 16, 127, first_token=32, seed=5)
    e = Engine(runner, CONFIG)
    e.add(request("a", [1, 2, 3], 100))
    tokens = run(e)["a"]
    assert tokens == expected_tokens([1, 2, 3], 100, 127, first_token=32, seed=5)
    assert 32 <= min(tokens) < max(tokens) < 127
    assert len(set(tokens)) > 40


def test_the_seed_is_another_model_with_another_digest() -> None:
    a, b = SimRunner(8, 4, VOCAB, seed=1), SimRunner(8, 4, VOCAB, seed=2)
    assert a.digest != b.digest
    assert a.digest == SimRunner(99, 4, VOCAB, seed=1).digest
    assert expected_tokens([1], 5, VOCAB, seed=1) != expected_tokens([1], 5, VOCAB, seed=2)


def test_a_step_sleeps_what_the_cost_model_says() -> None:
    slept: list[float] = []
    cost = CostModel(base_s=1.0, per_prefill_token_s=0.1, per_decode_token_s=0.01)
    e = Engine(SimRunner(32, 4, VOCAB, cost=cost, sleep=slept.append), CONFIG)
    e.add(request("a", prompt(10), 2))
    e.step()
    e.add(request("b", prompt(20, 1), 2))
    e.step()
    assert slept == pytest.approx([2.0, 1.0 + 2.0 + 0.01])


def test_no_cost_means_no_sleep() -> None:
    def never(seconds: float) -> None:
        raise AssertionError(seconds)

    e = Engine(SimRunner(32, 4, VOCAB, sleep=never), CONFIG)
    e.add(request("a", prompt(10), 2))
    run(e)


def test_settings_make_a_runner() -> None:
    runner = SimRunner.from_settings(WorkerSettings(kv_blocks=10, block_tokens=32, max_model_len=77, engine="sim"))
    assert (runner.num_blocks, runner.layout.block_tokens, runner.max_model_len) == (10, 32, 77)


def test_a_step_of_256_long_requests_is_fast() -> None:
    """A fleet runs on a laptop; the bound is loose, a Python loop over positions would take 20 times as long."""
    e = Engine(SimRunner(9000, 16, VOCAB), EngineConfig(256, 1 << 20, 1000))
    rng = Random(0)
    for i in range(256):
        e.add(request(str(i), [rng.randrange(VOCAB) for _ in range(500)], 20))
    e.step()
    began = time.perf_counter()
    for _ in range(5):
        e.step()
    assert (time.perf_counter() - began) / 5 < 0.05
