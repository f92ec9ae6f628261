"""The control connection over tcp with keys: a worker of the fleet registers, everybody else hears nothing."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import zmq

from mesh import heartbeats
from mesh.errors import EXIT_USAGE, StartupError
from mesh.keys import PROXY, WORKER, Keys, create, load
from mesh.messages import ProxyBeat, Welcome, WorkerInfo
from proxy.control import ControlSocket
from proxy.routing.place import Place
from tests.faults.links import Strikes
from tests.kvtransfer.relay import CUT, FLIP, LONG, REPEAT, RESET, Faults, Frame, Hit, Relay
from tests.worker.role_fakes import info
from worker.links import ProxyLink

LIMIT_S = 10.0
QUIET_ROUNDS = 30
"""Turns of 10 ms in which a worker of the fleet would long have been welcomed."""


class Known:
    """A handler that only notes who registered."""

    def __init__(self) -> None:
        self.workers: list[str] = []

    def registered(self, info: WorkerInfo, *, moved: bool) -> bool:
        self.workers.append(info.worker_id)
        return True

    def heard(self, worker: Place, message: Any) -> None: ...

    def ended(self, worker: Place) -> None: ...


class Door:
    """A proxy's control socket and the workers' links to it."""

    def __init__(self, folder: Path) -> None:
        create(folder)
        self.known = Known()
        self.control = ControlSocket("proxy-0", 5, "elsewhere", self.known, self.keys(folder, PROXY))
        self.worker_keys = self.keys(folder, WORKER)

    @staticmethod
    def keys(folder: Path, kind: str) -> Keys:
        keys = load(str(folder), kind)
        assert keys is not None
        return keys

    async def dial(self, keys: Keys | None, rounds: int) -> bool:
        """Whether a worker with `keys` is welcomed."""
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        link = ProxyLink(context, self.control.address, info(), keys)
        try:
            for round_ in range(rounds):
                link.reconnected(round_)
                link.tick(round_)
                if any(isinstance(e.message, Welcome) for e in link.receive()):
                    return True
                await asyncio.sleep(0.01)
            return False
        finally:
            link.close()
            context.term()


def run(tmp_path: Path, body: Callable[[Door], Awaitable[None]]) -> None:
    async def main() -> None:
        door = Door(tmp_path / "keys")
        door.control.bind("tcp://127.0.0.1:0")
        door.control.start()
        try:
            await body(door)
        finally:
            door.control.close()

    asyncio.run(asyncio.wait_for(main(), LIMIT_S))


def test_a_worker_of_the_fleet_registers(tmp_path: Path) -> None:
    async def body(door: Door) -> None:
        assert await door.dial(door.worker_keys, 500)
        assert door.known.workers
        assert door.control.refused_keys == 0

    run(tmp_path, body)


def test_an_unknown_key_is_refused_and_counted(tmp_path: Path) -> None:
    async def body(door: Door) -> None:
        public, secret = zmq.curve_keypair()
        assert not await door.dial(replace(door.worker_keys, public=public, secret=secret), QUIET_ROUNDS)
        assert door.known.workers == []
        assert door.control.refused_keys >= 1
        assert await door.dial(door.worker_keys, 500)

    run(tmp_path, body)


@pytest.mark.parametrize("kind", ["no keys", "wrong proxy key", "unknown key"])
def test_who_gets_nothing_is_told_so(tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str) -> None:
    async def body(door: Door) -> None:
        public, secret = zmq.curve_keypair()
        keys = {
            "no keys": None,
            "wrong proxy key": replace(door.worker_keys, proxy=public),
            "unknown key": replace(door.worker_keys, public=public, secret=secret),
        }[kind]
        assert not await door.dial(keys, QUIET_ROUNDS)
        assert door.known.workers == []
        assert caplog.text.count("do not know each other's keys") == 1
        assert secret.decode() not in caplog.text

    run(tmp_path, body)


def test_a_dead_authenticator_lets_nobody_in(tmp_path: Path) -> None:
    async def body(door: Door) -> None:
        assert door.control._authenticator is not None
        door.control._authenticator.close()
        assert not await door.dial(door.worker_keys, QUIET_ROUNDS)
        assert door.known.workers == []

    run(tmp_path, body)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def is_survived(tmp_path: Path, heard: Faults, said: Faults, strike: Callable[[], None]) -> None:
    """A worker that is connected through a relay is struck; it introduces itself again, and hears its proxy."""

    async def body(door: Door) -> None:
        relay = Relay(int(door.control.address.rsplit(":", 1)[1]), heard, said)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        link = ProxyLink(context, f"tcp://127.0.0.1:{relay.port}", info(), door.worker_keys)
        place = Place(info().worker_id, info().incarnation)

        def welcomed(times: int) -> bool:
            now = time.monotonic()
            link.reconnected(now)
            link.tick(now)
            link.send(ProxyBeat("any"))
            link.flush()
            door.control.send(place, ProxyBeat("proxy-0"))
            return bool(list(link.receive())) and len(door.known.workers) >= times

        try:
            await until(lambda: welcomed(1))
            strike()
            before = len(door.known.workers)
            await until(lambda: welcomed(before + 1))
        finally:
            link.close()
            context.term()
            relay.close()

    run(tmp_path, body)


@pytest.mark.parametrize("side", ["heard", "said"])
@pytest.mark.parametrize("kind", [FLIP, CUT, REPEAT, RESET])
def test_a_damaged_message_costs_one_connection_and_no_more(tmp_path: Path, kind: str, side: str) -> None:
    """ZeroMQ gives a socket up that dialled and got what does not decrypt."""
    sides = {"heard": Strikes(), "said": Strikes()}
    is_survived(tmp_path, sides["heard"], sides["said"], lambda: sides[side].strike(kind, 1, 0.0))
    assert sides[side].done == {kind: 1}


class Endless(Faults):
    """Says of one message that half a mebibyte more of it follows."""

    def __init__(self) -> None:
        super().__init__((), 0, rate=0.0)
        self.due = False

    def apply(self, frames: list[Frame]) -> Hit:
        if not self.due:
            return super().apply(frames)
        self.due = False
        body = frames[0].body
        return Hit("endless", struct.pack(">BQ", frames[0].flags | LONG, len(body) + (1 << 19)) + body, 0.0)


@pytest.mark.parametrize("side", ["heard", "said"])
def test_an_end_that_waits_for_the_rest_of_a_frame_hangs_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: str
) -> None:
    """All that follows is taken for that frame, in both directions nothing fails, and both sides go on sending."""
    monkeypatch.setattr(heartbeats, "EVERY_MS", 100)
    monkeypatch.setattr(heartbeats, "TIMEOUT_MS", 400)
    sides = {"heard": Endless(), "said": Endless()}
    is_survived(tmp_path, sides["heard"], sides["said"], lambda: setattr(sides[side], "due", True))
    assert not sides[side].due


@pytest.mark.parametrize("address", ["tcp://10.1.2.3:7400", "tcp://*:7400", "tcp://a.example:7400"])
def test_without_keys_nothing_leaves_this_machine(address: str) -> None:
    control = ControlSocket("proxy-0", 5, "elsewhere", Known())
    with pytest.raises(StartupError, match="without --keys") as refused:
        control.bind(address)
    assert refused.value.exit_code == EXIT_USAGE
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    with pytest.raises(StartupError, match="without --keys"):
        ProxyLink(context, address, info())
    context.term()


@pytest.mark.parametrize(
    "address", ["udp://127.0.0.1:1", "x", "tcp://127.0.0.1", "ipc://", "tcp://127.0.0.1:0;10.1.2.3:74"]
)
def test_an_address_of_no_kind_is_refused(address: str, tmp_path: Path) -> None:
    control = Door(tmp_path / "keys").control
    with pytest.raises(StartupError, match="neither ipc"):
        control.bind(address)
