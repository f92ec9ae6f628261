"""A worker's connection to a proxy, over real sockets and a clock moved by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zmq

from mesh import wire
from mesh.messages import Goodbye, OtherVersions, ProxyBeat, Register, Welcome
from mesh.wire import CONTROL, Versions
from tests.worker.role_fakes import Clock, info
from worker.links import REGISTER_EVERY_S, ProxyLink

WAIT_MS = 10_000


@dataclass(slots=True)
class Proxy:
    """The other end: a bare ROUTER."""

    socket: zmq.Socket[bytes]
    peer: bytes = b""

    def receive(self) -> Any:
        assert self.socket.poll(WAIT_MS), "nothing came"
        self.peer, frame = self.socket.recv_multipart()
        return wire.decode(frame).message

    def version_of_next(self) -> int:
        assert self.socket.poll(WAIT_MS), "nothing came"
        self.peer, frame = self.socket.recv_multipart()
        return wire.decode(frame).version

    def send(self, link: ProxyLink, message: Any, version: int = 0) -> list[Any]:
        """What the link hands out once the message has arrived."""
        self.socket.send_multipart((self.peer, wire.encode(message, 1, version=version)))
        assert link.socket.poll(WAIT_MS)
        return [envelope.message for envelope in link.receive()]


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[Proxy, ProxyLink, Clock]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.ROUTER)
    socket.bind(f"ipc://{tmp_path}/control")
    clock = Clock()
    link = ProxyLink(context, f"ipc://{tmp_path}/control", info())
    assert link.monitor.poll(WAIT_MS)
    link.reconnected(clock.now)
    yield Proxy(socket), link, clock
    link.close()
    socket.close(0)
    context.term()


def welcomed(proxy: Proxy, link: ProxyLink, clock: Clock, name: str = "proxy-a") -> bool:
    proxy.receive()
    (welcome,) = proxy.send(link, Welcome(name, 10.0))
    return link.heard(welcome, clock.now)


def test_a_connection_begins_with_register(ends: tuple[Proxy, ProxyLink, Clock]) -> None:
    proxy, _, _ = ends
    message = proxy.receive()
    assert isinstance(message, Register)
    assert message.worker == info()


def test_register_is_repeated_until_welcome(ends: tuple[Proxy, ProxyLink, Clock]) -> None:
    proxy, link, clock = ends
    proxy.receive()
    clock.now += 1
    link.tick(clock.now)
    assert isinstance(proxy.receive(), Register)
    (welcome,) = proxy.send(link, Welcome("proxy-a", 10.0))
    assert link.heard(welcome, clock.now)
    assert link.registered
    clock.now += 1
    link.tick(clock.now)
    assert not proxy.socket.poll(0)


def test_a_silent_proxy_is_lost_when_its_lease_lapses(ends: tuple[Proxy, ProxyLink, Clock]) -> None:
    proxy, link, clock = ends
    welcomed(proxy, link, clock)
    assert not link.tick(clock.now + 10)
    assert link.tick(clock.now + 10.1)
    assert not link.registered


def test_a_lapse_is_told_with_the_next_introduction(ends: tuple[Proxy, ProxyLink, Clock]) -> None:
    proxy, link, clock = ends
    welcomed(proxy, link, clock)
    assert link.tick(clock.now + 10.1)
    link.tick(clock.now + 10.1)
    assert proxy.receive().forgotten == 1


def test_a_beat_renews_the_lease(ends: tuple[Proxy, ProxyLink, Clock]) -> None:
    proxy, link, clock = ends
    welcomed(proxy, link, clock)
    clock.now += 9
    assert not link.heard(ProxyBeat("proxy-a"), clock.now)
    assert not link.tick(clock.now + 9)


def test_another_process_at_the_address_makes_the_worker_register_again(
    ends: tuple[Proxy, ProxyLink, Clock],
) -> None:
    proxy, link, clock = ends
    welcomed(proxy, link, clock)
    link.heard(ProxyBeat("proxy-b"), clock.now)
    assert not link.registered
    link.tick(clock.now)
    assert welcomed(proxy, link, clock, "proxy-b")


def test_messages_arrive_in_the_order_they_were_sent(ends: tuple[Proxy, ProxyLink, Clock]) -> None:
    proxy, link, clock = ends
    welcomed(proxy, link, clock)
    for i in range(100):
        link.send(Goodbye(str(i)))
    link.flush()
    assert [proxy.receive().reason for _ in range(100)] == [str(i) for i in range(100)]


def test_a_bad_frame_is_skipped(ends: tuple[Proxy, ProxyLink, Clock]) -> None:
    proxy, link, clock = ends
    welcomed(proxy, link, clock)
    proxy.socket.send_multipart((proxy.peer, b"\x93garbage"))
    assert proxy.send(link, ProxyBeat("proxy-a")) == [ProxyBeat("proxy-a")]


def test_an_older_proxy_is_spoken_to_in_its_version(ends: tuple[Proxy, ProxyLink, Clock]) -> None:
    """It does not understand the first `Register` and cannot say so."""
    proxy, link, clock = ends
    assert proxy.version_of_next() == CONTROL.highest
    clock.now += REGISTER_EVERY_S
    link.tick(clock.now)
    assert proxy.version_of_next() == CONTROL.highest - 1
    (welcome,) = proxy.send(link, Welcome("old", 10.0), version=CONTROL.highest - 1)
    assert link.heard(welcome, clock.now)
    link.send(Goodbye("done"))
    link.flush()
    assert proxy.version_of_next() == CONTROL.highest - 1


def test_registrations_without_an_answer_go_through_all_versions(ends: tuple[Proxy, ProxyLink, Clock]) -> None:
    proxy, link, clock = ends
    versions = [proxy.version_of_next()]
    for _ in range(3):
        clock.now += REGISTER_EVERY_S
        link.tick(clock.now)
        versions.append(proxy.version_of_next())
    assert versions == [6, 5, 6, 5]


def test_a_proxy_that_says_its_versions_is_spoken_to_in_the_common_one(ends: tuple[Proxy, ProxyLink, Clock]) -> None:
    proxy, link, clock = ends
    proxy.receive()
    assert proxy.send(link, OtherVersions(Versions(2, 5))) == []
    clock.now += REGISTER_EVERY_S
    link.tick(clock.now)
    assert proxy.version_of_next() == 5


def test_without_a_common_version_one_sentence_is_logged(
    ends: tuple[Proxy, ProxyLink, Clock], caplog: pytest.LogCaptureFixture
) -> None:
    proxy, link, _ = ends
    proxy.receive()
    for _ in range(2):
        assert proxy.send(link, OtherVersions(Versions(7, 9))) == []
    (record,) = [r for r in caplog.records if "control protocol" in r.message]
    assert record.message.endswith("speaks control protocol 7 to 9 and this worker 5 to 6")
    assert not link.registered
