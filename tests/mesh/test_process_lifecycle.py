"""The life of a mesh, without a process or a clock."""

from __future__ import annotations

import random
import signal

import pytest

from mesh.lifecycle import (
    Announce,
    DoorOpen,
    Effect,
    End,
    Event,
    Exited,
    Kind,
    Lifecycle,
    Note,
    Reported,
    Signal,
    Spawn,
    State,
    StopAsked,
    Tick,
)
from mesh.progress import READY, Failed, Phase

MEMBERS = (("store", Kind.STORE), ("proxy", Kind.PROXY), ("prefill-0", Kind.WORKER), ("decode-0", Kind.WORKER))
WORKERS = ("prefill-0", "decode-0")


def starting() -> Lifecycle:
    mesh = Lifecycle(MEMBERS, drain_timeout=30.0)
    assert mesh.start(0.0) == [Spawn(name) for name, _ in MEMBERS]
    return mesh


def serving() -> Lifecycle:
    mesh = starting()
    for name in WORKERS:
        mesh.step(Reported(name, Phase(READY)), 1.0)
    assert mesh.step(DoorOpen(), 2.0) == [Announce()]
    return mesh


def without_notes(effects: list[Effect]) -> list[Effect]:
    return [e for e in effects if not isinstance(e, Note)]


def die(mesh: Lifecycle, name: str, now: float, code: int = -9) -> list[Effect]:
    return without_notes(mesh.step(Exited(name, code), now))


def test_it_announces_itself_once_all_workers_and_the_proxy_are_ready() -> None:
    mesh = starting()
    assert mesh.step(DoorOpen(), 1.0) == []
    mesh.step(Reported("prefill-0", Phase(READY)), 1.0)
    assert not mesh.awaits_door
    mesh.step(Reported("decode-0", Phase(READY)), 1.0)
    assert mesh.awaits_door
    assert mesh.step(DoorOpen(), 1.0) == [Announce()]
    assert mesh.step(DoorOpen(), 1.0) == []


def test_a_dead_worker_starts_again_after_a_delay() -> None:
    mesh = serving()
    assert die(mesh, "decode-0", 10.0) == []
    assert mesh.next_timer == pytest.approx(10.2)
    assert mesh.step(Tick(), 10.1) == []
    assert mesh.step(Tick(), 10.2) == [Spawn("decode-0")]
    assert mesh.next_timer is None


def test_the_proxy_and_the_store_start_again_too() -> None:
    mesh = serving()
    for name in ("proxy", "store"):
        die(mesh, name, 10.0, code=1)
    assert mesh.step(Tick(), 10.2) == [Spawn("store"), Spawn("proxy")]


def test_the_delay_doubles_up_to_its_limit() -> None:
    mesh = serving()
    now, delays = 100.0, []
    for _ in range(10):
        die(mesh, "decode-0", now)
        assert mesh.next_timer is not None
        delays.append(mesh.next_timer - now)
        now = mesh.next_timer
        mesh.step(Tick(), now)
    assert delays == pytest.approx([0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 12.8, 25.6, 30.0, 30.0])


def test_a_minute_of_running_forgives_earlier_deaths() -> None:
    mesh = serving()
    for now in (100.0, 101.0, 102.0):
        die(mesh, "decode-0", now)
        mesh.step(Tick(), now + 0.99)
    die(mesh, "decode-0", 200.0)
    assert mesh.next_timer == pytest.approx(200.2)


@pytest.mark.parametrize("code", [2, 3, 4, 5, 6, 7, 8])
def test_a_process_that_cannot_start_ends_everything_with_its_line(code: int) -> None:
    mesh = starting()
    mesh.step(Reported("decode-0", Failed("there is no model directory x", code)), 1.0)
    assert mesh.step(Exited("decode-0", code), 1.0) == [End(code, "there is no model directory x")]
    assert mesh.state is State.DONE


def test_the_line_may_come_from_its_output() -> None:
    assert starting().step(Exited("proxy", 4, "kvmesh: port 80 is in use"), 1.0) == [End(4, "port 80 is in use")]


def test_a_crash_while_starting_is_tried_again_but_not_forever() -> None:
    mesh = starting()
    now = 0.0
    for _ in range(4):
        assert die(mesh, "prefill-0", now, code=1) == []
        assert mesh.next_timer is not None
        now = mesh.next_timer
        assert mesh.step(Tick(), now) == [Spawn("prefill-0")]
    (end,) = die(mesh, "prefill-0", now, code=-11)
    assert isinstance(end, End)
    assert (end.code, end.message) == (7, "prefill-0 ended 5 times before it was ready, by SIGSEGV")


def test_a_startup_error_after_the_mesh_served_is_only_tried_again() -> None:
    mesh = serving()
    assert die(mesh, "decode-0", 10.0, code=3) == []
    assert mesh.next_timer is not None


