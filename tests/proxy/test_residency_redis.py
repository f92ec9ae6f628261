"""Residency through a real Redis: what proxies learn, and what they still know when Redis fails."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mesh.errors import EXIT_STORE, StartupError
from mesh.messages import BlockEvents
from mesh.residency import Publisher, open_publisher
from mesh.residency_redis import RedisPublisher, buckets_for, member, name_of, namespace, pack, unpack
from proxy.routing.place import Place
from proxy.routing.residency import BlockChange, LocalResidency, short_names
from proxy.routing.residency_redis import RedisFollower
from tests.proxy.fake_worker import info
from tests.proxy.redis_server import RedisServer, until

DIGEST = b"digest"
PREFIX = namespace(DIGEST)
PATIENCE_S = 20.0


class Server(RedisServer):
    """With what residency writes."""

    def num_names(self) -> int:
        return sum([self.client.scard(key) for key in self.bucket_keys()])

    def bucket_keys(self) -> list[bytes]:
        return sorted(self.client.scan_iter(PREFIX + "b:*"))


class Table:
    """A proxy's table, fed by its follower; the lock stands for the event loop's one thread."""

    def __init__(self, url: str) -> None:
        self._lock = threading.Lock()
        self._index = LocalResidency()
        self.follower = RedisFollower(url, self._deliver)
        self.follower.follow(DIGEST)

    def _deliver(self, worker: Place, change: BlockChange, applied: Callable[[], None]) -> None:
        with self._lock:
            self._index.apply(worker, change)
        applied()

    def longest(self, blocks: list[bytes]) -> dict[Place, int]:
        with self._lock:
            return self._index.longest(short_names(blocks))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def table(server: Server) -> Iterator[Table]:
    table = Table(server.url)
    yield table
    table.follower.close()


@pytest.fixture
def publishers(server: Server) -> Iterator[Callable[..., Publisher]]:
    opened: list[Publisher] = []

    def open_one(worker: str = "d0", incarnation: int = 1, **changes: Any) -> Publisher:
        sent: list[BlockEvents] = []
        opened.append(open_publisher(server.url, info(worker, "decode", incarnation, **changes), sent.append))
        return opened[-1]

    yield open_one
    for publisher in opened:
        publisher.close()


def blocks(start: int, count: int) -> list[bytes]:
    """Names with all bits of their first 8 bytes in use."""
    return [
        ((i * 0x9E3779B97F4A7C15 + 0xABCDEF) & (1 << 64) - 1).to_bytes(8, "little") * 2
        for i in range(start, start + count)
    ]


@pytest.mark.parametrize("name", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1])
def test_names_survive_the_way_through_redis(name: int) -> None:
    assert -(1 << 63) <= member(name) < 1 << 63
    assert name_of(str(member(name)).encode()) == name
    assert list(unpack(pack([name]))) == [name]


@pytest.mark.parametrize(("total", "buckets"), [(1, 1), (128, 1), (129, 2), (1000, 8), (1024, 8), (1025, 16)])
def test_buckets_stay_small(total: int, buckets: int) -> None:
    assert buckets_for(total) == buckets


def test_a_follower_learns_what_workers_store_and_remove(table: Table, publishers: Callable[..., Publisher]) -> None:
    names = blocks(0, 10)
    first, second = publishers("d0"), publishers("d1")
    first.reset(names[:4])
    second.publish(names[:2], [])
    until(lambda: table.longest(names) == {Place("d0", 1): 4, Place("d1", 1): 2})
    first.publish(names[4:], names[1:2])
    until(lambda: table.longest(names) == {Place("d0", 1): 1, Place("d1", 1): 2})
    assert table.longest(names[4:]) == {Place("d0", 1): 6}


def test_a_follower_that_comes_late_starts_from_a_snapshot(
    server: Server, publishers: Callable[..., Publisher]
) -> None:
    names = blocks(0, 20_000)
    publisher = publishers("d0", total_blocks=20_000)
    publisher.reset(names)
    until(lambda: server.num_names() == 20_000)
    publisher.publish([], names[19_999:])
    until(lambda: server.num_names() == 19_999)
    server.client.xtrim(PREFIX + "events", maxlen=0)
    late = Table(server.url)
    until(lambda: late.longest(names) == {Place("d0", 1): 19_999})
    late.follower.close()


def test_a_block_costs_few_bytes_in_redis(server: Server, publishers: Callable[..., Publisher]) -> None:
    before = server.client.info("memory")["used_memory"]
    publishers("d0", total_blocks=65_536).reset(blocks(0, 65_536))
    until(lambda: server.num_names() == 65_536)
    server.client.xtrim(PREFIX + "events", maxlen=0)
    encodings = {server.client.object("ENCODING", key) for key in server.bucket_keys()}
    assert encodings == {b"intset"}
    assert (server.client.info("memory")["used_memory"] - before) / 65_536 < 25


def test_an_old_life_cannot_write_once_a_new_one_has(
    server: Server, table: Table, publishers: Callable[..., Publisher]
) -> None:
    names = blocks(0, 4)
    old = publishers("d0", 1)
    old.reset(names)
    until(lambda: table.longest(names) == {Place("d0", 1): 4})
    publishers("d0", 2).reset(names[:1])
    until(lambda: table.longest(names) == {Place("d0", 2): 1})
    old.publish(blocks(10, 1), [])
    assert isinstance(old, RedisPublisher)
    until(lambda: not old._thread.is_alive())
    assert server.bucket_keys() == [f"{PREFIX}b:d0:2:0".encode()]
    assert table.longest(names) == {Place("d0", 2): 1}


def test_a_worker_that_leaves_takes_its_entries_along(
    server: Server, table: Table, publishers: Callable[..., Publisher]
) -> None:
    names = blocks(0, 4)
    publisher = publishers("d0")
    publisher.reset(names)
    until(lambda: table.longest(names) != {})
    publisher.close()
    until(lambda: table.longest(names) == {})
    assert server.bucket_keys() == []
    assert server.client.hlen(PREFIX + "workers") == 0


def test_what_a_vanished_worker_left_is_swept_out(server: Server) -> None:
    server.client.hset(PREFIX + "workers", "ghost", "7:2")
    server.client.sadd(PREFIX + "b:ghost:7:1", 1, 2, 3)
    table = Table(server.url)
    until(lambda: server.bucket_keys() == [])
    assert server.client.hlen(PREFIX + "workers") == 0
    table.follower.close()


def test_after_a_restart_of_redis_everything_is_told_again(
    server: Server, table: Table, publishers: Callable[..., Publisher]
) -> None:
    names = blocks(0, 8)
    publisher = publishers("d0")
    publisher.reset(names[:4])
    until(lambda: table.longest(names) == {Place("d0", 1): 4})
    server.kill()
    publisher.publish(names[4:6], [])
    assert table.longest(names) == {Place("d0", 1): 4}
    server.start()
    until(lambda: table.longest(names) == {Place("d0", 1): 6})
    publisher.publish(names[6:], [])
    until(lambda: table.longest(names) == {Place("d0", 1): 8})


def test_flushed_data_are_written_again(server: Server, table: Table, publishers: Callable[..., Publisher]) -> None:
    names = blocks(0, 4)
    publishers("d0").reset(names)
    until(lambda: table.longest(names) == {Place("d0", 1): 4})
    server.client.flushall()
    until(lambda: server.client.exists(PREFIX + "w:d0") == 1)
    late = Table(server.url)
    until(lambda: late.longest(names) == {Place("d0", 1): 4})
    late.follower.close()
    assert table.longest(names) == {Place("d0", 1): 4}


def test_a_hole_in_a_worker_s_sequence_reloads_that_worker(
    server: Server, table: Table, publishers: Callable[..., Publisher]
) -> None:
    names = blocks(0, 4)
    publishers("d0").reset(names)
    until(lambda: table.longest(names) == {Place("d0", 1): 4})
    server.client.sadd(PREFIX + "b:d0:1:0", *[member(n) for n in short_names(blocks(50, 1))])
    fields = {"w": "d0", "i": 1, "s": 9, "r": 0, "a": b"", "d": b""}
    server.client.xadd(PREFIX + "events", fields)
    until(lambda: table.longest(blocks(50, 1)) == {Place("d0", 1): 1})


def test_entries_that_mean_nothing_are_skipped(
    server: Server, table: Table, publishers: Callable[..., Publisher]
) -> None:
    events = PREFIX + "events"
    server.client.xadd(events, {"w": "d0"})
    server.client.xadd(events, {"w": b"\xff", "i": "x", "s": 1, "r": 0, "a": b"123", "d": b""})
    names = blocks(0, 2)
    publishers("d0").reset(names)
    until(lambda: table.longest(names) == {Place("d0", 1): 2})


def test_a_redis_that_hangs_does_not_hold_up_the_worker(
    server: Server, table: Table, publishers: Callable[..., Publisher]
) -> None:
    names = blocks(0, 3000)
    publisher = publishers("d0")
    publisher.reset(names[:1])
    until(lambda: table.longest(names) == {Place("d0", 1): 1})
    server.signal(signal.SIGSTOP)
    try:
        start = time.monotonic()
        for i in range(1, 3000):
            publisher.publish(names[i : i + 1], [])
        assert time.monotonic() - start < 1.0
    finally:
        server.signal(signal.SIGCONT)
    until(lambda: table.longest(names) == {Place("d0", 1): 3000})


def test_keys_of_the_wrong_type_do_no_harm(server: Server, table: Table, publishers: Callable[..., Publisher]) -> None:
    names = blocks(0, 2)
    server.client.set(PREFIX + "w:d0", "nonsense")
    publisher = publishers("d0")
    publisher.reset(names)
    publishers("d1").reset(names)
    until(lambda: table.longest(names) == {Place("d1", 1): 2})
    server.client.delete(PREFIX + "w:d0")
    until(lambda: table.longest(names) == {Place("d0", 1): 2, Place("d1", 1): 2})


@pytest.mark.parametrize("url", ["http://localhost", "redis//x", "nonsense", "redis://host:notaport/0"])
def test_a_store_that_means_nothing_is_one_clear_line(url: str) -> None:
    with pytest.raises(StartupError, match="no Redis URL") as refusal:
        open_publisher(url, info("d0", "decode"), lambda _: None)
    assert refusal.value.exit_code == EXIT_STORE
    assert "\n" not in str(refusal.value)


def test_a_worker_starts_while_redis_is_away(tmp_path: Path) -> None:
    publisher = open_publisher(f"unix://{tmp_path}/nobody", info("d0", "decode"), lambda _: None)
    publisher.reset(blocks(0, 1))
    publisher.close()
