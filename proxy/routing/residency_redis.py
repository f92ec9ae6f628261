"""The proxy's side of residency in Redis: a thread that turns a snapshot and the stream after it into
changes.

    START ──snapshot of every worker──▶ FOLLOWING ──entries──▶ FOLLOWING
      ▲                                    │ a worker's sequence has a hole: that worker's snapshot
      └── data lost or stream trimmed ─────┘ Redis is away: try again; what the table knows stays as it is

A snapshot is not atomic: the stream's position is noted first, and replaying what is already in the snapshot
changes nothing. Everything read is checked; an entry that means nothing is skipped.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import redis

from mesh.logs import redact
from mesh.residency_redis import bucket_key, connect, name_of, namespace, unpack
from proxy.routing.place import Place
from proxy.routing.residency import BlockChange

log = logging.getLogger(__name__)

TIMEOUT_S = 1.0
"""This thread is on no request's path; a bucket group of a snapshot takes milliseconds."""
POLL_S = 0.05
"""Blocking reads are not allowed to us; twenty cheap reads per second are."""
CHECK_S = 1.0
"""How soon lost data and a trimmed stream are noticed."""
RETRY_S = 0.5
READ_ENTRIES = 256
SNAPSHOT_BUCKETS = 32
"""Read in one round trip: about 4,000 names."""
QUEUED_CHANGES = 16
"""Handed over and not applied yet; above it the thread waits."""

Deliver = Callable[[Place, BlockChange, Callable[[], None]], None]
"""Gets each change, in order, and something to call when it was applied. Called from the follower's
thread."""


