"""From what the proxy knows of its workers to a plan for one prompt, and the load that the plan adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set

from proxy.routing.place import Place
from proxy.routing.pool import Worker, WorkerPool
from proxy.routing.residency import ResidencyIndex
from proxy.routing.router import Candidate, Plan, Policy, route

TRANSFER_BYTES_PER_S = 1e9
"""What the slowest of our transports moves between two processes of one host; only used to compare with
computing."""


class Placement:
    """The router's view of the fleet."""

    def __init__(self, pool: WorkerPool, index: ResidencyIndex, disaggregate_above: int) -> None:
        self._pool = pool
        self._index = index
        self._disaggregate_above = disaggregate_above

    def plan(
        self,
        tokens: int,
        names: Callable[[int], Sequence[int]],
        *,
        exclude: Set[Place] = frozenset(),
        only: Place | None = None,
        here_only: bool = False,
    ) -> Plan | None:
        """Where a prompt of `tokens` tokens goes; None: no decode worker can be asked.

        `names`: of the prompt's full blocks, where a block has so many tokens. `exclude`: workers not to ask. `only`:
        the one decode worker to ask, if it can be. `here_only`: as in `route`.
        """
        workers = [w for w in self._pool.routable() if w.place not in exclude]
        if only is not None and any(w.place == only for w in workers):
            workers = [w for w in workers if w.place == only]
        # The names of one size are of no worker with another.
        resident = {size: self._index.longest(names(size)) for size in self._pool.block_sizes}
        candidates = [_candidate(w, resident[w.info.layout.block_tokens].get(w.place, 0)) for w in workers]
        policy = Policy(self._disaggregate_above, self._pool.token_bytes / TRANSFER_BYTES_PER_S)
        return route(tokens, candidates, policy, here_only=here_only)

    def commit(self, request: str, plan: Plan, now: float) -> None:
        """Counts the plan as load until the workers' own beats do."""
        decode = self._pool.get(plan.decode)
        feeder = self._pool.get(plan.source) if plan.source is not None else None
        if decode is not None:
            decode.assign(request, 0 if feeder is not None else plan.computed_tokens, now)
        if feeder is not None:
            feeder.assign(request, plan.computed_tokens, now)

    def predicted_load(self) -> tuple[int, float]:
        """(tokens owed by the fleet, tokens per second it computes), for what it says when it is full."""
        owed = sum([w.load.owed_tokens for w in self._pool.routable()])
        return owed, sum([w.load.prefill_tokens_per_s for w in self._pool.routable()])


def _candidate(worker: Worker, cached_blocks: int) -> Candidate:
    info, load = worker.info, worker.load
    requests, tokens = worker.pending
    block = info.layout.block_tokens
    free = (load.free_blocks + load.cached_blocks) * block if worker.beaten else info.total_blocks * block
    return Candidate(
        place=worker.place,
        decodes=worker.decodes,
        prefills=worker.prefills,
        cached_tokens=cached_blocks * block,
        owed_tokens=load.owed_tokens + tokens,
        live=load.running + load.waiting + load.fetching + requests,
        max_live=info.max_num_seqs,
        room_tokens=max(0, free - tokens),
        total_tokens=info.total_blocks * block,
        tokens_per_s=load.prefill_tokens_per_s,
        step_tokens=info.max_num_batched_tokens,
    )
