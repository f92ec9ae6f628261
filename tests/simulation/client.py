"""A client: reads its stream, and knows what it must read."""

from __future__ import annotations

from mesh.errors import RequestError
from proxy.dispatcher import MeshDispatcher
from proxy.generation import GenerateRequest
from proxy.running import RunningGeneration
from tests.simulation.oracle import Violation

CLEAR = frozenset({"no_workers", "worker_lost", "timeout", "overloaded", "draining"})
"""Failures that a client can be told of when nothing but the fleet went wrong."""
NO_DEADLINE_S = 600.0
"""A request with so much time never runs out of it: if it does, it hung."""


class Client:
    """One request of one client."""

    def __init__(self, name: str, request: GenerateRequest, expected: list[int], finish: str) -> None:
        self.name = name
        self.request = request
        self.expected = expected
        self.finish = finish
        self.outcome = ""
        """`done`, the code of its error, or why it left."""
        self.deadline: float | None = None
        """By its proxy's clock."""
        self.generation: RunningGeneration | None = None
        self._got = [0] * request.n
        self._finished = [False] * request.n

    def submit(self, dispatcher: MeshDispatcher) -> None:
        try:
            self.generation = dispatcher.submit(self.request)
            self.deadline = self.generation.deadline
        except RequestError as error:
            self._failed(error)

    def read(self) -> None:
        generation = self.generation
        if generation is None or self.outcome:
            return
        chunks, generation._chunks = generation._chunks, []
        for chunk in chunks:
            self._take(chunk.choice, chunk.index, chunk.tokens, chunk.finish)
        if generation.failure is not None:
            self._failed(generation.failure)
        elif not generation._open:
            if not all(self._finished):
                raise Violation(f"{self.name} ended without a finish")
            self.outcome = "done"

    @property
    def attempts(self) -> int:
        return 0 if self.generation is None else max(c.state.attempts for c in self.generation.choices)

    @property
    def waiting(self) -> bool:
        """It has asked and its answer has not ended."""
        return self.generation is not None and not self.outcome

    def hung_up(self, why: str) -> None:
        """The client is not there any more."""
        if not self.outcome:
            self.outcome = why

    def cancel(self) -> None:
        if self.generation is not None and self.waiting:
            self.read()
            self.generation.abort("the client left")
            self.hung_up("cancelled")

    def _take(self, choice: int, index: int, tokens: tuple[int, ...], finish: str | None) -> None:
        got = self._got[choice]
        if self._finished[choice]:
            raise Violation(f"{self.name}.{choice} gets more after its finish")
        if index != got:
            raise Violation(f"{self.name}.{choice} gets token {index} where {got} is next")
        if tuple(self.expected[got : got + len(tokens)]) != tokens:
            raise Violation(
                f"{self.name}.{choice} gets {tokens} at {got}, not {self.expected[got : got + len(tokens)]}"
            )
        self._got[choice] = got + len(tokens)
        if finish is None:
            return
        self._finished[choice] = True
        if self._got[choice] != len(self.expected) or finish != self.finish:
            raise Violation(f"{self.name}.{choice} ends by {finish} after {self._got[choice]} tokens")

    def _failed(self, error: RequestError) -> None:
        if error.code not in CLEAR:
            raise Violation(f"{self.name} fails by {error.code}: {error.message}")
        if error.code == "timeout" and self.request.deadline_s >= NO_DEADLINE_S:
            raise Violation(f"{self.name} hung until its deadline")
        self.outcome = str(error.code)