class RedisFollower:
    """Follows one model's workers from `follow` to `close`."""

    def __init__(self, url: str, deliver: Deliver) -> None:
        self._url = url
        self._client = connect(url, TIMEOUT_S)
        self._deliver = deliver
        self._room = threading.Semaphore(QUEUED_CHANGES)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._prefix = ""
        self._epoch = b""
        self._position = b"0-0"
        self._seqs: dict[Place, int] = {}
        self._healthy = True
        self.snapshots = 0
        """Full snapshots taken so far."""

    def follow(self, model_digest: bytes) -> None:
        """Starts following; with another model than before, starts anew."""
        prefix = namespace(model_digest)
        if prefix == self._prefix:
            return
        self._end()
        self._prefix = prefix
        self._stop.clear()
        self._thread = threading.Thread(target=self._run, name="residency", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._end()
        self._client.close()

    def _end(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(2 * TIMEOUT_S)

    def _run(self) -> None:
        loaded, checked = False, 0.0
        while not self._stop.is_set():
            pause = POLL_S
            try:
                now = time.monotonic()
                if loaded and now - checked >= CHECK_S:
                    loaded, checked = self._continues(), now
                if not loaded:
                    self._load()
                    loaded, checked = True, now
                if self._read() == READ_ENTRIES:
                    pause = 0.0
                self._note(True, "")
            except (redis.RedisError, OSError, ValueError) as error:
                self._note(False, f"{type(error).__name__}: {error}")
                checked, pause = 0.0, RETRY_S
            self._stop.wait(pause)

    def _note(self, healthy: bool, reason: str) -> None:
        if healthy and not self._healthy:
            log.info("the store %s is back", redact(self._url))
        elif self._healthy and not healthy:
            log.warning("the store %s does not answer; routing goes on without news: %s", redact(self._url), reason)
        self._healthy = healthy

    def _load(self) -> None:
        """Notes where the stream stands, then reads what every worker holds."""
        epoch_key = self._prefix + "epoch"
        self._client.set(epoch_key, secrets.token_hex(8), nx=True)
        self._epoch = self._client.get(epoch_key) or b""
        last = self._client.xrevrange(self._prefix + "events", count=1)
        self._position = last[0][0] if last else b"0-0"
        self._seqs.clear()
        for worker, entry in self._client.hgetall(self._prefix + "workers").items():
            self._load_worker(worker.decode(), entry)
        self.snapshots += 1

    def _continues(self) -> bool:
        """False: the server lost its data, or entries that were not read yet."""
        if self._client.get(self._prefix + "epoch") != self._epoch:
            return False
        try:
            info: Mapping[str, Any] = self._client.xinfo_stream(self._prefix + "events")
        except redis.ResponseError:
            return True  # nobody has written yet
        return _order(info.get("max-deleted-entry-id", b"0-0")) <= _order(self._position)

    def _load_worker(self, worker: str, entry: bytes) -> None:
        """Delivers one worker's blocks, or sweeps them out if it has been silent for long."""
        incarnation, _, count = entry.partition(b":")
        place, buckets = Place(worker, int(incarnation)), int(count)
        found = self._client.hmget(f"{self._prefix}w:{worker}", "i", "s")
        if found[0] is None:
            self._sweep(place, entry, buckets)
            return
        if int(found[0]) != place.incarnation:
            return  # a newer one is registering: its reset is in the stream
        seq = int(found[1])
        self._seqs[place] = seq
        reset = True
        for start in range(0, buckets, SNAPSHOT_BUCKETS):
            numbers = range(start, min(buckets, start + SNAPSHOT_BUCKETS))
            with self._client.pipeline(transaction=False) as pipe:
                for number in numbers:
                    pipe.smembers(bucket_key(self._prefix, worker, place.incarnation, number))
                names = [name_of(m) for members in pipe.execute() for m in members]
            self._hand_over(place, BlockChange(seq, reset, names, ()))
            reset = False

    def _sweep(self, place: Place, entry: bytes, buckets: int) -> None:
        """Removes what a worker left behind; one that comes back meanwhile fails the transaction, or writes
        anew."""
        watched = f"{self._prefix}w:{place.worker_id}"
        workers = self._prefix + "workers"
        with self._client.pipeline(transaction=True) as pipe:
            pipe.watch(watched, workers)
            if pipe.exists(watched) or pipe.hget(workers, place.worker_id) != entry:
                return
            pipe.multi()
            keys = [bucket_key(self._prefix, place.worker_id, place.incarnation, n) for n in range(buckets)]
            pipe.unlink(*keys)
            pipe.hdel(workers, place.worker_id)
            pipe.execute()

    def _read(self) -> int:
        """Delivers the next entries; returns how many there were."""
        found = self._client.xread({self._prefix + "events": self._position}, count=READ_ENTRIES)
        entries = found[0][1] if found else []
        for position, fields in entries:
            self._position = position
            try:
                place, change = _parse(fields)
            except (KeyError, ValueError) as error:
                log.debug("an entry of the stream means nothing: %r", error)
                continue
            self._entry(place, change)
        return len(entries)

    def _entry(self, place: Place, change: BlockChange) -> None:
        known = self._seqs.get(place)
        if not change.reset and (known is None or change.seq > known + 1):
            entry = self._client.hget(self._prefix + "workers", place.worker_id)
            if entry is not None:
                self._load_worker(place.worker_id, entry)
            return
        self._seqs[place] = change.seq if change.reset else max(known or 0, change.seq)
        self._hand_over(place, change)

    def _hand_over(self, place: Place, change: BlockChange) -> None:
        while not self._room.acquire(timeout=POLL_S):
            if self._stop.is_set():
                return
        self._deliver(place, change, self._applied)

    def _applied(self) -> None:
        self._room.release()


def _order(position: bytes) -> tuple[int, int]:
    """A stream position as numbers."""
    milliseconds, _, number = position.partition(b"-")
    return int(milliseconds), int(number or 0)


def _parse(fields: Mapping[bytes, bytes]) -> tuple[Place, BlockChange]:
    """Raises `KeyError` or `ValueError` for an entry that none of our workers wrote."""
    place = Place(fields[b"w"].decode(), int(fields[b"i"]))
    stored: Sequence[int] = unpack(fields[b"a"])
    removed: Sequence[int] = unpack(fields[b"d"])
    return place, BlockChange(int(fields[b"s"]), fields[b"r"] == b"1", stored, removed)
