"""Residency in Redis: the keys, and the worker's side that writes them.

Under `kvmesh:<model>:`

    workers             hash    worker id -> "incarnation:buckets", for whoever takes a snapshot
    w:<worker>          hash    i: incarnation, s: sequence of its last change; expires when the worker falls
    silent b:<worker>:<i>:<n>  set     names of the blocks it holds, in `buckets` buckets small enough to be
    packed integers events              stream  the last changes: w, i, s, r (reset), a and d (packed names
    added and deleted) epoch               string  random; changes when the server lost its data

A name is the first 8 bytes of a block's name, a set member its value as a signed integer: 8 bytes per block
in memory. Keys belong to one incarnation, and every change is a transaction that watches `w:<worker>`, so an
old incarnation cannot write once a newer one has. No scripting, no blocking read, nothing from Redis's
dangerous commands.

Nothing here is needed for a request to succeed. What Redis loses, each worker writes again from what it
knows.
"""

from __future__ import annotations

import logging
import threading
import time
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from mesh.errors import EXIT_STORE, StartupError
from mesh.logs import redact
from mesh.messages import WorkerInfo

log = logging.getLogger(__name__)

FLUSH_S = 0.1
"""Changes are collected for so long: a block that lives shorter is not worth a routing decision."""
RENEW_S = 1.0
"""Without changes the worker's entry is looked at and renewed this often, which also finds that it is
gone."""
RETRY_S = 0.5
"""Pause after a failure: the breaker. One attempt per pause, each bounded by the time-out."""
TIMEOUT_S = 0.5
"""A chunk takes a Redis that is well a few milliseconds; nobody but the publisher's own thread waits for it."""
WORKER_TTL_MS = 60_000
"""A worker silent for so long is swept out of the store; if it was only paused it writes everything again."""
CHUNK_NAMES = 4096
"""Names in one transaction: a few milliseconds of the server's time."""
BUCKET_NAMES = 128
"""Per bucket when the worker is full: far from the 512 above which Redis stops packing a set of integers."""
STREAM_LENGTH = 10_000
"""Changes kept for followers: minutes; one that lags further takes a snapshot."""
CLOSE_S = 2.0


def namespace(model_digest: bytes) -> str:
    """The prefix of all keys of one model's workers."""
    return f"kvmesh:{model_digest.hex()[:16]}:"


def connect(url: str, timeout_s: float) -> Any:
    """A client whose every call ends within about `timeout_s`. Raises `StartupError` for a URL that means
    nothing.

    redis-py's defaults wait and retry for minutes when a server stops answering.
    """
    try:
        return redis.Redis.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
            retry_on_error=[],
            protocol=2,
        )
    except ValueError as error:
        raise StartupError(f"{redact(url)!r} is no Redis URL: {error}", EXIT_STORE) from None


def pack(names: Iterable[int]) -> bytes:
    return array("Q", names).tobytes()


def unpack(packed: bytes) -> Sequence[int]:
    """Raises `ValueError` for bytes that are no names."""
    names = array("Q")
    names.frombytes(packed)
    return names


def member(name: int) -> int:
    """The name as Redis packs integers: signed 64 bits."""
    return name - (1 << 64) if name >> 63 else name


def name_of(member: bytes) -> int:
    return int(member) & (1 << 64) - 1


def buckets_for(total_blocks: int) -> int:
    """A power of two."""
    return 1 << max(0, (max(1, total_blocks) - 1).bit_length() - BUCKET_NAMES.bit_length() + 1)


def short_name(block: bytes) -> int:
    return int.from_bytes(block[:8], "little")


class Fenced(Exception):
    """A later life of this worker has written."""


