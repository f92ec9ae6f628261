"""A worker's links, each through a relay that does to the next messages what it is told to."""

from __future__ import annotations

from collections import deque

from tests.e2e.processes import free_port
from tests.faults.plan import ANSWERED, ASKED, HEARD, SAID, SIDES
from tests.kvtransfer.relay import Faults, Frame, Relay


class Strikes(Faults):
    """Of one direction; the connections through it share them."""

    def __init__(self) -> None:
        super().__init__((), 0)
        self._due: deque[tuple[str, float]] = deque()

    def strike(self, kind: str, count: int, wait_s: float) -> None:
        self._due.extend([(kind, wait_s)] * count)

    def choose(self, frames: list[Frame]) -> tuple[str, float | None]:
        if not any(frame.body for frame in frames):
            return "", 0.0
        try:
            return self._due.popleft()
        except IndexError:
            return "", 0.0

    def forget(self) -> None:
        """What has not happened yet will not."""
        self._due.clear()


class Links:
    """Of one worker, for all of its lives."""

    def __init__(self, control_port: int) -> None:
        """`control_port`: the proxy's."""
        self._port = _port_pair()
        self.sides = {side: Strikes() for side in SIDES}
        self._control = Relay(control_port, self.sides[HEARD], self.sides[SAID])
        self._asked = Relay(self._port, Strikes(), self.sides[ASKED])
        self._answered = Relay(self._port + 1, self.sides[ANSWERED], self.sides[ASKED])

    @property
    def arguments(self) -> list[str]:
        return ["--proxy", f"tcp://127.0.0.1:{self._control.port}", "--kv-bind", f"tcp://127.0.0.1:{self._port}"]

    @property
    def kv_address(self) -> str:
        """What other workers are told."""
        return f"tcp://127.0.0.1:{self._asked.port}/{self._answered.port}"

    def forget(self) -> None:
        for side in self.sides.values():
            side.forget()

    def close(self) -> None:
        for relay in (self._control, self._asked, self._answered):
            relay.close()


def _port_pair() -> int:
    """A free port; the next, where an encrypted holder answers, is free as well."""
    before, port = 0, free_port()
    while port != before + 1:
        before, port = port, free_port()
    return before
