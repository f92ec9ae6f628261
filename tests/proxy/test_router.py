"""Routing decisions, admission and the pool's bookkeeping: pure functions of what is passed in."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import permutations

import pytest

from mesh.messages import Beat, Load
from proxy.choice_events import Absence
from proxy.routing import admission
from proxy.routing.admission import RETRY_FLOOR, RETRY_WINDOW_S, RetryBudget
from proxy.routing.place import Place
from proxy.routing.pool import BEAT_TIMEOUT_S, MAX_STEP_BOUND_S, OPTIMISM_S, REVIVE_AFTER_S, WorkerPool
from proxy.routing.router import RECOMPUTE_TOKENS, Candidate, Plan, Policy, Resident, cold_threshold, route
from tests.proxy.fake_worker import IDLE, info

BASE = Candidate(
    place=Place("", 1),
    decodes=False,
    prefills=False,
    cached_tokens=0,
    owed_tokens=0,
    live=0,
    max_live=64,
    room_tokens=100_000,
    total_tokens=100_000,
    tokens_per_s=0.0,
    step_tokens=512,
)
AUTO = Policy(-1, 1e-6)


def decode(name: str, **more: object) -> Candidate:
    return replace(BASE, place=Place(name, 1), decodes=True, **more)  # type: ignore[arg-type]


def prefill(name: str, **more: object) -> Candidate:
    return replace(BASE, place=Place(name, 1), prefills=True, **more)  # type: ignore[arg-type]


def plan(tokens: int, *workers: Candidate, policy: Policy = AUTO, here_only: bool = False) -> Plan:
    result = route(tokens, workers, policy, here_only=here_only)
    assert result is not None
    return result


def test_without_a_decode_worker_there_is_no_plan() -> None:
    assert route(10, [prefill("p0")], AUTO) is None
    assert route(10, [], AUTO) is None


def test_without_prefill_workers_the_prompt_is_computed_where_it_is_decoded() -> None:
    result = plan(100_000, decode("d0"))
    assert (result.source, result.holders) == (None, ())
    assert result.recompute_limit >= 100_000


@pytest.mark.parametrize(("tokens", "remote"), [(127, False), (128, True), (129, True)])
def test_short_remainders_stay_while_speeds_are_unknown(tokens: int, remote: bool) -> None:
    assert cold_threshold(decode("d0")) == 128
    result = plan(tokens, decode("d0"), prefill("p0"))
    assert result.source == (Place("p0", 1) if remote else None)


def test_the_cold_threshold_is_bounded_for_large_steps() -> None:
    assert cold_threshold(decode("d0", step_tokens=8192)) == 2048
    assert cold_threshold(decode("d0", step_tokens=1 << 20)) == 2048
    assert cold_threshold(decode("d0", step_tokens=1)) == 1


def test_only_uncached_tokens_count() -> None:
    result = plan(1000, decode("d0", cached_tokens=960), prefill("p0"))
    assert result.source is None
    assert result.uncached_tokens == 40


@pytest.mark.parametrize(("above", "remote"), [(0, True), (99, True), (100, True), (101, False), (10**9, False)])
def test_a_fixed_threshold_is_obeyed(above: int, remote: bool) -> None:
    fast = {"tokens_per_s": 1e6}
    result = plan(100, decode("d0", **fast), prefill("p0", **fast), policy=Policy(above))
    assert (result.source is not None) is remote


def test_a_fully_cached_prompt_still_goes_through_both_pools_at_threshold_zero() -> None:
    assert plan(100, decode("d0", cached_tokens=100), prefill("p0"), policy=Policy(0)).source == Place("p0", 1)


def test_measured_speeds_keep_short_and_send_long_remainders() -> None:
    workers = decode("d0", tokens_per_s=20_000.0), prefill("p0", tokens_per_s=20_000.0)
    assert plan(50, *workers).source is None
    assert plan(2000, *workers).source is not None


def test_a_very_short_remainder_stays_whatever_speeds_were_measured() -> None:
    slow = decode("d0", cached_tokens=1088, tokens_per_s=500.0)
    assert plan(1100, slow, prefill("p0", cached_tokens=1088, tokens_per_s=50_000.0)).source is None


def test_a_busy_prefill_pool_leaves_prompts_to_decode_workers_with_room() -> None:
    d = decode("d0", tokens_per_s=20_000.0)
    p = prefill("p0", tokens_per_s=20_000.0, owed_tokens=200_000)
    assert plan(2000, d, p).source is None
    assert plan(2000, replace(d, room_tokens=30_000), p).source is not None


def test_here_only_means_here() -> None:
    result = plan(5000, decode("d0"), prefill("p0", cached_tokens=4000), policy=Policy(0), here_only=True)
    assert result.source is None


def test_the_prefill_worker_with_the_prefix_wins_until_its_queue_is_long() -> None:
    speeds = {"tokens_per_s": 10_000.0}
    idle = prefill("p0", **speeds)
    warm = prefill("p1", cached_tokens=6000, owed_tokens=3000, **speeds)
    d = decode("d0", **speeds)
    no_fetch = Policy(-1, 1e-6, fetch_above=10**9)
    assert plan(8000, d, idle, warm, policy=no_fetch).source == warm.place
    assert plan(8000, d, idle, replace(warm, owed_tokens=40_000), policy=no_fetch).source == idle.place


def test_the_decode_worker_with_the_prefix_wins_until_it_is_loaded() -> None:
    warm, idle = decode("d1", cached_tokens=900, live=1), decode("d0")
    assert plan(1000, warm, idle).decode == warm.place
    assert plan(1000, replace(warm, owed_tokens=50_000, live=60), idle).decode == idle.place


def test_full_workers_come_last() -> None:
    assert plan(100, decode("d0", live=64, cached_tokens=90), decode("d1", live=63)).decode == Place("d1", 1)
    assert plan(100, decode("d0", room_tokens=50), decode("d1", live=60)).decode == Place("d1", 1)


def test_blocks_that_another_worker_holds_are_fetched_instead_of_computed() -> None:
    result = plan(4000, decode("d0"), decode("d1", cached_tokens=3990, live=64))
    assert (result.decode, result.source) == (Place("d0", 1), None)
    assert result.holders == (Resident(Place("d1", 1), 3990, 64),)
    assert result.computed_tokens == 10
    few = plan(4000, decode("d0"), decode("d1", cached_tokens=100, live=64))
    assert few.holders == ()


def test_a_prefill_worker_fetches_the_history_that_the_decode_worker_has() -> None:
    d, p = decode("d0", cached_tokens=6000), prefill("p0", cached_tokens=500)
    result = plan(9000, d, p)
    assert (result.source, result.holders) == (p.place, ())
    assert result.history == (Resident(d.place, 6000, 0),)
    assert (result.computed_tokens, result.uncached_tokens) == (3000, 3000)


@pytest.mark.parametrize(
    ("cached", "policy"),
    [(700, AUTO), (6000, Policy(-1, 1.0)), (6000, Policy(-1, 1e-6, fetch_above=10**9))],
    ids=["too little", "slower than computing", "not wanted"],
)
def test_a_history_that_does_not_pay_is_computed(cached: int, policy: Policy) -> None:
    result = plan(9000, decode("d0", cached_tokens=cached), prefill("p0", cached_tokens=500), policy=policy)
    assert result.source is not None
    assert (result.history, result.computed_tokens) == ((), 8500)


def places(residents: tuple[Resident, ...]) -> list[str]:
    return [r.place.worker_id for r in residents]


def test_a_history_is_fetched_from_all_who_have_much_of_it_the_longest_first() -> None:
    d, p = decode("d0", cached_tokens=2000), prefill("p0")
    full, twin = decode("d1", cached_tokens=6000, live=64), decode("d2", cached_tokens=2000, live=64)
    little = decode("d3", cached_tokens=255, live=64)
    result = plan(9000, d, p, full, twin, little)
    assert (result.decode, result.computed_tokens) == (d.place, 3000)
    assert result.history == (
        Resident(full.place, 6000, 64),
        Resident(d.place, 2000, 0),  # before its equals: it is nearest to what follows
        Resident(twin.place, 2000, 64),
    )
    assert plan(9000, d, prefill("p0", cached_tokens=6000), full).history == ()


def test_a_decode_worker_fetches_from_others_what_the_prefill_worker_need_not_send() -> None:
    d, p = decode("d0", cached_tokens=500), prefill("p0", cached_tokens=6000)
    others = [decode("d1", cached_tokens=6000, live=64), decode("d2", cached_tokens=600, live=64)]
    result = plan(9000, d, p, *others)
    assert (result.decode, result.source, places(result.holders)) == (d.place, p.place, ["d1"])


def test_holders_are_few() -> None:
    others = [decode(f"d{i}", cached_tokens=3000 + i, live=64) for i in range(1, 9)]
    assert places(plan(4000, decode("d0"), *others).holders) == ["d8", "d7", "d6", "d5"]
    assert places(plan(9000, decode("d0"), prefill("p0"), *others).history) == ["d8", "d7", "d6", "d5"]


def test_a_worker_is_not_told_of_itself() -> None:
    """Also where a policy lets it fetch whatever little it lacks."""
    policy = Policy(-1, 1e-6, fetch_above=0)
    result = plan(9000, decode("d0", cached_tokens=9000), prefill("p0", cached_tokens=8000), policy=policy)
    assert result.decode.worker_id not in places(result.holders)
    if result.source is not None:
        assert result.source.worker_id not in places(result.history)


def test_a_history_makes_the_prefill_worker_quicker_in_the_comparison_too() -> None:
    """Without it a prefill worker that lacks everything would take longer than the decode worker with its streams."""
    speed = {"tokens_per_s": 10_000.0}
    d, p = decode("d0", cached_tokens=8000, live=3, **speed), prefill("p0", **speed)
    assert plan(9000, d, p).history == (Resident(d.place, 8000, 3),)
    assert plan(9000, d, p, policy=Policy(-1, 1e-6, fetch_above=10**9)).source is None


def test_slow_transfers_are_not_preferred_to_computing() -> None:
    result = plan(4000, decode("d0"), decode("d1", cached_tokens=3990, live=64), policy=Policy(-1, 1.0))
    assert (result.source, result.holders) == (None, ())


def test_a_hand_over_is_limited_in_what_may_be_recomputed() -> None:
    assert plan(9000, decode("d0"), prefill("p0")).recompute_limit == RECOMPUTE_TOKENS


def test_what_no_holder_has_is_no_recomputation() -> None:
    fast = {"tokens_per_s": 1e5}
    d, other = decode("d0", **fast), decode("d1", cached_tokens=4000, live=64, **fast)
    result = plan(9000, d, other, prefill("p0", owed_tokens=10**9, **fast))
    assert (result.decode, result.source, result.computed_tokens) == (d.place, None, 5000)
    assert result.recompute_limit == 5000 + RECOMPUTE_TOKENS


def test_ties_go_to_the_first_name_whatever_the_order() -> None:
    workers = [decode("d0"), decode("d1"), decode("d2"), prefill("p0"), prefill("p1")]
    for order in permutations(workers):
        result = route(5000, order, AUTO)
        assert result is not None
        assert (result.decode, result.source) == (Place("d0", 1), Place("p0", 1))


def test_random_fleets_get_plans_that_make_sense() -> None:
    rng = random.Random(7)
    for _ in range(500):
        tokens = rng.randint(1, 20_000)
        fleet = [
            replace(
                decode(f"d{i}") if rng.random() < 0.5 else prefill(f"p{i}"),
                cached_tokens=rng.randint(0, tokens),
                owed_tokens=rng.randint(0, 50_000),
                live=rng.randint(0, 80),
                tokens_per_s=rng.choice((0.0, rng.uniform(100, 50_000))),
            )
            for i in range(rng.randint(1, 8))
        ]
        result = route(tokens, fleet, Policy(rng.choice((-1, 0, 500)), rng.uniform(0, 1e-4)))
        by_place = {w.place: w for w in fleet}
        if result is None:
            assert not any(w.decodes for w in fleet)
            continue
        assert by_place[result.decode].decodes
        assert 1 <= result.computed_tokens <= tokens
        if result.source is not None:
            assert by_place[result.source].prefills
        told = [r.place for r in result.holders]
        assert result.decode not in told
        assert result.source not in told
        assert result.source not in [r.place for r in result.history]


def test_the_retry_budget_is_a_share_of_the_requests() -> None:
    budget = RetryBudget()
    for _ in range(50):
        budget.request(0.0)
    granted = sum(budget.spend(1.0, ask=True) for _ in range(100))
    assert granted == RETRY_FLOOR + 5
    assert not budget.spend(1.0, ask=True)
    assert budget.spend(1.0, ask=False)
    assert budget.spend(1.1 + RETRY_WINDOW_S, ask=True)


@pytest.mark.parametrize(("owed", "speed", "after"), [(0, 0.0, 1), (5000, 1000.0, 5), (10**9, 1.0, 30)])
def test_a_full_server_says_when_to_come_back(owed: int, speed: float, after: int) -> None:
    assert admission.overloaded(9, 10, owed, speed) is None
    refusal = admission.overloaded(10, 10, owed, speed)
    assert refusal is not None
    assert (refusal.status, refusal.code, refusal.retry_after) == (503, "overloaded", after)


def pool_of(*infos: tuple[str, str], now: float = 0.0) -> WorkerPool:
    pool = WorkerPool()
    for name, role in infos:
        assert pool.register(info(name, role), now).accepted
    return pool


def test_silence_is_measured_by_the_announced_step() -> None:
    pool = WorkerPool()
    pool.register(info("d0", "decode", step_bound_s=10.0), 0.0)
    pool.register(info("d1", "decode", step_bound_s=0.1), 0.0)
    pool.register(info("d2", "decode", step_bound_s=1e9), 0.0)
    assert pool.overdue(BEAT_TIMEOUT_S) == []
    assert pool.overdue(BEAT_TIMEOUT_S + 0.1) == [Place("d1", 1)]
    assert pool.overdue(10.1) == [Place("d0", 1), Place("d1", 1)]
    assert len(pool.overdue(MAX_STEP_BOUND_S + 0.1)) == 3


def test_beats_sent_before_a_death_do_not_revive() -> None:
    pool = pool_of(("d0", "decode"))
    place = Place("d0", 1)
    assert pool.silence(place, 5.0)
    assert not pool.beat(place, Beat(1, False, IDLE), 5.0 + REVIVE_AFTER_S / 2)
    assert not pool.ready
    assert pool.beat(place, Beat(1, False, IDLE), 5.0 + REVIVE_AFTER_S)
    assert pool.ready


def test_draining_is_for_good() -> None:
    pool = pool_of(("d0", "decode"))
    place = Place("d0", 1)
    pool.beat(place, Beat(1, True, IDLE), 1.0)
    pool.beat(place, Beat(2, False, IDLE), 2.0)
    assert not pool.ready
    assert pool.absence(2.0) is Absence.RETURNING


def test_absence_says_whether_to_wait() -> None:
    pool = pool_of(("p0", "prefill"))
    assert pool.absence(0.0) is Absence.NONE
    pool.register(info("d0", "decode"), 0.0)
    assert pool.absence(0.0) is Absence.HELD
    pool.forget(Place("d0", 1), 1.0)
    assert pool.absence(2.0) is Absence.RETURNING
    assert pool.absence(1000.0) is Absence.NONE


def test_assignments_count_until_a_beat_must_know_them() -> None:
    pool = pool_of(("d0", "decode"))
    worker = pool.get(Place("d0", 1))
    assert worker is not None
    worker.assign("a", 100, 0.0)
    worker.assign("b", 10, OPTIMISM_S)
    assert worker.pending == (2, 110)
    pool.beat(worker.place, Beat(1, False, replace(IDLE, owed_tokens=100)), OPTIMISM_S)
    assert worker.pending == (1, 10)
    worker.settle("b")
    assert worker.pending == (0, 0)
    assert worker.load == Load(0, 0, 0, 0, 100, 0, 0, 100, 0.0)


def test_an_unknown_role_is_refused() -> None:
    outcome = WorkerPool().register(info("x", "oracle"), 0.0)
    assert not outcome.accepted
    assert "oracle" in outcome.reason


def test_the_shortest_context_is_what_the_fleet_serves() -> None:
    pool = WorkerPool()
    pool.register(info("d0", "decode", max_model_len=100), 0.0)
    pool.register(info("d1", "decode", max_model_len=50), 0.0)
    assert pool.model is not None
    assert pool.model.max_model_len == 50
    pool.forget(Place("d1", 1), 1.0)
    assert pool.model.max_model_len == 100