def test_stopping_goes_proxy_then_workers_then_store() -> None:
    mesh = serving()
    assert without_notes(mesh.step(StopAsked(), 10.0)) == [Signal("proxy", signal.SIGTERM)]
    assert die(mesh, "proxy", 11.0, 0) == [Signal(name, signal.SIGTERM) for name in WORKERS]
    assert die(mesh, "prefill-0", 12.0, 0) == []
    assert die(mesh, "decode-0", 12.0, 0) == [Signal("store", signal.SIGTERM)]
    assert die(mesh, "store", 12.0, 0) == [End(0)]


def test_who_does_not_finish_in_time_is_killed() -> None:
    mesh = serving()
    mesh.step(StopAsked(), 10.0)
    assert mesh.next_timer == pytest.approx(40.0)
    assert without_notes(mesh.step(Tick(), 40.0)) == [Signal("proxy", signal.SIGTERM)]
    assert mesh.next_timer == pytest.approx(45.0)
    assert without_notes(mesh.step(Tick(), 45.0)) == [Signal("proxy", signal.SIGKILL)]
    die(mesh, "proxy", 45.1)
    assert mesh.next_timer == pytest.approx(50.1)
    assert without_notes(mesh.step(Tick(), 50.1)) == [Signal(name, signal.SIGKILL) for name in WORKERS]


def test_two_signals_to_the_proxy_are_never_one() -> None:
    mesh = Lifecycle(MEMBERS, drain_timeout=0.0)
    mesh.start(0.0)
    for name in WORKERS:
        mesh.step(Reported(name, Phase(READY)), 1.0)
    mesh.step(DoorOpen(), 2.0)
    assert without_notes(mesh.step(StopAsked(), 10.0)) == [Signal("proxy", signal.SIGTERM)]
    assert without_notes(mesh.step(Tick(), 11.0)) == [Signal("proxy", signal.SIGTERM)]


def test_a_second_stop_ends_at_once() -> None:
    mesh = serving()
    mesh.step(StopAsked(), 10.0)
    assert mesh.step(StopAsked(), 10.1) == [End(130, "stopped at once, as asked")]


def test_stopping_while_starting_waits_for_no_drain() -> None:
    mesh = starting()
    effects = mesh.step(StopAsked(), 1.0)
    assert effects == [Signal(name, signal.SIGTERM) for name in ("proxy", *WORKERS)]
    assert mesh.next_timer == pytest.approx(6.0)


def test_nothing_is_started_again_while_stopping() -> None:
    mesh = serving()
    die(mesh, "decode-0", 10.0)
    mesh.step(StopAsked(), 10.1)
    assert mesh.step(Tick(), 11.0) == []
    assert die(mesh, "prefill-0", 12.0) == []
    assert mesh.step(Tick(), 39.0) == []


def test_a_mesh_whose_processes_are_all_gone_stops_at_once() -> None:
    mesh = serving()
    for name, _ in MEMBERS:
        die(mesh, name, 10.0)
    assert without_notes(mesh.step(StopAsked(), 10.1)) == [End(0)]


def happens(mesh: Lifecycle, chance: random.Random, alive: set[str]) -> Event:
    """Something that can happen to `mesh` in its state."""
    choices: list[Event] = [Tick(), DoorOpen()]
    for name in sorted(alive):
        choices += [Reported(name, Phase(READY)), Exited(name, chance.choice((0, 1, 3, -9)))]
    if chance.random() < 0.1:
        choices = [StopAsked()]
    return chance.choice(choices)


@pytest.mark.parametrize("seed", range(200))
def test_whatever_happens_a_stopped_mesh_ends_with_nothing_running(seed: int) -> None:
    """Invariants: one life per name at a time, and after a stop an End by the time its deadlines have passed."""
    chance = random.Random(seed)
    mesh = Lifecycle(MEMBERS, drain_timeout=3.0)
    alive: set[str] = set()
    ended = False

    def do(effects: list[Effect]) -> None:
        nonlocal ended
        for effect in effects:
            assert not ended, "an effect after the end"
            match effect:
                case Spawn(name=name):
                    assert name not in alive
                    alive.add(name)
                case End():
                    ended = True

    do(mesh.start(0.0))
    now = 0.0
    for _ in range(60):
        if ended:
            return
        now += chance.random()
        event = happens(mesh, chance, alive)
        if isinstance(event, Exited):
            alive.discard(event.name)
        do(mesh.step(event, now))
    if ended:
        return
    do(mesh.step(StopAsked(), now))
    for _ in range(20):
        if ended:
            return
        killed = [e.name for e in mesh.step(Tick(), now) if isinstance(e, Signal) and e.number == signal.SIGKILL]
        for name in killed:
            alive.discard(name)
            do(mesh.step(Exited(name, -9), now))
        now += 3.0
    assert ended
