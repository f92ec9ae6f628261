"""Mistakes that production does not make, one at a time: each must be caught, or a check or a fault is missing.

A mutant is a name, what it gets wrong, and the attributes that it replaces.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import engine.cache.request_blocks
import kvtransfer.fetcher
import kvtransfer.holder
import kvtransfer.holding
import kvtransfer.holding_state
import proxy.lifecycle
import proxy.routing.pool
import worker.role
from decode.role import DecodeRole
from engine.cache.block_pool import BlockPool
from engine.cache.in_flight import InFlight
from engine.cache.prefix_index import PrefixIndex
from engine.cache.request_blocks import RequestBlocks
from engine.cache.tails import Tails
from engine.engine import Engine
from engine.fetching import Fetching as EngineFetching
from engine.request import RequestState
from engine.scheduler import Scheduler
from engine.sim_engine import SimRunner
from kvtransfer import fetching, gathering, holding, planning, serving
from kvtransfer import fetching_state as fs
from kvtransfer import holding_state as hs
from kvtransfer.events import Noted
from kvtransfer.fetcher import Fetcher
from kvtransfer.gatherer import Gatherer
from kvtransfer.gathering import Gathering
from kvtransfer.holder import Holder
from kvtransfer.messages import AbortFetch, Confirm, Credit, Missing
from mesh import wire
from mesh.messages import TokenBatch
from prefill.role import PrefillRole
from proxy import lifecycle
from proxy.choice_events import NeedRoute, SendAbort
from proxy.dispatcher import MeshDispatcher
from proxy.fleet import Fleet
from proxy.lifecycle import Phase
from proxy.routing.pool import WorkerPool
from proxy.running import Choice
from worker.links import ProxyLink
from worker.steploop import StepLoop

Change = tuple[Any, str, Any]


@dataclass(frozen=True, slots=True)
class Mutant:
    name: str
    changes: tuple[Change, ...]


MUTANTS: dict[str, Mutant] = {}


def mutant(*targets: tuple[Any, str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """The decorated function replaces `targets`; it gets the original as its first argument."""

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        changes = []
        for owner, attribute in targets:
            changes.append((owner, attribute, _around(vars(owner)[attribute], function)))
        name = function.__name__
        MUTANTS[name] = Mutant(name.replace("_", " "), tuple(changes))
        return function

    return register


def _around(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *arguments, **named: function(original, *arguments, **named)


def constant(name: str, *changes: Change) -> None:
    MUTANTS[name] = Mutant(name.replace("_", " "), changes)


def _nothing(*_: Any, **__: Any) -> None:
    return None


# The two sides of a transfer.


@mutant((kvtransfer.fetcher, "is_intact"))
def no_digest_check(original: Any, *arguments: Any) -> bool:
    return True


@mutant((kvtransfer.fetcher, "unseal"), (kvtransfer.holder, "unseal"))
def no_seal_check(original: Any, frame: Any) -> Any:
    return wire.decode(bytes(frame)[:-8])


@mutant((fetching, "_blocks_in"))
def duplicate_block_accepted(original: Any, state: Any, event: Any, now: float) -> Any:
    after, effects = original(state, event, now)
    transfer = state.transfers.get(event.transfer_id)
    again = [
        fs.Deliver(event.transfer_id, b.index, b.payload)
        for b in event.blocks
        if transfer is not None and b.intact and b.index in transfer.wanted and not transfer.pending >> b.index & 1
    ]
    return after, [*again, *effects]


@mutant((fetching, "_note"))
def note_accepted_twice(original: Any, state: Any, transfer: Any, note: Any, now: float) -> Any:
    return original(state, replace(transfer, notes=note.seq), note, now)


@mutant((fetching, "_received"))
def missing_not_believed(original: Any, state: Any, event: Any, now: float) -> Any:
    return (state, []) if isinstance(event.message, Missing) else original(state, event, now)


@mutant((fetching, "_refetch"))
def lost_block_not_asked_for_again(original: Any, state: Any, transfer: Any, mask: int, *rest: Any) -> Any:
    return original(state, replace(transfer, retried=transfer.retried | mask), mask, *rest)


@mutant((fetching, "_repair"))
def forgotten_transfer_not_repaired(original: Any, state: Any, transfer: Any, now: float) -> Any:
    return fetching._put(state, transfer), []


@mutant((fetching, "_stand"))
def standing_ignored(original: Any, state: Any, transfer: Any, stand: Any, left: float, now: float) -> Any:
    return fetching._put(state, fetching._heard(transfer, stand, now)), []


@mutant((fetching, "_stand"))
def refetch_assumed_to_arrive(original: Any, state: Any, transfer: Any, stand: Any, left: float, now: float) -> Any:
    return original(state, transfer, stand, -math.inf, now)


@mutant((Fetcher, "_send"))
def confirm_not_sent(original: Any, fetcher: Any, link: Any, message: Any) -> None:
    if not isinstance(message, Confirm):
        original(fetcher, link, message)


@mutant((Fetcher, "_send"))
def credit_not_sent(original: Any, fetcher: Any, link: Any, message: Any) -> None:
    if not isinstance(message, Credit):
        original(fetcher, link, message)


@mutant((Fetcher, "abort"))
def fetch_abort_lost(original: Any, fetcher: Any, transfer_id: bytes) -> None:
    """The role gives a transfer up, the endpoint goes on."""


@mutant((Fetcher, "_send"))
def aborted_fetch_not_told(original: Any, fetcher: Any, link: Any, message: Any) -> None:
    if not isinstance(message, AbortFetch):
        original(fetcher, link, message)


@mutant((fetching, "_tick"))
def fetch_without_deadline(original: Any, state: Any, now: float) -> Any:
    return original(state, min(now, state.leased_from))


@mutant((serving, "_send_ready"))
def credit_leak(original: Any, one: Any, effects: Any) -> Any:
    after = original(replace(one, granted=one.sent + len(one.ready)), effects)
    return replace(after, granted=one.granted)


@mutant((serving, "_send_ready"))
def sent_block_still_owed(original: Any, one: Any, effects: Any) -> Any:
    return replace(original(one, effects), owed=one.owed)


@mutant((kvtransfer.holding, "take"))
def wrong_block_of_the_right_request(original: Any, one: Any, blocks: Any, depth: int) -> Any:
    payloads = [p for _, p in blocks]
    return original(one, list(zip([i for i, _ in blocks], payloads[1:] + payloads[:1], strict=True)), depth)


@mutant((kvtransfer.holding, "take"))
def absent_block_forgotten(original: Any, one: Any, blocks: Any, depth: int) -> Any:
    return original(one, [(i, p) for i, p in blocks if p is not None], depth)


@mutant((holding, "_close"))
def stream_never_closed(original: Any, state: Any, *_: Any) -> Any:
    return state


@mutant((holding, "_give_note"))
def note_not_kept(original: Any, state: Any, event: Any, effects: Any) -> Any:
    after = original(state, event, effects)
    servings = {k: replace(s, notes=()) for k, s in after.servings.items()}
    return replace(after, streams={n: replace(s, notes=()) for n, s in after.streams.items()}, servings=servings)


@mutant((holding, "_end"))
def stream_not_released(original: Any, state: Any, one: Any, reason: str, now: float, effects: list[Any]) -> Any:
    mine: list[Any] = []
    after = original(state, one, reason, now, mine)
    effects += [e for e in mine if not isinstance(e, hs.Released)]
    return after


@mutant((holding, "_fetch"))
def repeated_fetch_owed_again(original: Any, state: Any, event: Any, fetch: Any, now: float, effects: Any) -> Any:
    known = state.servings.get((event.link, fetch.transfer_id))
    if known is not None:
        state = replace(state, servings={**state.servings, known.key: replace(known, round=-1)})
    return original(state, event, fetch, now, effects)


@mutant((holding, "_renewed"))
def renewal_unanswered(original: Any, state: Any, *_: Any) -> Any:
    return state


@mutant((Holder, "_finish"))
def slots_not_reclaimed(original: Any, holder: Any, key: Any) -> None:
    holder._parcels.pop(key, None)


@mutant((Holder, "_post"))
def digest_of_other_bytes(original: Any, holder: Any, parcel: Any) -> None:
    """A page is sent that was overwritten meanwhile, and digested after that."""
    parcel.blocks = [(w, bytes(reversed(bytes(p)))) for w, p in parcel.blocks]
    original(holder, parcel)


# One fetch over several holders.


@mutant((gathering, "ended"))
def left_blocks_asked_of_nobody(
    original: Any, state: Any, number: int, asked: int, missing: int, *, failed: bool
) -> Any:
    return original(state, number, asked & ~missing, missing, failed=failed)


def _claims_kept(before: Any, after: Any) -> Any:
    pairs = zip(before.sources, after.sources, strict=True)
    return replace(after, sources=tuple(replace(now, has=was.has) for was, now in pairs))


@mutant((gathering, "ended"))
def failed_holder_asked_again(original: Any, state: Any, *arguments: Any, failed: bool) -> Any:
    after = original(state, *arguments, failed=failed)
    return _claims_kept(state, after) if failed else after


@mutant((gathering, "ended"))
def stale_claim_believed_again(original: Any, state: Any, *arguments: Any, failed: bool) -> Any:
    after = original(state, *arguments, failed=failed)
    return after if failed else _claims_kept(state, after)


@mutant((gathering, "ended"))
def block_that_is_here_fetched_again(
    original: Any, state: Any, number: int, asked: int, missing: int, *, failed: bool
) -> Any:
    return replace(original(state, number, asked, missing, failed=failed), wanted=state.wanted)


@mutant((gathering, "stopped"))
def ended_fetch_asks_on(original: Any, state: Any) -> Any:
    return state


@mutant((planning, "_groups"))
def block_asked_of_one_without_it(original: Any, wanted: int, lanes: Any) -> Any:
    groups = original(wanted, lanes)
    return [(tuple(range(len(lanes))), mask) for _, mask in groups]


@mutant((Gatherer, "told"))
def every_part_passes_on_the_note(original: Any, gatherer: Any, event: Any) -> Any:
    part = gatherer._parts.get(event.transfer_id) if isinstance(event, Noted) else None
    return original(gatherer, event) if part is None else (replace(event, transfer_id=part.gather.transfer_id),)


@mutant((Gatherer, "settle"))
def fetch_over_with_its_first_part(original: Any, gatherer: Any) -> Any:
    for gather in gatherer._unsettled:
        gather.parts.clear()
    return original(gatherer)


@mutant((Gatherer, "abort"))
def only_one_part_aborted(original: Any, gatherer: Any, transfer_id: bytes) -> None:
    gather = gatherer._gathers.get(transfer_id)
    if gather is not None:
        kept, gather.parts = gather.parts[1:], gather.parts[:1]
        original(gatherer, transfer_id)
        gather.parts.extend(kept)


constant("blocks_of_two_holders_asked_of_both", (Gathering, "open", property(lambda state: state.wanted)))


constant("lease_never_expires", (kvtransfer.holding, "LEASE_TTL_S", math.inf))
constant("lease_expires_early", (kvtransfer.holding, "LEASE_TTL_S", 0.3))
constant("unclaimed_stream_kept", (kvtransfer.holding_state, "UNCLAIMED_S", math.inf))


# The engine and its pages.


@mutant((RequestBlocks, "seal"))
def seal_skipped(original: Any, blocks: Any, request: Any) -> None:
    return None


@mutant((RequestBlocks, "seal"))
def published_before_written(original: Any, blocks: Any, request: Any) -> None:
    computed = request.num_computed_tokens
    full = min(len(request.block_table), len(request.tokens) // blocks.block_tokens)
    request.num_computed_tokens = full * blocks.block_tokens
    original(blocks, request)
    request.num_computed_tokens = computed


@mutant((RequestBlocks, "owe_last"))
def sealed_page_written_again(original: Any, blocks: Any, request: Any) -> None:
    request.num_computed_tokens = min(request.num_computed_tokens, len(request.tokens) - 1)


@mutant((SimRunner, "write_block"))
def fetched_block_not_written(original: Any, runner: Any, block: int, payload: Any) -> None:
    return None


@mutant((SimRunner, "read_block"))
def tail_sent_with_what_lies_behind(original: Any, runner: Any, block: int, valid_tokens: int) -> Any:
    return original(runner, block, runner.layout.block_tokens)


@mutant((EngineFetching, "_page"))
def tail_taken_for_a_full_block(original: Any, one: Any, missing: Any, payload: Any) -> Any:
    return original(one, replace(missing, valid_tokens=one._blocks.block_tokens), payload)


@mutant((SimRunner, "write_parts"))
def fetched_parts_not_written(original: Any, runner: Any, payload: Any, theirs: Any, parts: Any) -> None:
    return None


@mutant((EngineFetching, "_note"))
def part_taken_for_a_whole_block(original: Any, one: Any, request: Any, missing: Any, piece: Any) -> None:
    marks = one._written[request.key].get(missing.index)
    if marks is not None:
        marks[:] = True
    original(one, request, missing, piece)


@mutant((EngineFetching, "begin"))
def cached_blocks_not_pinned(original: Any, one: Any, request: Any, theirs: Any) -> Any:
    missing = original(one, request, theirs)
    one._blocks._release_fetched(request)
    one._blocks._note(request)
    return missing


@mutant((EngineFetching, "give_up"))
def fetch_goes_on_after_preemption(original: Any, one: Any, request: Any) -> None:
    one._blocks.drop(request)


@mutant((BlockPool, "release"))
def page_leaked(original: Any, pool: Any, block: int) -> None:
    original(pool, block)
    if pool._free and pool._free[-1] == block:
        pool._free.pop()


@mutant((BlockPool, "find"))
def found_page_not_referenced(original: Any, pool: Any, name: bytes) -> Any:
    return pool.index.lookup(name)


@mutant((PrefixIndex, "forget"))
def evicted_page_keeps_its_name(original: Any, index: Any, block: int) -> None:
    return None


@mutant((Tails, "leave"))
def tail_outlives_its_page(original: Any, tails: Any, request: Any) -> None:
    return None


@mutant((InFlight, "leave"))
def awaited_block_never_comes(original: Any, in_flight: Any, request: Any) -> None:
    return None


@mutant((engine.cache.request_blocks, "block_hash"))
def name_without_its_parent(original: Any, parent: bytes, tokens: Any) -> Any:
    return original(b"root", tokens)


@mutant((Scheduler, "preempt"))
def preempted_pages_kept(original: Any, scheduler: Any, request: Any) -> None:
    table = list(request.block_table)
    original(scheduler, request)
    request.block_table.extend(table)


@mutant((Engine, "release"))
def held_request_not_released(original: Any, one: Any, key: str) -> None:
    return None


@mutant((Engine, "abort"))
def pin_not_released(original: Any, one: Any, key: str) -> None:
    request = one._requests.get(key)
    if request is not None and request.state is not RequestState.FETCHING:
        original(one, key)


@mutant((Engine, "ready"))
def first_token_forgotten(original: Any, one: Any, key: str, new_tokens: Any = ()) -> Any:
    return original(one, key, tuple(t + 1 for t in new_tokens))


# Roles and the step loop.


@mutant((StepLoop, "_abort"))
def abort_lost_in_the_loop(original: Any, loop: Any, key: str) -> None:
    return None


@mutant((StepLoop, "_export"))
def export_unanswered(original: Any, loop: Any, stream: str, names: Any) -> None:
    return None


@mutant((StepLoop, "_want"))
def want_never_forgotten(original: Any, loop: Any, stream: str, names: Any) -> None:
    if names:
        original(loop, stream, names)


@mutant((DecodeRole, "abort"), (PrefillRole, "abort"))
def abort_ignored(original: Any, role: Any, message: Any) -> None:
    return None


@mutant((DecodeRole, "abort"), (PrefillRole, "abort"))
def late_abort_ends_the_next_attempt(original: Any, role: Any, message: Any) -> None:
    original(role, replace(message, attempt=message.attempt + 1))


@mutant((DecodeRole, "tick"), (PrefillRole, "tick"))
def deadline_ignored(original: Any, role: Any, now: float) -> None:
    return None


@mutant((DecodeRole, "lost"), (PrefillRole, "lost"))
def requests_of_a_dead_proxy_kept(original: Any, role: Any, link: Any) -> None:
    return None


@mutant((DecodeRole, "_fetched"))
def blocks_missing_ignored(original: Any, role: Any, event: Any) -> None:
    job = role._by_transfer.get(event.transfer_id)
    if job is not None:
        job.missing = ()
    original(role, event)


@mutant((PrefillRole, "_fetched"))
def history_that_has_come_is_waited_for(original: Any, role: Any, event: Any) -> None:
    role._by_transfer.pop(event.transfer_id, None)


@mutant((PrefillRole, "_released"))
def blocks_kept_after_release(original: Any, role: Any, event: Any) -> None:
    job = role._streams.pop(event.stream, None)
    if job is not None:
        role._jobs.pop(job.request_id, None)


@mutant((DecodeRole, "stepped"))
def finished_job_kept(original: Any, role: Any, event: Any) -> None:
    jobs = dict(role._jobs)
    original(role, event)
    role._jobs = jobs


constant("attempts_share_a_name", (worker.role, "engine_key", lambda request_id, _: request_id))


# The proxy.


@mutant((lifecycle, "_emit"))
def repeated_token_emitted(original: Any, journal: Any, delta: Any, max_tokens: int) -> Any:
    if delta.index < len(journal) and delta.tokens:
        return original(proxy.lifecycle.NOTHING, replace(delta, index=0), max_tokens)
    return original(journal, delta, max_tokens)


@mutant((lifecycle, "_set_aside"))
def gap_accepted(original: Any, state: Any, delta: Any, now: float) -> Any:
    emit = lifecycle._emit(state.journal, replace(delta, index=len(state.journal)), state.max_tokens)
    return state._replace(journal=state.journal.extend(delta.tokens)), (emit,) if emit else ()


@mutant((lifecycle, "_set_aside"))
def early_token_dropped(original: Any, state: Any, delta: Any, now: float) -> Any:
    return state, ()


@mutant((lifecycle, "_routed"))
def retry_without_a_new_attempt(original: Any, state: Any, event: Any) -> Any:
    return original(state._replace(attempts=max(0, state.attempts - 1)), event)


@mutant((lifecycle, "_lost"))
def lost_worker_ignored(original: Any, state: Any, worker: Any, now: float) -> Any:
    return state, ()


@mutant((lifecycle, "_refused"))
def refusal_ignored(original: Any, state: Any, event: Any, now: float) -> Any:
    return state, ()


@mutant((lifecycle, "_tick"))
def unrouted_choice_never_asks_again(original: Any, state: Any, now: float) -> Any:
    after, effects = original(state, now)
    return (state, ()) if any(isinstance(e, NeedRoute) for e in effects) else (after, effects)


@mutant((lifecycle, "_fail"))
def failure_not_told(original: Any, state: Any, failure: Any, reason: str = "failed") -> Any:
    return state._replace(phase=Phase.FAILED), ()


@mutant((lifecycle, "_aborts"))
def lost_attempt_not_aborted(original: Any, state: Any, reason: str) -> Any:
    return ()


@mutant((lifecycle, "_aborts"))
def prefill_worker_not_aborted(original: Any, state: Any, reason: str) -> Any:
    aborts: tuple[SendAbort, ...] = original(state, reason)
    return aborts[-1:]


@mutant((MeshDispatcher, "_index"))
def lost_worker_finds_no_requests(original: Any, dispatcher: Any, choice: Any) -> None:
    original(dispatcher, choice)
    dispatcher._on_worker.clear()


@mutant((MeshDispatcher, "_unplace"))
def assignment_never_settled(original: Any, dispatcher: Any, choice: Any, place: Any) -> None:
    there = dispatcher._on_worker.get(place, {})
    there.pop(choice.wire_id, None)


@mutant((WorkerPool, "overdue"))
def silence_unnoticed(original: Any, pool: Any, now: float) -> Any:
    return []


@mutant((WorkerPool, "_register_again"))
def reconnection_taken_for_an_echo(original: Any, pool: Any, known: Any, now: float, moved: bool) -> Any:
    return original(pool, known, now, False)


@mutant((WorkerPool, "beat"))
def silent_worker_never_back(original: Any, pool: Any, place: Any, beat: Any, now: float) -> Any:
    known = pool.get(place)
    silent = known is not None and known.health is proxy.routing.pool.Health.SILENT
    return False if silent else original(pool, place, beat, now)


@mutant((Fleet, "_forget"))
def goodbye_ignored(original: Any, fleet: Any, worker: Any, why: str) -> None:
    return None


@mutant((ProxyLink, "reconnected"))
def no_registration_after_a_reconnection(original: Any, link: Any, now: float) -> None:
    link.monitor.inbox.clear()


@mutant((ProxyLink, "send"))
def tokens_lost_on_the_link(original: Any, link: Any, message: Any) -> None:
    if isinstance(message, TokenBatch) and len(message.deltas) > 1:
        message = TokenBatch(message.deltas[1:])
    original(link, message)


def _without_journal(choice: Any) -> Any:
    return choice.generation.request.tokens


constant("journal_not_sent_on_resume", (Choice, "tokens", property(_without_journal)))
