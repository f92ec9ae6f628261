"""What a tenant may use in a minute and at once, and what of it is left.

Requests and tokens flow into buckets that hold a minute's worth and fill evenly. A prompt's tokens are taken when its
request begins, those of the answer when it has ended, for nobody knows their number before: a bucket may go into debt,
and nothing more begins until that is paid. So an answer is never cut by its tenant's limit, and over time the limit
holds exactly.

No clock is read here: `now` is in seconds of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from mesh.errors import RequestError

MAX_WAIT_S = 120.0
"""OpenAI's clients take a longer Retry-After for no answer at all, and do not try again."""
BUSY_WAIT_S = 1.0
"""Nobody knows when one of the running requests ends."""


@dataclass(frozen=True, slots=True)
class Limits:
    """None: as much as they like."""

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrent_requests: int | None = None


class Bucket:
    """Full at first."""

    def __init__(self, name: str, per_minute: int, now: float) -> None:
        self.name = name
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def level(self, now: float) -> float:
        """What is left; below zero: owed."""
        self._level = min(self.per_minute, self._level + (now - self._at) * self.per_minute / 60)
        self._at = now
        return self._level

    def wait(self, amount: float, now: float) -> float:
        """Seconds until so much is there; what is more than the bucket holds may begin when it is full."""
        missing = min(amount, self.per_minute) - self.level(now)
        return max(0.0, missing * 60 / self.per_minute)

    def take(self, amount: float, now: float) -> None:
        self._level = self.level(now) - amount


class Quota:
    """One tenant's. Every `begin` that returns is followed by one `end`."""

    def __init__(self, limits: Limits, now: float) -> None:
        self._limits = limits
        self._running = 0
        self._requests = _bucket("requests", limits.requests_per_minute, now)
        self._tokens = _bucket("tokens", limits.tokens_per_minute, now)

    def begin(self, prompt_tokens: int, now: float) -> None:
        """Raises `RequestError` 429, and then takes nothing."""
        most = self._limits.concurrent_requests
        if most is not None and self._running >= most:
            raise _exceeded(f"{most} requests at once", BUSY_WAIT_S)
        asked = {bucket: amount for bucket, amount in ((self._requests, 1), (self._tokens, prompt_tokens)) if bucket}
        waits = {bucket: bucket.wait(amount, now) for bucket, amount in asked.items()}
        longest = max(waits.values(), default=0.0)
        for bucket, wait in waits.items():
            if wait == longest > 0:
                raise _exceeded(f"{bucket.per_minute} {bucket.name} per minute", wait)
        for bucket, amount in asked.items():
            bucket.take(amount, now)
        self._running += 1

    def end(self, completion_tokens: int, now: float) -> None:
        self._running -= 1
        if self._tokens:
            self._tokens.take(completion_tokens, now)

    def headers(self, now: float) -> Iterator[tuple[str, str]]:
        """OpenAI's `x-ratelimit-*`: the limit, what is left of it, and when it is whole again."""
        for bucket in (self._requests, self._tokens):
            if bucket:
                yield f"x-ratelimit-limit-{bucket.name}", str(bucket.per_minute)
                yield f"x-ratelimit-remaining-{bucket.name}", str(max(0, int(bucket.level(now))))
                yield f"x-ratelimit-reset-{bucket.name}", f"{bucket.wait(bucket.per_minute, now):.3f}s"


def _bucket(name: str, per_minute: int | None, now: float) -> Bucket | None:
    return None if per_minute is None else Bucket(name, per_minute, now)


def _exceeded(limit: str, wait: float) -> RequestError:
    wait = min(wait, MAX_WAIT_S)
    return RequestError(
        429,
        f"This key's limit of {limit} is reached. Please try again in {wait:.1f} s.",
        type="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after=wait,
    )
