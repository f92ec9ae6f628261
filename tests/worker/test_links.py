"""A worker's connection to a proxy, over real sockets and a clock moved by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zmq

from mesh import wire
from mesh.messages import Goodbye, ProxyBeat, Register, Welcome
from tests.worker.role_fakes import Clock, info
from worker.links import ProxyLink

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

    def send(self, link: ProxyLink, message: Any) -> list[Any]:
        """What the link hands out once the message has arrived."""
        self.socket.send_multipart((self.peer, wire.encode(message, 1)))
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
