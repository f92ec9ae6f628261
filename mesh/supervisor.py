"""The loop that runs a mesh's processes: waits for signals, output, reports and exits, and does what `Lifecycle` says.

One thread: children may be forked from it, and the kernel ties their lives to it.
"""

from __future__ import annotations

import contextlib
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType

from mesh.child import Child
from mesh.console import Console
from mesh.lifecycle import (
    Announce,
    DoorOpen,
    Effect,
    End,
    Event,
    Exited,
    Lifecycle,
    Note,
    Reported,
    Signal,
    Spawn,
    State,
    StopAsked,
    Tick,
)
from mesh.progress import READY, Fact, Phase, parse_report

PROBE_S = 0.05
"""Between two questions whether the proxy is ready."""
IDLE_S = 1.0
"""Longest sleep of the loop."""
LAST_READS = 16
"""Of a child that has ended: more than a full pipe, and still finite if something it started goes on writing."""
EXIT_NOT_STARTED = 127
"""A program that does not exist, as shells count."""
OWN_LINE = "kvmesh: "
"""How a process of ours begins the line that says why it cannot start; kept back, for it may be the last word."""


@dataclass(frozen=True, slots=True)
class Program:
    """How to start one member of the mesh."""

    name: str
    argv: tuple[str, ...]
    environ: Mapping[str, str]


@dataclass(slots=True, eq=False)
class Running:
    """A child and what it said."""

    child: Child
    facts: dict[str, Fact] = field(default_factory=dict)
    last_line: str = ""
    held: str = ""
    phase: str = ""


class Supervisor:
    """Runs `programs` as `lifecycle` says until the mesh ends."""

    def __init__(
        self,
        programs: Mapping[str, Program],
        lifecycle: Lifecycle,
        console: Console,
        door_open: Callable[[], bool],
        screen: Callable[[Supervisor], list[str]],
    ) -> None:
        """`door_open` asks the proxy without waiting long; `screen` makes the start screen's lines."""
        self._programs = programs
        self._lifecycle = lifecycle
        self._console = console
        self._door_open = door_open
        self._screen = screen
        self._running: dict[str, Running] = {}
        self._selector = selectors.DefaultSelector()
        self._end: End | None = None
        self.started = time.monotonic()

    @property
    def pids(self) -> dict[str, int]:
        return {name: running.child.pid for name, running in self._running.items()}

    def facts(self, name: str) -> Mapping[str, Fact]:
        """What the process told of itself when it became ready."""
        return self._running[name].facts if name in self._running else {}

    def run(self) -> int:
        """The mesh's exit code. Nothing that was started is left when this returns."""
        try:
            with _signals() as wake:
                self._selector.register(wake, selectors.EVENT_READ)
                self._do(self._lifecycle.start(time.monotonic()))
                while self._end is None:
                    self._turn(wake)
        finally:
            self._console.clear()
            for running in self._running.values():
                running.child.close()
            self._selector.close()
        if self._end.message:
            self._console.fail(self._end.message)
        return self._end.code

    def _turn(self, wake: socket.socket) -> None:
        self._selector.select(self._timeout())
        if any(number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) for number in _received(wake)):
            self._step(StopAsked())
        for name in list(self._running):
            self._watch(name)
        if self._lifecycle.awaits_door and self._door_open():
            self._step(DoorOpen())
        self._step(Tick())
        if self._lifecycle.state is State.STARTING:
            self._console.status(self._progress())

    def _timeout(self) -> float:
        if self._lifecycle.awaits_door:
            return PROBE_S
        timer = self._lifecycle.next_timer
        if timer is None:
            return PROBE_S if self._lifecycle.state is State.STARTING else IDLE_S
        return min(IDLE_S, max(0.0, timer - time.monotonic()))

    def _watch(self, name: str) -> None:
        """Reads what a child wrote, and its end after that."""
        running = self._running[name]
        code = running.child.poll()
        for _ in range(1 if code is None else LAST_READS):
            for line in running.child.reports.read():
                self._report(name, running, line)
            for line in running.child.output.read():
                self._output(name, running, line)
        for pipe in (running.child.reports, running.child.output):
            if pipe.ended and pipe.fd in self._selector.get_map():
                self._selector.unregister(pipe.fd)
        if code is not None:
            self._remove(name, running)
            self._step(Exited(name, code, running.held or running.last_line))
            if running.held and self._end is None:
                self._console.line(name, running.held)

    def _report(self, name: str, running: Running, line: str) -> None:
        report = parse_report(line)
        if report is None:
            return
        if isinstance(report, Phase):
            if report.name == READY:
                running.facts.update(report.facts)
            if report.name != running.phase:
                running.phase = report.name
                if self._lifecycle.state is not State.STARTING or not self._console.draws:
                    self._console.line(name, report.name if report.name == READY else f"starting: {report.name}")
        self._step(Reported(name, report))

    def _output(self, name: str, running: Running, line: str) -> None:
        if not line.strip():
            return
        running.last_line = line
        if line.startswith(OWN_LINE) and not self._lifecycle.lives[name].ready:
            running.held = line
        else:
            self._console.line(name, line)

    def _remove(self, name: str, running: Running) -> None:
        for pipe in (running.child.reports, running.child.output):
            if pipe.fd in self._selector.get_map():
                self._selector.unregister(pipe.fd)
        running.child.close()
        del self._running[name]

    def _step(self, event: Event) -> None:
        if self._end is None:
            self._do(self._lifecycle.step(event, time.monotonic()))

    def _do(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case Spawn(name=name):
                    self._spawn(name)
                case Signal(name=name, number=number):
                    if name in self._running:
                        self._running[name].child.signal(number)
                case Announce():
                    self._console.screen(self._screen(self))
                case Note(level=level, text=text):
                    self._console.note(level, text)
                case End():
                    self._end = effect

    def _spawn(self, name: str) -> None:
        program = self._programs[name]
        try:
            child = Child(program.argv, program.environ)
        except OSError as error:
            self._step(Exited(name, EXIT_NOT_STARTED, f"{program.argv[0]}: {error.strerror}"))
            return
        self._running[name] = Running(child)
        self._selector.register(child.output.fd, selectors.EVENT_READ)
        self._selector.register(child.reports.fd, selectors.EVENT_READ)

    def _progress(self) -> str:
        """`3.2 s · prefill-0 weights 40 % · decode-0 ready`."""
        words = [f"{time.monotonic() - self.started:.1f} s"]
        for life in self._lifecycle.lives.values():
            share = "" if life.fraction is None or life.phase == READY else f" {life.fraction:.0%}"
            words.append(f"{life.name} {life.phase or 'starting'}{share}")
        return " · ".join(words)


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket that gets a byte per signal: ends of children, and what asks us to stop."""
    receiver, sender = socket.socketpair()
    receiver.setblocking(False)
    sender.setblocking(False)
    numbers = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, _noted) for number in numbers}
    wakeup = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    try:
        yield receiver
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        receiver.close()
        sender.close()


def _noted(number: int, frame: FrameType | None) -> None:
    """The wake-up socket carries the signal; there is nothing to do in the handler."""


def _received(wake: socket.socket) -> bytes:
    try:
        return wake.recv(4096)
    except BlockingIOError:
        return b""
