"""The thread that owns the engine: obey commands, step, tell.

Everything that touches the engine or its pages happens here, between two steps, so the engine needs no lock. The I/O
thread posts commands through the methods below and receives `LoopEvent`s through `emit`. The beat is sent from this
loop and nowhere else: a loop that hangs falls silent, whatever its process's sockets still answer.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from engine.engine import Engine
from engine.errors import CannotFit
from engine.grammar import Matcher
from engine.request import EngineRequest
from engine.step import BlockReady, Missing, StepOutput
from kvtransfer.transports.base import PARCEL_BYTES
from mesh.errors import GrammarError
from mesh.layout import KvLayout
from mesh.messages import Load
from worker.grammars import Grammars

BEAT_EVERY_S = 0.2
"""Well under the proxy's shortest time-out, far over the cost of one message."""
PRODUCED_BYTES = PARCEL_BYTES
"""Of blocks that are told of at once: what leaves in one message."""
IDLE_WAIT_S = 0.1
"""An idle loop wakes at least twice per beat; a command wakes it at once."""


@dataclass(frozen=True, slots=True)
class Stepped:
    """One engine step, without the time that its blocks are copied in: its tokens do not wait for that."""

    output: StepOutput
    seconds: float


@dataclass(frozen=True, slots=True)
class Exported:
    """Bytes of a block that a stream's fetchers asked for; None when this worker does not hold it (now)."""

    stream: str
    name: bytes
    payload: bytes | None


@dataclass(frozen=True, slots=True)
class Produced:
    """Blocks of the step last told of that somebody waits for."""

    exported: tuple[Exported, ...]


@dataclass(frozen=True, slots=True)
class Finished:
    """All blocks of that step were told, in which requests finished."""

    output: StepOutput


@dataclass(frozen=True, slots=True)
class Expected:
    """A fetching request was taken in; these blocks of the other worker's it lacks."""

    key: str
    missing: tuple[Missing, ...]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A request that this engine can never serve, or not to its end."""

    key: str
    code: str
    message: str
    retryable: bool = True
    """Another worker may."""


@dataclass(frozen=True, slots=True)
class Beaten:
    """The loop is alive."""

    steps: int
    load: Load


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The names of all blocks that can be reused now."""

    names: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Stopped:
    """The loop ended; `error` is None when it was asked to."""

    error: BaseException | None


LoopEvent = Stepped | Produced | Finished | Exported | Expected | Rejected | Beaten | Snapshot | Stopped


