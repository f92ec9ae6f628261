"""Some of the mistakes that the simulated fleet must find; `python -m tests.simulation --mutants` makes all of them."""

from __future__ import annotations

import pytest

from tests.simulation.mutants import MUTANTS
from tests.simulation.suite import hunt

FOUND_BY = {
    "cached_blocks_not_pinned": 0,
    "note_not_kept": 0,
    "lease_expires_early": 1,
    "retry_without_a_new_attempt": 1,
    "repeated_token_emitted": 17,
    "failure_not_told": 1,
    "fetched_parts_not_written": 9,
    "part_taken_for_a_whole_block": 29,
}
"""By which seed, one of the first: these die in a moment."""


@pytest.mark.parametrize("name", FOUND_BY)
def test_a_mistake_is_found(name: str) -> None:
    assert hunt(name, (FOUND_BY[name],)) is not None


def test_there_are_enough_mistakes_and_each_changes_something() -> None:
    assert len(MUTANTS) >= 30
    for mutant in MUTANTS.values():
        for owner, name, value in mutant.changes:
            assert vars(owner)[name] is not value, mutant.name
