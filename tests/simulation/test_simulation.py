"""The simulated fleet itself: some seeds of it, the same seed twice, and what it says of one that fails."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest

import worker.links
from mesh.messages import Register
from tests.simulation.__main__ import main
from tests.simulation.client import NO_DEADLINE_S
from tests.simulation.faults import Blow
from tests.simulation.mutants import MUTANTS
from tests.simulation.plan import draw
from tests.simulation.scale import replaced
from tests.simulation.shorten import VIOLATION, failure, history, shorten
from tests.simulation.suite import Suite, hunt, play

SEEDS_EACH = 4


@pytest.mark.parametrize("first", range(0, 4 * SEEDS_EACH, SEEDS_EACH))
def test_seeds_hold(first: int) -> None:
    suite = Suite()
    for seed in range(first, first + SEEDS_EACH):
        assert play(seed, suite) is None
    assert suite.faults > 100  # a seed in which nothing goes wrong shows nothing
    assert suite.outcomes["done"] > 20


@pytest.mark.parametrize(("seed", "mistake"), [(3, "reconnection_taken_for_an_echo")])
def test_a_bug_that_a_seed_found_stays_mended(seed: int, mistake: str) -> None:
    """The mistake is what production once did: with it the seed fails, so without it the seed shows something."""
    assert failure(draw(seed)) is None
    assert hunt(mistake, (seed,)) is not None


def test_a_lapse_right_after_a_registration_is_no_repetition() -> None:
    """A history of its own, since a clock that jumps within a worker's first second is drawn once in many hundred
    seeds: the worker forgets what it was given, and says so when it registers anew. Production once did not."""
    drawn = draw(1)
    requests = tuple(replace(r, at=0.5, deadline_s=NO_DEADLINE_S) for r in drawn.requests[:8])
    blows = tuple(Blow(0.6, "jump", w.name, seconds=20.0) for w in drawn.workers)
    plan = replace(drawn, requests=requests, blows=blows, rates={})
    assert failure(plan) is None
    with replaced((worker.links, "Register", lambda info, _: Register(info, 0))):
        found = failure(plan)
    assert found is not None
    assert "hung until its deadline" in found.violation or "without an end" in found.violation


def test_a_seed_plays_byte_for_byte_in_any_process() -> None:
    """In particular whatever the order of its sets is."""
    code = "from tests.simulation.test_simulation import digest; print(digest(1))"
    others = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    there = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": others, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert there.stdout.strip() == digest(1) == digest(1)


def digest(seed: int) -> str:
    lines = history(draw(seed))
    assert len(lines) > 500
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def test_only_the_named_faults_are_injected_where_they_were() -> None:
    plan = draw(1)
    blow = next(b for b in plan.blows if b.kind == "crash")
    assert sum(str(blow) in line for line in history(plan)) == 1
    alone = history(plan, (str(blow),))
    assert sum(str(blow) in line for line in alone) == 1
    assert not any("!!" in line for line in alone)


def test_a_failure_is_shortened_to_what_it_needs() -> None:
    """One flipped bit is enough where seals are not looked at."""
    with replaced(*MUTANTS["no_seal_check"].changes):
        found = failure(draw(2))
        assert found is not None
        assert len(found.faults) > 10
        short = shorten(found)
        lines = history(short.plan, short.faults)
    assert len(short.faults) == 1
    assert len(short.plan.requests) == 1
    assert lines[-1] == f"{VIOLATION} {short.violation}"
    assert "believed" in short.violation


def test_the_command_prints_the_seed_and_its_history(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--first", "0", "--seeds", "3", "--mutant", "no_seal_check"]) == 1
    printed = capsys.readouterr().out
    assert "seed 1 FAILS" in printed
    assert VIOLATION in printed
    assert main(["--seeds", "1"]) == 0
    assert "seeds 0 to 0 hold: 1 seeds" in capsys.readouterr().out


def test_the_command_shows_one_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seed", "0"]) == 0
    assert "decode-0 starts its life 1" in capsys.readouterr().out
