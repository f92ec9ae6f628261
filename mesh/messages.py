"""Every control message between a proxy and a worker, and between two workers' roles.

A worker dials every proxy it was given (`DEALER` to the proxy's `ROUTER`) and says `Register`; from then on that one
connection carries both directions. KV blocks travel between workers by `kvtransfer`'s own messages, not these.

    worker                                   proxy
      Register, BlockEvents(reset) ────────▶   knows the worker and what it holds
                                   ◀──────── Welcome, in the highest version that both speak; all that follows too
                                   ◀──────── or OtherVersions: that `Register` was in none of the proxy's
      Beat (from the step loop)    ────────▶   alive and making progress
                                   ◀──────── ProxyBeat: a worker frees what it holds for a silent proxy
                                   ◀──────── Prefill, Decode, Abort
      TokenBatch, Refused          ────────▶   one TokenBatch per step and proxy
"""

from __future__ import annotations

from dataclasses import dataclass, field

from mesh.layout import KvLayout
from mesh.params import SamplingParams
from mesh.wire import CONTROL, KV, TokenIds, Versions, message, since

FIRST = Versions(5, 5)
"""Of a process that does not say what it speaks."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself; fixed for the life of an incarnation."""

    worker_id: str
    """The operator's name for it, kept over restarts: `prefill-0`."""
    incarnation: int
    """New per process life and larger than any before."""
    role: str
    """`prefill`, `decode` or `both`."""
    kv_address: str
    """Where other workers send their `Fetch`."""
    host: str
    """Workers with equal `host` can share memory."""
    pid: int
    model: str
    model_digest: bytes
    layout: KvLayout
    total_blocks: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    step_bound_s: float
    """No step of this worker takes longer; a longer silence of the step loop means it hangs."""
    control: Versions = field(default=CONTROL, metadata=since(control=6, before=FIRST))
    """Of this protocol, that the worker speaks."""
    kv: Versions = field(default=KV, metadata=since(control=6, before=FIRST))
    """Of the one that KV endpoints speak with each other."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A worker as another worker finds it."""

    worker_id: str
    incarnation: int
    kv_address: str
    host: str
    layout: KvLayout | None = field(metadata=since(control=6, before=None))
    """Of the blocks that it gives; whoever fetches them converts. None: as one's own."""
    kv: Versions = field(default=KV, metadata=since(control=6, before=FIRST))


@dataclass(frozen=True, slots=True)
class KvHolder:
    """A worker that is thought to have the beginning of a prompt. It may have less: residency is a hint."""

    peer: Peer
    tokens: int
    load: int
    """Requests running, waiting or fetching there."""


@dataclass(frozen=True, slots=True)
class Load:
    """A worker's state at its last step; all counts are requests, blocks or tokens."""

    running: int
    waiting: int
    fetching: int
    held: int
    """Finished prefills whose blocks wait to be fetched."""
    free_blocks: int
    cached_blocks: int
    held_blocks: int
    owed_tokens: int
    """Tokens still to be computed before every known request has caught up."""
    prefill_tokens_per_s: float
    """Measured over the last steps; 0 when nothing was prefilled yet."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token and of the most likely ones at its position."""

    token: int
    logprob: float
    top_tokens: TokenIds
    top_logprobs: tuple[float, ...]
    rank: int = 1
    """Of the token itself: 1 for the most likely one."""


@dataclass(frozen=True, slots=True)
class PrefillReport:
    """Where a request's prompt tokens came from on one worker; the sum is the prompt's length."""

    cached_tokens: int
    fetched_tokens: int
    computed_tokens: int
    queue_s: float
    compute_s: float
    transfer_s: float
    transfer_bytes: int
    overlap_bytes: int
    """Bytes of `transfer_bytes` that arrived before the prefill's first token did."""
    reused_tokens: int
    """Cached or fetched ones, but for those fetched from where they were computed for this very request."""