class StepLoop:
    """Runs `engine` on a thread of its own. Every public method may be called from any thread and returns at once."""

    def __init__(
        self,
        engine: Engine,
        emit: Callable[[LoopEvent], None],
        grammars: Grammars,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._emit = emit
        self._grammars = grammars
        self._compiling: dict[str, EngineRequest] = {}
        """Requests that wait for their grammar; the engine does not know them yet."""
        self._clock = clock
        self._commands: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._wanted: dict[str, frozenset[bytes]] = {}
        self._next_beat = 0.0
        self._progressed = True
        self._running = True
        self._thread = threading.Thread(target=self._run, name="step-loop", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout: float) -> None:
        """Ends the loop after the current step."""
        self._commands.put(self._end)
        self._thread.join(timeout)

    def add(self, request: EngineRequest) -> None:
        self._commands.put(partial(self._prepare, request, self._add))

    def expect(self, request: EngineRequest, theirs: KvLayout | None = None) -> None:
        """Answered by `Expected`, with blocks of the layout `theirs` (None: this worker's), or by `Rejected`."""
        self._commands.put(partial(self._prepare, request, partial(self._expect, theirs=theirs)))

    def fill(self, key: str, index: int, payload: bytes | memoryview, theirs: KvLayout | None = None) -> None:
        """A block of those that `Expected` named."""
        self._commands.put(partial(self._engine.fill, key, index, payload, theirs))

    def ready(self, key: str, new_tokens: Sequence[int]) -> None:
        self._commands.put(partial(self._engine.ready, key, new_tokens))

    def abort(self, key: str) -> None:
        self._commands.put(partial(self._abort, key))

    def release(self, key: str) -> None:
        self._commands.put(partial(self._engine.release, key))

    def want(self, stream: str, names: frozenset[bytes]) -> None:
        """From now on, blocks of `stream` with these names are exported in the step that completes them."""
        self._commands.put(partial(self._want, stream, names))

    def export(self, stream: str, names: Iterable[bytes]) -> None:
        """Answered by one `Exported` per name."""
        self._commands.put(partial(self._export, stream, tuple(names)))

    def snapshot(self) -> None:
        """Answered by `Snapshot`."""
        self._commands.put(lambda: self._emit(Snapshot(self._engine.snapshot())))

    def check(self) -> None:
        """Checks that free + cached + held = total; a leak ends the loop with the reason."""
        self._commands.put(self._engine.check)

    def _run(self) -> None:
        try:
            while self._running:
                self._turn()
        except BaseException as error:  # the process must end with the reason, not lose a thread
            self._emit(Stopped(error))
        else:
            self._emit(Stopped(None))

    def _turn(self) -> None:
        self._obey(0.0 if self._engine.has_work and self._progressed else IDLE_WAIT_S)
        if self._engine.has_work:
            self._step()
        if self._clock() >= self._next_beat:
            self._emit(Beaten(self._engine.num_steps, self._engine.load()))
            self._next_beat = self._clock() + BEAT_EVERY_S

    def _obey(self, wait: float) -> None:
        try:
            if wait:
                self._commands.get(timeout=wait)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            return

    def _step(self) -> None:
        began = self._clock()
        output = self._engine.step()
        self._progressed = output.num_scheduled_tokens > 0
        self._emit(Stepped(output, self._clock() - began))
        self._produce([ready for ready in output.ready if ready.hash in self._wanted.get(ready.request.key, ())])
        if any(token.finish is not None for token in output.tokens):
            self._emit(Finished(output))
        for failed in output.failed:
            self._emit(Rejected(failed.request.key, "grammar", failed.reason, retryable=False))

    def _produce(self, wanted: Sequence[BlockReady]) -> None:
        """The first are on their way while the others are copied."""
        exported: list[Exported] = []
        size = 0
        for ready in wanted:
            payload = self._payload(ready.hash)
            exported.append(Exported(ready.request.key, ready.hash, payload))
            size += 0 if payload is None else len(payload)
            if size >= PRODUCED_BYTES or ready is wanted[-1]:
                self._emit(Produced(tuple(exported)))
                exported, size = [], 0

    def _payload(self, name: bytes) -> bytes | None:
        found = self._engine.export(name)
        return found[0] if found is not None else None

    def _prepare(self, request: EngineRequest, take: Callable[[EngineRequest], None]) -> None:
        """`take(request)`, once its grammar is compiled; the loop steps on meanwhile."""
        grammar = request.params.grammar
        if grammar is None:
            take(request)
            return
        self._compiling[request.key] = request
        self._grammars.compile(grammar, lambda m: self._commands.put(partial(self._compiled, request, take, m)))

    def _compiled(
        self, request: EngineRequest, take: Callable[[EngineRequest], None], matcher: Matcher | GrammarError
    ) -> None:
        if self._compiling.get(request.key) is not request:
            return  # aborted
        del self._compiling[request.key]
        if isinstance(matcher, GrammarError):
            self._emit(Rejected(request.key, "grammar", str(matcher), retryable=False))
        else:
            request.matcher = matcher
            take(request)

    def _abort(self, key: str) -> None:
        self._compiling.pop(key, None)
        self._engine.abort(key)

    def _add(self, request: EngineRequest) -> None:
        try:
            self._engine.add(request)
        except CannotFit as error:
            self._emit(Rejected(request.key, error.code, str(error)))

    def _expect(self, request: EngineRequest, theirs: KvLayout | None) -> None:
        try:
            missing = self._engine.expect(request, theirs)
        except CannotFit as error:
            self._emit(Rejected(request.key, error.code, str(error)))
        else:
            self._emit(Expected(request.key, missing))

    def _want(self, stream: str, names: frozenset[bytes]) -> None:
        if names:
            self._wanted[stream] = names
        else:
            self._wanted.pop(stream, None)

    def _export(self, stream: str, names: tuple[bytes, ...]) -> None:
        for name in names:
            self._emit(Exported(stream, name, self._payload(name)))

    def _end(self) -> None:
        self._running = False
