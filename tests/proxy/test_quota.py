"""What a tenant may use: buckets that fill evenly, debts that are paid, places that become free."""

from __future__ import annotations

from contextlib import suppress

import pytest

from mesh.errors import RequestError
from proxy.api.quota import Limits, Quota


def refused(quota: Quota, now: float, prompt_tokens: int = 1) -> float:
    """The seconds to wait; fails unless the request is refused."""
    with pytest.raises(RequestError) as failure:
        quota.begin(prompt_tokens, now)
    error = failure.value
    assert (error.status, error.type, error.code) == (429, "rate_limit_error", "rate_limit_exceeded")
    assert error.retry_after is not None
    return error.retry_after


def test_without_limits_nothing_is_refused() -> None:
    quota = Quota(Limits(), 0.0)
    for _ in range(1000):
        quota.begin(10**9, 0.0)
    assert not list(quota.headers(0.0))


def test_a_minutes_requests_may_come_at_once_and_then_one_by_one() -> None:
    quota = Quota(Limits(requests_per_minute=30), 100.0)
    for _ in range(30):
        quota.begin(5, 100.0)
    assert refused(quota, 100.0) == pytest.approx(2.0)
    assert refused(quota, 101.5) == pytest.approx(0.5)
    quota.begin(5, 102.0)
    assert refused(quota, 102.0) == pytest.approx(2.0)


def test_a_bucket_holds_no_more_than_a_minutes_worth() -> None:
    quota = Quota(Limits(requests_per_minute=2), 0.0)
    for _ in range(2):
        quota.begin(1, 1000.0)
    refused(quota, 1000.0)


def test_an_answer_may_leave_a_debt_that_is_paid_before_the_next() -> None:
    quota = Quota(Limits(tokens_per_minute=60), 0.0)
    quota.begin(10, 0.0)
    quota.end(80, 0.0)  # 30 are owed
    assert refused(quota, 0.0, 5) == pytest.approx(35.0)
    assert refused(quota, 34.0, 5) == pytest.approx(1.0)
    quota.begin(5, 35.5)


def test_over_time_the_tokens_are_those_of_the_limit() -> None:
    quota, used = Quota(Limits(tokens_per_minute=600), 0.0), 0
    for second in range(6000):
        with suppress(RequestError):
            quota.begin(20, second)
            quota.end(50, second)
            used += 70
    assert used == pytest.approx(600 * 101, rel=0.01)


def test_a_prompt_larger_than_the_limit_waits_for_a_full_bucket_only() -> None:
    quota = Quota(Limits(tokens_per_minute=60), 0.0)
    quota.begin(90, 0.0)
    assert refused(quota, 0.0, 1000) == pytest.approx(90.0)
    quota.begin(1000, 90.5)
    assert refused(quota, 90.5, 1) == 120.0, "no client waits longer"


def test_a_refused_request_takes_nothing() -> None:
    quota = Quota(Limits(requests_per_minute=2, tokens_per_minute=60), 0.0)
    quota.begin(60, 0.0)
    for _ in range(5):
        refused(quota, 0.0, 30)
    quota.begin(30, 30.5)


def test_so_many_run_at_once() -> None:
    quota = Quota(Limits(concurrent_requests=2), 0.0)
    quota.begin(1, 0.0)
    quota.begin(1, 0.0)
    assert refused(quota, 0.0) == 1.0
    quota.end(10, 0.0)
    quota.begin(1, 0.0)


def test_headers_tell_what_is_left_and_when_it_is_whole() -> None:
    quota = Quota(Limits(requests_per_minute=60, tokens_per_minute=600), 0.0)
    quota.begin(100, 0.0)
    quota.end(50, 0.0)
    assert dict(quota.headers(1.0)) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "60",
        "x-ratelimit-reset-requests": "0.000s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "460",
        "x-ratelimit-reset-tokens": "14.000s",
    }
    quota.begin(600 - 140, 1.0)
    quota.end(10**6, 1.0)
    assert dict(quota.headers(1.0))["x-ratelimit-remaining-tokens"] == "0"
