"""Some of the mistakes that the simulated fleet must find; `python -m tests.simulation --mutants` makes all of them."""

from __future__ import annotations

import pytest

from tests.simulation.mutants import MUTANTS
from tests.simulation.suite import hunt

FOUND_BY = {"no_digest_check": 2}


@pytest.mark.parametrize("name", FOUND_BY)
def test_a_mistake_is_found(name: str) -> None:
    seed = FOUND_BY[name]
    found = hunt(name, (seed,))
    assert found is not None
    assert hunt(name, (seed,)) == found


def test_there_are_enough_mistakes_and_each_changes_something() -> None:
    assert len(MUTANTS) >= 30
    for mutant in MUTANTS.values():
        for owner, name, value in mutant.changes:
            assert vars(owner)[name] is not value, mutant.name
