"""Whatever the network and the processes do: never a wrong byte, always an end, nothing left."""

from __future__ import annotations

import pytest

from tests.kvtransfer.pairs import content, name
from tests.kvtransfer.simulation import FETCHER, HOLDER, Faults, Simulation

SEEDS = range(40)
WORLDS = {
    "loss": Faults(loss=0.15),
    "duplication": Faults(duplicate=0.3),
    "reordering": Faults(jitter_s=1.5),
    "corruption": Faults(corrupt=0.2),
    "deaths": Faults(deaths=True),
    "mute engine": Faults(mute_engine=0.2),
    "everything": Faults(0.1, 0.1, 0.1, 1.0, True, 0.05),
}


def assert_true_and_clean(sim: Simulation) -> None:
    """What holds whatever happened."""
    out = sim.outcome
    for transfer, blocks in out.delivered.items():
        for index, payload in blocks.items():
            assert index in out.wanted[transfer]
            assert payload == content(name(index))
    for notes in out.notes.values():
        assert len(notes) <= 1
        assert all(n.startswith(b"note of ") for n in notes)
    if FETCHER in sim.alive:
        assert set(out.ended) == set(out.wanted)
        assert not sim.fetcher.transfers
        for transfer, ended in out.ended.items():
            arrived = set(out.delivered.get(transfer, ()))
            assert arrived | set(ended.missing) == out.wanted[transfer]
            assert not arrived & set(ended.missing)
    if HOLDER in sim.alive:
        state = sim.holder
        assert (len(state.servings), len(state.streams), len(state.by_stream)) == (0, 0, 0)
        assert (len(state.leases), len(state.gone)) == (0, 0)


@pytest.mark.parametrize("world", WORLDS)
def test_never_a_wrong_byte_always_an_end_nothing_left(world: str) -> None:
    for seed in SEEDS:
        sim = Simulation(seed, WORLDS[world])
        sim.run()
        assert_true_and_clean(sim)


def test_without_faults_everything_arrives_and_nothing_is_dropped() -> None:
    for seed in SEEDS:
        sim = Simulation(seed, Faults())
        out = sim.run()
        assert_true_and_clean(sim)
        for transfer, ended in out.ended.items():
            assert ended.outcome in ("ok", "aborted")
            if ended.outcome == "ok":
                assert (ended.missing, ended.corrupt) == ((), 0)
                assert len(out.notes[transfer]) == 1
        assert set(out.dropped) <= {"transfer"}  # what crosses an abort


def test_loss_alone_is_repaired() -> None:
    """No lost message may stop a transfer; a block is asked for twice, so few may stay missing."""
    lost = total = 0
    for seed in range(100):
        sim = Simulation(seed, Faults(loss=0.05), transfers=1)
        out = sim.run()
        for ended in out.ended.values():
            assert ended.outcome in ("ok", "aborted")
            total += 24
            lost += len(ended.missing) if ended.outcome == "ok" else 0
    assert lost < 0.02 * total


def test_a_seed_plays_the_same_twice() -> None:
    first, second = (Simulation(3, WORLDS["everything"]).run() for _ in range(2))
    assert first.ended == second.ended
    assert first.dropped == second.dropped