class RedisPublisher:
    """`mesh.residency.Publisher` on a thread of its own; what callers do is only noted, in memory."""

    def __init__(self, url: str, worker: WorkerInfo) -> None:
        self._client = connect(url, TIMEOUT_S)
        self._shown = redact(url)
        self._worker = worker.worker_id
        self._incarnation = worker.incarnation
        self._buckets = buckets_for(worker.total_blocks)
        self._prefix = namespace(worker.model_digest)
        self._changed = threading.Condition()
        self._held: set[int] = set()
        self._pending: dict[int, bool] = {}
        """Name -> stored or removed, since the last flush."""
        self._rewrite = True
        """All of `_held` must be written."""
        self._closing = False
        self._seq = 0
        self._healthy = True
        self._thread = threading.Thread(target=self._run, name="residency", daemon=True)
        self._thread.start()

    def publish(self, stored: Sequence[bytes], removed: Sequence[bytes]) -> None:
        gone, new = [short_name(b) for b in removed], [short_name(b) for b in stored]
        with self._changed:
            self._held.difference_update(gone)
            self._held.update(new)
            if not self._rewrite:
                self._pending.update(dict.fromkeys(gone, False))
                self._pending.update(dict.fromkeys(new, True))
                if len(self._pending) > CHUNK_NAMES:
                    self._changed.notify()

    def reset(self, held: Sequence[bytes]) -> None:
        with self._changed:
            self._held = {short_name(b) for b in held}
            self._rewrite = True
            self._pending.clear()
            self._changed.notify()

    def close(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(CLOSE_S)
        self._client.close()

    def _run(self) -> None:
        wait, renewed = 0.0, 0.0
        while not self._wait(wait):
            now = time.monotonic()
            with self._changed:
                idle = not self._pending and not self._rewrite
            if idle and now - renewed < RENEW_S:
                wait = FLUSH_S
                continue
            try:
                self._flush()
                self._note(True, "")
                wait, renewed = FLUSH_S, now
            except Fenced:
                log.warning("a later life of %s writes to the store; this one stops", self._worker)
                return
            except (redis.RedisError, OSError, ValueError) as error:
                self._note(False, f"{type(error).__name__}: {error}")
                with self._changed:
                    self._rewrite = True  # whether the transaction took place is not known
                    self._pending.clear()
                wait = RETRY_S
        self._leave()

    def _wait(self, seconds: float) -> bool:
        """True: closing."""
        with self._changed:
            if not self._closing and seconds > 0:
                self._changed.wait(seconds)
            return self._closing

    def _note(self, healthy: bool, reason: str) -> None:
        if healthy and not self._healthy:
            log.info("the store %s is back", self._shown)
        elif self._healthy and not healthy:
            log.warning("the store %s does not take residency: %s", self._shown, reason)
        self._healthy = healthy

    def _flush(self) -> None:
        """Writes what changed, or everything if Redis does not have what was written before."""
        incarnation, seq = self._written()
        with self._changed:
            whole = self._rewrite or incarnation != self._incarnation or seq != self._seq
            self._rewrite = False
            changes, self._pending = self._pending, {}
            held = list(self._held) if whole else []
        if whole:
            self._write_all(held, incarnation, max(seq, self._seq))
            return
        names = list(changes.items())
        for i in range(0, max(1, len(names)), CHUNK_NAMES):
            part = names[i : i + CHUNK_NAMES]
            self._write([n for n, stored in part if stored], [n for n, stored in part if not stored])

    def _written(self) -> tuple[int, int]:
        """(incarnation, sequence) as Redis has them; zeros when it has nothing."""
        incarnation, seq = self._client.hmget(self._key("w"), "i", "s")
        if incarnation is None:
            return 0, 0
        return int(incarnation), int(seq or 0)

    def _write_all(self, held: list[int], before: int, seq: int) -> None:
        self._seq = seq
        # Neighbours in one bucket go into one command: a tenth of the server's time, and of ours.
        held = [name for names in self._by_bucket(held).values() for name in names]
        first = held[:CHUNK_NAMES]
        stale = {self._incarnation: self._buckets}
        entry = self._client.hget(self._prefix + "workers", self._worker)
        if entry is not None:
            incarnation, _, buckets = entry.partition(b":")
            stale[int(incarnation)] = int(buckets)
        self._write(first, [], reset=True, stale=stale)
        for i in range(CHUNK_NAMES, len(held), CHUNK_NAMES):
            self._write(held[i : i + CHUNK_NAMES], [])

    def _write(
        self, added: list[int], deleted: list[int], reset: bool = False, stale: dict[int, int] | None = None
    ) -> None:
        """One transaction, which fails if anybody else writes for this worker meanwhile.

        Without changes it only renews the worker's entry.
        """
        entry = self._key("w")
        with self._client.pipeline(transaction=True) as pipe:
            pipe.watch(entry)
            found = pipe.hget(entry, "i")
            if found is not None and int(found) > self._incarnation:
                raise Fenced
            pipe.multi()
            for incarnation, buckets in (stale or {}).items():
                pipe.unlink(*[self._bucket(incarnation, n) for n in range(buckets)])
            for bucket, names in self._by_bucket(added).items():
                pipe.sadd(self._bucket(self._incarnation, bucket), *map(member, names))
            for bucket, names in self._by_bucket(deleted).items():
                pipe.srem(self._bucket(self._incarnation, bucket), *map(member, names))
            news = bool(reset or added or deleted)
            seq = self._seq + news
            pipe.hset(entry, mapping={"i": self._incarnation, "s": seq})
            pipe.pexpire(entry, WORKER_TTL_MS)
            pipe.hset(self._prefix + "workers", self._worker, f"{self._incarnation}:{self._buckets}")
            if news:
                fields: dict[str, Any] = {"w": self._worker, "i": self._incarnation, "s": seq}
                fields |= {"r": int(reset), "a": pack(added), "d": pack(deleted)}
                pipe.xadd(self._prefix + "events", fields, maxlen=STREAM_LENGTH, approximate=True)
            pipe.execute()
        self._seq = seq

    def _by_bucket(self, names: list[int]) -> dict[int, list[int]]:
        grouped: dict[int, list[int]] = {}
        for name in names:
            grouped.setdefault(name & self._buckets - 1, []).append(name)
        return grouped

    def _key(self, kind: str) -> str:
        return f"{self._prefix}{kind}:{self._worker}"

    def _bucket(self, incarnation: int, number: int) -> str:
        return bucket_key(self._prefix, self._worker, incarnation, number)

    def _leave(self) -> None:
        """The worker ends on purpose: nobody should look for its blocks."""
        try:
            with self._changed:
                self._held.clear()
            self._write([], [], reset=True, stale={self._incarnation: self._buckets})
            self._client.hdel(self._prefix + "workers", self._worker)
            self._client.delete(self._key("w"))
        except (Fenced, redis.RedisError, OSError, ValueError) as error:
            log.info("left the store without a word: %s", type(error).__name__)


def bucket_key(prefix: str, worker: str, incarnation: int, number: int) -> str:
    return f"{prefix}b:{worker}:{incarnation}:{number}"