@dataclass(slots=True)
class TokenDelta:
    """New tokens of one request; `index` counts generated tokens from 0, so a proxy can emit each exactly once.

    Never changed, but not frozen because one is made per token, which takes three times as long for a frozen class.
    """

    request_id: str
    attempt: int
    index: int
    tokens: TokenIds
    logprobs: tuple[TokenLogprob, ...]
    """One per token when asked for, else empty."""
    finish: str | None
    """`stop` or `length` with the last token."""
    report: PrefillReport | None
    """With a worker's first token."""
    prompt_logprobs: tuple[TokenLogprob | None, ...]
    """With the first token, when asked for: one per prompt token, None for the first."""


@message(1)
@dataclass(frozen=True, slots=True)
class Register:
    worker: WorkerInfo
    forgotten: int = 0
    """How often the worker has let go of what this proxy had given it, because the proxy was silent."""


@message(2)
@dataclass(frozen=True, slots=True)
class Welcome:
    proxy_id: str
    lease_s: float
    """A worker that has not heard from this proxy for so long frees what it holds for it."""
    control: Versions = field(default=CONTROL, metadata=since(control=6, before=FIRST))
    """Of this protocol, that the proxy speaks."""


@message(3)
@dataclass(frozen=True, slots=True)
class Beat:
    """Sent by the step loop itself, so that a hung loop is seen."""

    steps: int
    draining: bool
    load: Load


@message(4)
@dataclass(frozen=True, slots=True)
class ProxyBeat:
    proxy_id: str


@message(5)
@dataclass(frozen=True, slots=True)
class BlockEvents:
    """Full blocks that became or ceased to be reusable; `reset`: this is all the worker holds."""

    seq: int
    reset: bool
    stored: tuple[bytes, ...]
    removed: tuple[bytes, ...]


@message(6)
@dataclass(frozen=True, slots=True)
class Prefill:
    """Compute `tokens`, sample one token, keep the blocks until they are fetched."""

    request_id: str
    attempt: int
    tokens: TokenIds
    num_prompt_tokens: int
    """`tokens[num_prompt_tokens:]` were generated by earlier attempts."""
    params: SamplingParams
    hash_root: bytes
    deadline_s: float
    """Relative, from receipt."""
    holders: tuple[KvHolder, ...]
    """Workers that have more of the prompt's beginning, of the turns before, so that fetching it beats computing it."""


@message(7)
@dataclass(frozen=True, slots=True)
class Decode:
    """Generate until the request ends; fetch what is not here from `holders` and `source`, if any are named."""

    request_id: str
    attempt: int
    tokens: TokenIds
    num_prompt_tokens: int
    params: SamplingParams
    hash_root: bytes
    deadline_s: float
    source: Peer | None
    """The worker that got a `Prefill` of this attempt: it makes all blocks, and says the first token."""
    holders: tuple[KvHolder, ...]
    """Others that have the prompt's beginning, so that `source` need not send it."""
    recompute_limit: int
    """Tokens this worker may compute itself when blocks do not arrive; above it the request is handed back."""


@message(8)
@dataclass(frozen=True, slots=True)
class Abort:
    """Ends every attempt up to `attempt`; legal at any time."""

    request_id: str
    attempt: int
    reason: str


@message(9)
@dataclass(frozen=True, slots=True)
class TokenBatch:
    """All new tokens of one step for one proxy."""

    deltas: tuple[TokenDelta, ...]


@message(10)
@dataclass(frozen=True, slots=True)
class Refused:
    """A worker ends its part of a request without finishing it."""

    request_id: str
    attempt: int
    code: str
    """`draining`, `blocks_missing`, `stale_incarnation`, `too_long`, `no_memory`, `deadline`, `wrong_role`,
    `grammar`, `internal`."""
    message: str
    retryable: bool
    """True: another worker may succeed."""


@message(11)
@dataclass(frozen=True, slots=True)
class Goodbye:
    """A worker leaves on purpose; everything it had is finished or handed back."""

    reason: str


@message(12, every_version=True)
@dataclass(frozen=True, slots=True)
class OtherVersions:
    """A frame came in a version that the proxy does not speak; these it does."""

    control: Versions
