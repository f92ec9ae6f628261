"""The pool's books: free, cached, held, and what can be found."""

from __future__ import annotations

import pytest

from engine.cache.block_pool import BlockPool
from engine.errors import IntegrityError


def taken(pool: BlockPool, name: bytes | None = None) -> int:
    block = pool.allocate()
    assert block is not None
    if name is not None:
        pool.register(block, name)
    return block


def counts(pool: BlockPool) -> tuple[int, int, int]:
    return pool.num_free, pool.num_cached, pool.num_held


def test_a_nameless_block_returns_to_free_and_a_named_one_stays_cached() -> None:
    pool = BlockPool(3)
    a, b = taken(pool), taken(pool, b"b")
    assert counts(pool) == (1, 0, 2)
    pool.release(a)
    pool.release(b)
    assert counts(pool) == (2, 1, 0)
    assert pool.index.lookup(b"b") == b


def test_a_block_is_held_until_its_last_holder_releases_it() -> None:
    pool = BlockPool(2)
    block = taken(pool, b"x")
    assert pool.find(b"x") == block
    pool.release(block)
    assert counts(pool) == (1, 0, 1)
    pool.release(block)
    assert counts(pool) == (1, 1, 0)


def test_free_blocks_go_before_cached_ones_and_the_oldest_cached_is_evicted_first() -> None:
    pool = BlockPool(4)
    blocks = [taken(pool, bytes([i])) for i in range(3)]
    for block in (blocks[1], blocks[0], blocks[2]):
        pool.release(block)
    assert taken(pool) == 3
    assert [taken(pool) for _ in range(3)] == [blocks[1], blocks[0], blocks[2]]
    assert pool.allocate() is None
    assert pool.index.names() == ()


def test_use_makes_a_cached_block_the_youngest() -> None:
    pool = BlockPool(2)
    a, b = taken(pool, b"a"), taken(pool, b"b")
    pool.release(a)
    pool.release(b)
    assert pool.find(b"a") == a
    pool.release(a)
    assert taken(pool) == b
    assert pool.index.lookup(b"a") == a


def test_find_takes_a_block_out_of_eviction() -> None:
    pool = BlockPool(1)
    pool.release(taken(pool, b"a"))
    assert pool.find(b"a") == 0
    assert pool.allocate() is None
    assert pool.find(b"nothing") is None


def test_events_are_net_changes() -> None:
    pool = BlockPool(2)
    pool.release(taken(pool, b"a"))
    assert pool.index.take_events() == ((b"a",), ())
    pool.release(taken(pool, b"b"))
    taken(pool, b"c")
    assert pool.index.take_events() == ((b"b", b"c"), (b"a",))
    taken(pool, b"a")
    assert pool.index.take_events() == ((b"a",), (b"b",))
    assert pool.index.take_events() == ((), ())


def test_a_name_that_comes_and_goes_between_two_looks_is_no_event() -> None:
    pool = BlockPool(1)
    pool.release(taken(pool, b"a"))
    taken(pool)
    assert pool.index.take_events() == ((), ())


def test_a_name_that_goes_and_comes_back_is_no_event() -> None:
    pool = BlockPool(2)
    pool.release(taken(pool, b"a"))
    pool.index.take_events()
    taken(pool)
    taken(pool, b"a")
    assert pool.index.take_events() == ((), ())


def test_a_copy_keeps_the_name_when_the_first_block_goes() -> None:
    pool = BlockPool(2)
    first, copy = taken(pool, b"a"), taken(pool, b"a")
    assert pool.index.take_events() == ((b"a",), ())
    pool.release(first)
    assert taken(pool) == first
    assert pool.index.lookup(b"a") == copy
    assert pool.index.take_events() == ((), ())
    pool.release(copy)
    assert counts(pool) == (0, 1, 1)


def test_a_copy_is_freed_not_cached_while_the_first_block_is_here() -> None:
    pool = BlockPool(2)
    first, copy = taken(pool, b"a"), taken(pool, b"a")
    pool.release(copy)
    assert counts(pool) == (1, 0, 1)
    pool.release(first)
    pool.check({})
    assert pool.index.lookup(b"a") == first


def test_a_block_released_once_too_often_is_named() -> None:
    pool = BlockPool(2)
    block = taken(pool)
    pool.release(block)
    with pytest.raises(IntegrityError, match=f"block {block} is released"):
        pool.release(block)


def test_check_names_a_leaked_block() -> None:
    pool = BlockPool(2)
    block = taken(pool)
    pool.check({block: 1})
    with pytest.raises(AssertionError, match=f"block {block}: 1 references, 0 holders"):
        pool.check({})


def test_a_block_nobody_holds_cannot_be_named() -> None:
    with pytest.raises(IntegrityError, match="block 0"):
        BlockPool(1).register(0, b"a")


def test_an_empty_pool_is_refused() -> None:
    with pytest.raises(ValueError, match="0 blocks"):
        BlockPool(0)
