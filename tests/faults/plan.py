"""What one seed plays over real processes: the requests and the faults; all of it drawn before anything happens."""

from __future__ import annotations

import random
from dataclasses import dataclass

from engine.sim_engine import PRINTABLE, expected_tokens
from proxy.lifecycle import MAX_SETBACKS
from tests.kvtransfer.relay import CUT, DELAY, FLIP, RAW, REPEAT, RESET, STALL

PREFILLS = ("prefill-0", "prefill-1")
DECODES = ("decode-0", "decode-1")
WORKERS = (*PREFILLS, *DECODES)
SPAN_S = 1.5
"""Requests begin, and things go wrong, within so long."""
TOPIC_TOKENS = 300
MAX_MODEL_LEN = 1024
ASKED, ANSWERED, HEARD, SAID = "kv asked", "kv answered", "control heard", "control said"
SIDES = (ASKED, ANSWERED, HEARD, SAID)
"""Directions of a worker's links: fetches from it, its blocks; what its proxy tells it, what it tells its proxy."""
MESSAGE_KINDS = (FLIP, CUT, REPEAT, RAW, DELAY, RESET, STALL)
KILL, PAUSE, RESTART = "kill", "pause", "restart"
WORKER_KINDS = (KILL, PAUSE, RESTART)
PLAIN, OPENAI = "plain", "openai"


@dataclass(frozen=True, slots=True)
class Ask:
    """One client's request."""

    at: float
    client: str
    prompt: tuple[int, ...]
    max_tokens: int
    n: int
    leaves_after: int | None
    """Tokens of the first choice, after which the client is gone; None: it stays."""
    stop: int | None
    """A token that ends the answer."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that happens to a worker, or to the next messages of one direction of its links."""

    at: float
    kind: str
    worker: str
    side: str = ""
    count: int = 0
    """Messages."""
    seconds: float = 0.0
    """That the message waits, or the worker; until the worker starts again."""

    def __str__(self) -> str:
        where = f"{self.worker}, {self.count} of {self.side}" if self.side else self.worker
        return f"{self.at:.2f} s: {self.kind} {where}" + (f" for {self.seconds} s" if self.seconds else "")


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    asks: tuple[Ask, ...]
    faults: tuple[Fault, ...]

    @property
    def gentle(self) -> bool:
        """No choice can be struck so often that the proxy gives it up, and one decode worker has no trouble."""
        breaking = [fault for fault in self.faults if fault.kind != DELAY]
        struck = {fault.worker for fault in breaking if fault.side not in (ASKED, ANSWERED)}
        return sum(fault.count or 1 for fault in breaking) < MAX_SETBACKS and not struck.issuperset(DECODES)


def answer(ask: Ask) -> tuple[list[int], str]:
    """The tokens of an undisturbed run and its finish reason."""
    tokens = expected_tokens(ask.prompt, ask.max_tokens, PRINTABLE.stop, first_token=PRINTABLE.start)
    if ask.stop in tokens:
        return tokens[: tokens.index(ask.stop) + 1], "stop"
    return tokens, "length"


def draw(seed: int) -> Plan:
    chance = random.Random(seed)
    asks = tuple(_ask(chance, topic) for topic in _topics(chance) for _ in range(chance.randrange(2, 5)))
    faults = [_message_fault(chance) for _ in range(chance.choice((1, 2, 3, 6)))]
    struck = chance.sample(WORKERS, chance.choice((0, 0, 0, 1, 1, 2)))
    faults += [_worker_fault(chance, worker) for worker in struck]
    return Plan(seed, asks, tuple(sorted(faults, key=lambda f: f.at)))


def _topics(chance: random.Random) -> list[tuple[int, ...]]:
    """Texts that several clients of this seed ask about, and nobody before: later seeds find nothing of them cached."""
    return [tuple(chance.choices(PRINTABLE, k=TOPIC_TOKENS)) for _ in range(3)]


def _ask(chance: random.Random, topic: tuple[int, ...]) -> Ask:
    own = tuple(chance.choices(PRINTABLE, k=chance.randrange(1, 200)))
    prompt = topic[: chance.choice((0, 128, TOPIC_TOKENS))] + own
    return Ask(
        chance.uniform(0.0, SPAN_S),
        chance.choice((PLAIN, PLAIN, OPENAI)),
        prompt,
        chance.choice((1, 8, 40, 80)),
        chance.choice((1, 1, 1, 2)),
        chance.randrange(1, 20) if chance.random() < 0.2 else None,
        chance.choice(PRINTABLE) if chance.random() < 0.2 else None,
    )


def _message_fault(chance: random.Random) -> Fault:
    kind = chance.choice(MESSAGE_KINDS)
    seconds = {DELAY: chance.uniform(0.02, 0.3), STALL: chance.choice((0.5, 0.5, 2.0, 6.0))}.get(kind, 0.0)
    count = 1 if kind == STALL else chance.choice((1, 1, 3, 10))
    side = chance.choice(SIDES)
    worker = chance.choice(PREFILLS if side in (ASKED, ANSWERED) and chance.random() < 0.8 else WORKERS)
    return Fault(chance.uniform(0.0, SPAN_S), kind, worker, side, count, round(seconds, 2))


def _worker_fault(chance: random.Random, worker: str) -> Fault:
    kind = chance.choice((KILL, KILL, PAUSE, PAUSE, RESTART))
    seconds = {PAUSE: chance.choice((0.2, 1.0, 1.0, 7.0))}.get(kind, chance.choice((0.0, 0.5)))
    return Fault(chance.uniform(0.2, SPAN_S), kind, worker, seconds=seconds)
