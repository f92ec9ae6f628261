"""Which workers serve a request: a pure function of a snapshot.

Every decode worker is an option, in one of two ways, and the option with the least cost is taken:

    here      cost = wait + g x (LAMBDA + live)             the prompt's remainder is computed where it is
    decoded remote    cost = wait + wait_P + LAMBDA x g_P + moved   a prefill worker computes it, the blocks
    travel; what other workers have of the prompt's beginning travels to the prefill worker first

`g` is the time to compute the uncached tokens, `live` the requests on the worker that this delays: own wait
plus the delay of others, "join with minimum marginal delay". LAMBDA weighs the time against queues: with it,
a request stays with its cached prefix until the queue there costs several times the recomputation, and caches
do not scatter.

Which of the two ways is not a matter of the same costs alone (an idle decode worker would always compute at
once, and stall the streams that join it): see `_stays`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from proxy.routing.place import Place

LAMBDA = 4.0
"""Flat between 4 and 16 in simulation."""
NOMINAL_TOKENS_PER_S = 10_000.0
"""For a fleet that has not measured anything yet; only ratios matter then."""
SLOT_S = 0.002
"""What one more live request on a decode worker costs: its share of every step, as seconds."""
HANDOFF_S = 0.005
"""Two control hops and a fetch, beside the bytes."""
FULL_S = 1e3
"""A worker without room for the prompt, or without a free sequence, comes last."""
COLD_TOKENS = 2048
"""Uncached tokens from which a prompt goes to a prefill worker while speeds are unknown: half of all requests
of a conversation trace fall below it, with less than 5 % of the prefill work."""
COLD_STEP_SHARE = 4
"""... and at most this fraction of the decode worker's step, so that small (CPU) steps are not filled by
prompts."""
SHORT_TOKENS = 64
"""A remainder below this is one small step of the decode worker: cheaper than a hand-over whatever was measured (and
a worker that computes only such remainders measures a speed that is all overhead)."""
BUSY_KV_SHARE = 0.6
"""A decode worker whose pages are used beyond this takes no long prompts over from a busy prefill pool."""
MAX_HOLDERS = 4
"""Workers that one worker is told to fetch from: more would share what a few bring as soon, and each is a transfer."""
RECOMPUTE_TOKENS = 2048
"""Tokens that a decode worker computes itself when blocks do not arrive, beside those that it was to compute anyway;
above it the request is routed anew."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One worker as the router sees it."""

    place: Place
    decodes: bool
    prefills: bool
    cached_tokens: int
    """Of this prompt's prefix."""
    owed_tokens: int
    """To be computed before it has caught up, assignments under way included."""
    live: int
    """Requests running, waiting or fetching there."""
    max_live: int
    room_tokens: int
    """In pages that are free or only cached."""
    total_tokens: int
    tokens_per_s: float
    """Measured; 0: not yet."""
    step_tokens: int


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator and the model's layout say."""

    disaggregate_above: int = -1
    """Uncached tokens on the decode worker from which a prefill worker is used; -1: by measured cost."""
    transfer_s_per_token: float = 0.0
    fetch_above: int = 256
    """Tokens that another worker must hold beyond the decode worker's own before they are fetched from
    there."""


@dataclass(frozen=True, slots=True)
class Resident:
    """A worker that has the beginning of a prompt."""

    place: Place
    tokens: int
    live: int


@dataclass(frozen=True, slots=True)
class Plan:
    """Where a request goes."""

    decode: Place
    source: Place | None
    """The prefill worker, if one is used."""
    holders: tuple[Resident, ...]
    """Others from which the decode worker fetches."""
    recompute_limit: int
    uncached_tokens: int
    """On the decode worker."""
    computed_tokens: int
    """By the worker that computes the prompt's remainder."""
    cost_s: float
    history: tuple[Resident, ...] = ()
    """From whom the prefill worker first fetches."""


@dataclass(frozen=True, slots=True)
class _Ask:
    """One prompt and the fleet it is offered to."""

    tokens: int
    workers: Sequence[Candidate]
    policy: Policy
    typical: float
    """Tokens per second of a worker that has not measured its own."""

    def seconds(self, tokens: int, worker: Candidate) -> float:
        return tokens / (worker.tokens_per_s or self.typical)

    def wait(self, worker: Candidate) -> float:
        return self.seconds(worker.owed_tokens, worker)

    def uncached(self, worker: Candidate) -> int:
        """The last token is always computed: its logits are wanted."""
        return max(1, self.tokens - worker.cached_tokens)

    def fetch(self, tokens: int) -> float:
        """Seconds until so many tokens' blocks have come from another worker."""
        return HANDOFF_S + tokens * self.policy.transfer_s_per_token

    def pays(self, gain: int, worker: Candidate) -> bool:
        """Fetching so many tokens' blocks beats computing them at `worker`."""
        return gain >= max(1, self.policy.fetch_above) and self.fetch(gain) < self.seconds(gain, worker)

    def moved(self, decode: Candidate) -> float:
        """Seconds for the blocks that the decode worker lacks."""
        return max(0, self.tokens - decode.cached_tokens) * self.policy.transfer_s_per_token


@dataclass(frozen=True, slots=True)
class _Feed:
    """A prefill worker as it would serve one decode worker."""

    worker: Candidate
    history: tuple[Resident, ...]
    work: int
    """Tokens that it computes."""
    fetch_s: float
    """Before it computes."""


