"""What the prefix cache saves and what it never gives."""

from __future__ import annotations

import pytest

from engine.errors import IntegrityError
from mesh import blockhash
from mesh.params import SamplingParams
from tests.engine.sim_requests import (
    BLOCK,
    ROOT,
    engine,
    idle,
    oracle,
    prefill,
    prompt,
    ready_blocks,
    request,
    run,
    steps,
)


@pytest.mark.parametrize(("length", "cached"), [(3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (16, 12), (17, 16)])
def test_full_blocks_before_the_last_token_are_found(length: int, cached: int) -> None:
    e = engine(budget=64)
    e.add(request("a", prompt(length), 1))
    run(e)
    b = request("b", prompt(length), 5)
    e.add(b)
    assert e.step().num_scheduled_tokens == length - cached
    assert b.num_cached_tokens == cached
    assert run(e) == {"b": oracle(prompt(length), 5)[1:]}


def test_a_common_prefix_is_found_and_the_rest_computed() -> None:
    e = engine(budget=64)
    e.add(request("a", prompt(20), 3))
    run(e)
    b = request("b", prompt(10) + prompt(10, 1), 3)
    e.add(b)
    assert run(e) == {"b": oracle(prompt(10) + prompt(10, 1), 3)}
    assert b.num_cached_tokens == 8


def test_another_root_shares_nothing() -> None:
    e = engine()
    e.add(request("a", prompt(20), 3))
    run(e)
    b = request("b", prompt(20), 3)
    b.hash_root = b"another tenant.."
    e.add(b)
    run(e)
    assert b.num_cached_tokens == 0


def test_a_conversations_next_turn_finds_the_generated_blocks() -> None:
    e = engine()
    e.add(request("a", prompt(9), 12))
    answer = run(e)["a"]
    b = request("b", prompt(9) + answer + prompt(5, 3), 4)
    e.add(b)
    assert run(e) == {"b": oracle(b.tokens[: 9 + 12 + 5], 4)}
    assert b.num_cached_tokens == 20, "9 + 12 - 1 positions were computed: 5 full blocks"


def test_stored_and_removed_names_add_up_to_the_snapshot() -> None:
    e = engine(num_blocks=10)
    known: set[bytes] = set()
    for i in range(8):
        e.add(request(str(i), prompt(11, i), 6))
        while e.has_work:
            output = e.step()
            assert not set(output.stored) & known
            assert set(output.removed) <= known
            known = (known - set(output.removed)) | set(output.stored)
            assert known == set(e.snapshot())
    assert len(known) == 10


def test_a_prompts_end_is_evicted_before_its_beginning() -> None:
    e = engine(num_blocks=6)
    e.add(request("a", prompt(17), 1))
    run(e)
    e.add(request("b", prompt(9, 1), 1))
    run(e)
    c = request("c", prompt(17), 1)
    e.add(c)
    run(e)
    assert c.num_cached_tokens == 12


def test_every_block_of_a_prefill_is_ready_once_in_order_with_its_name() -> None:
    e = engine(budget=6)
    e.add(prefill("a", prompt(15)))
    ready = ready_blocks(steps(e))
    full = blockhash.chain(ROOT, prompt(15), BLOCK)
    names = [*full, blockhash.block_hash(full[-1], prompt(15)[12:])]
    assert [(r.index, r.hash, r.valid_tokens) for r in ready] == [
        (i, name, 4 if i < 3 else 3) for i, name in enumerate(names)
    ]


def test_blocks_are_ready_in_the_step_that_completes_them() -> None:
    e = engine(budget=4)
    e.add(prefill("a", prompt(10)))
    assert [[r.index for r in output.ready] for output in steps(e)] == [[0], [1], [2]]


def test_cached_blocks_of_a_prefill_are_ready_with_its_first_step() -> None:
    e = engine(budget=4)
    e.add(request("a", prompt(12), 1))
    run(e)
    e.add(prefill("b", prompt(14)))
    assert [[r.index for r in output.ready] for output in steps(e)] == [[0, 1, 2, 3]]


def test_requests_without_hold_report_no_blocks() -> None:
    e = engine()
    e.add(request("a", prompt(14), 3, stop_after=1))
    assert ready_blocks(steps(e)) == []


def test_a_ready_block_can_be_exported_and_a_tail_only_while_it_is_held() -> None:
    e = engine()
    e.add(prefill("a", prompt(6)))
    full, tail = ready_blocks(steps(e))
    whole, part = e.export(full.hash), e.export(tail.hash)
    assert whole is not None
    assert part is not None
    assert (whole[1], part[1]) == (4, 2)
    assert part[0][16:] == bytes(16), "positions behind the tail are zero"
    assert part[0][:16] != bytes(16)
    e.release("a")
    assert e.export(full.hash) == whole
    assert e.export(tail.hash) is None
    assert e.export(b"unknown") is None


def test_a_tail_stays_exportable_while_any_request_with_that_prompt_is_held() -> None:
    e = engine()
    e.add(prefill("a", prompt(6)))
    e.add(prefill("b", prompt(6)))
    tail = ready_blocks(steps(e))[-1]
    e.release("a")
    assert e.export(tail.hash) is not None
    e.abort("b")
    assert e.export(tail.hash) is None
    idle(e)


def test_a_tail_does_not_change_while_its_request_decodes_on() -> None:
    e = engine()
    e.add(request("a", prompt(6), 9, stop_after=5, hold=True))
    tail = e.step().ready[-1]
    before = e.export(tail.hash)
    e.step()
    assert e.export(tail.hash) == before
    steps(e)
    assert e.export(tail.hash) == before


def test_a_block_computed_twice_stays_exportable_when_the_first_copy_is_evicted() -> None:
    e = engine(num_blocks=6)
    e.add(prefill("a", prompt(8)))
    name = ready_blocks(steps(e))[1].hash
    b = prefill("b", prompt(8))
    b.params = SamplingParams(max_tokens=4, prompt_logprobs=0)  # computes what is cached
    e.add(b)
    steps(e)
    assert e.load().held_blocks == 4
    content = e.export(name)
    e.release("a")
    e.add(request("c", prompt(14, 1), 3))
    run(e)
    assert e.load().held_blocks == 2
    assert e.export(name) == content
    e.release("b")
    idle(e)


def test_check_finds_a_page_that_nobody_returned() -> None:
    e = engine()
    a = request("a", prompt(10), 3)
    e.add(a)
    e.step()
    lost = a.block_table.pop()
    with pytest.raises(IntegrityError, match=f"block {lost}: 1 references, 0 holders"):
        e.check()