def route(tokens: int, workers: Sequence[Candidate], policy: Policy, *, here_only: bool = False) -> Plan | None:
    """The plan for a prompt of `tokens` tokens, or None without a decode worker. Ties go to the first name.

    `here_only`: compute the whole prompt where it is decoded.
    """
    ask = _Ask(tokens, workers, policy, _typical_speed(workers))
    feeder = None if here_only else _best_prefill(ask)
    plans = [_plan(ask, w, feeder, here_only) for w in workers if w.decodes]
    return min(plans, key=lambda p: (p.cost_s, p.decode), default=None)


def cold_threshold(decode: Candidate) -> int:
    """Uncached tokens from which a prompt is disaggregated before speeds are known."""
    return max(1, min(COLD_TOKENS, decode.step_tokens // COLD_STEP_SHARE))


def _typical_speed(workers: Sequence[Candidate]) -> float:
    measured = [w.tokens_per_s for w in workers if w.tokens_per_s > 0]
    return statistics.median(measured) if measured else NOMINAL_TOKENS_PER_S


def _best_prefill(ask: _Ask) -> Candidate | None:
    def cost(w: Candidate) -> tuple[float, Place]:
        full = FULL_S if w.room_tokens < ask.uncached(w) else 0.0
        return ask.wait(w) + LAMBDA * ask.seconds(ask.uncached(w), w) + full, w.place

    return min([w for w in ask.workers if w.prefills], key=cost, default=None)


def _plan(ask: _Ask, decode: Candidate, feeder: Candidate | None, here_only: bool) -> Plan:
    """The better way of using this decode worker."""
    uncached = ask.uncached(decode)
    base = ask.wait(decode) + SLOT_S * decode.live
    if decode.live >= decode.max_live or decode.room_tokens < uncached:
        base += FULL_S
    holder = None if here_only else _holder(ask, decode)
    remainder = uncached if holder is None else ask.uncached(holder)
    feed = None if feeder is None else _feed(ask, decode, feeder)
    if feed is not None and not _stays(ask, decode, feed, remainder):
        worker = feed.worker
        cost = base + ask.wait(worker) + LAMBDA * (feed.fetch_s + ask.seconds(feed.work, worker)) + ask.moved(decode)
        holders = tuple([r for r in _residents(ask, decode) if r.place != worker.place])
        return Plan(decode.place, worker.place, holders, RECOMPUTE_TOKENS, uncached, feed.work, cost, feed.history)
    cost = base + ask.seconds(remainder, decode) * (LAMBDA + decode.live)
    if holder is None:
        return Plan(decode.place, None, (), ask.tokens, uncached, remainder, cost)
    limit = ask.tokens if feeder is None else remainder + RECOMPUTE_TOKENS
    cost += LAMBDA * (HANDOFF_S + ask.moved(decode))  # it occupies the holder and a second cache
    return Plan(decode.place, None, _residents(ask, decode), limit, uncached, remainder, cost)


def _feed(ask: _Ask, decode: Candidate, feeder: Candidate) -> _Feed:
    """What others have of the turns before, best the decode worker, is fetched from them."""
    best = max(ask.workers, key=lambda w: w.cached_tokens)
    gain = best.cached_tokens - feeder.cached_tokens
    if not ask.pays(gain, feeder):
        return _Feed(feeder, (), ask.uncached(feeder), 0.0)
    return _Feed(feeder, _residents(ask, feeder, decode), ask.uncached(best), ask.fetch(gain))


def _holder(ask: _Ask, decode: Candidate) -> Candidate | None:
    """Another worker that holds so much more of the prefix that fetching it beats computing it."""
    best = max(ask.workers, key=lambda w: w.cached_tokens)
    return best if ask.pays(best.cached_tokens - decode.cached_tokens, decode) else None


def _residents(ask: _Ask, fetcher: Candidate, best: Candidate | None = None) -> tuple[Resident, ...]:
    """Those that have enough more than `fetcher` to be asked for it: who has most first, and of equals `best`."""
    worth = fetcher.cached_tokens + max(1, ask.policy.fetch_above)
    found = [w for w in ask.workers if w.cached_tokens >= worth]
    found.sort(key=lambda w: (-w.cached_tokens, w is not best, w.owed_tokens, w.place))
    return tuple([Resident(w.place, w.cached_tokens, w.live) for w in found[:MAX_HOLDERS]])


def _stays(ask: _Ask, decode: Candidate, feed: _Feed, remainder: int) -> bool:
    """Whether the remainder of a prompt is computed on the decode worker itself.

    By measured cost: computing it there takes `g` and stalls the worker's streams (at least the one that a
    busy moment brings) for as long; the other way waits for the prefill worker, its computation and the
    hand-over.
    """
    if ask.policy.disaggregate_above >= 0:
        return ask.uncached(decode) < ask.policy.disaggregate_above
    cold = cold_threshold(decode)
    if remainder < min(cold, SHORT_TOKENS):
        return True
    feeder = feed.worker
    if decode.tokens_per_s <= 0 or feeder.tokens_per_s <= 0:
        return remainder < cold
    if remainder >= cold and decode.room_tokens < (1 - BUSY_KV_SHARE) * decode.total_tokens:
        return False
    here = ask.wait(decode) + ask.seconds(remainder, decode) * (1 + max(1, decode.live))
    there = ask.wait(feeder) + feed.fetch_s + ask.seconds(feed.work, feeder) + HANDOFF_S + ask.moved(decode)
    return here <= there
