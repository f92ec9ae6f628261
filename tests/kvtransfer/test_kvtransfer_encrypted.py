"""Two endpoints over tcp with keys: nothing in plain text, and every wrong key a refusal that is counted."""

from __future__ import annotations

import secrets
import socket
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import zmq
from zmq.utils.monitor import parse_monitor_message

from kvtransfer import channel, sealing
from kvtransfer.channel import LINK_BYTES, Opener, Sealer, Unsealable
from kvtransfer.endpoint import WantedChanged
from kvtransfer.sockets import DialRefused, addresses
from kvtransfer.transports.pool import BufferPool
from mesh.curve import HANDSHAKE_FAILED, say_hello
from mesh.errors import StartupError
from mesh.keys import WORKER, Keys, create, load
from tests.kvtransfer.pairs import LAYOUT, Pair, content, encrypted, name, transfer_id, wanted
from tests.kvtransfer.test_kvtransfer_faults import endpoint_at

T = transfer_id(1)
FLEET = b"f" * 32
LINK = b"\x01" * LINK_BYTES


def worker_keys(folder: Path) -> Keys:
    create(folder)
    keys = load(str(folder), WORKER)
    assert keys is not None
    return keys


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return worker_keys(tmp_path / "keys")


def fetched(pair: Pair, numbers: range) -> None:
    pair.holder.hold(numbers)
    pair.fetch(T, "", wanted(numbers))
    ended = pair.finish(T)
    assert (ended.outcome, ended.missing, ended.corrupt) == ("ok", (), 0)
    assert pair.fetcher.blocks(T) == {n: content(name(n)) for n in numbers}
    pair.assert_nothing_left()


def test_blocks_arrive(tmp_path: Path, keys: Keys) -> None:
    with encrypted(tmp_path, keys, keys) as pair:
        fetched(pair, range(40))
        for side in pair.sides:
            assert {reason for reason, count in side.endpoint.stats().dropped.items() if count} <= {"transfer"}


def test_a_stream_is_fetched_as_it_is_produced_with_its_note(tmp_path: Path, keys: Keys) -> None:
    with encrypted(tmp_path, keys, keys) as pair:
        pair.holder.endpoint.open_stream("r#1")
        pair.fetch(T, "r#1", wanted(range(3)))
        pair.run(lambda: pair.holder.of(WantedChanged))
        pair.holder.produce("r#1", range(3))
        pair.holder.endpoint.note("r#1", b"first token")
        pair.holder.endpoint.close_stream("r#1")
        assert pair.finish(T).missing == ()
        pair.assert_nothing_left()


def test_a_link_serves_many_fetches(tmp_path: Path, keys: Keys) -> None:
    with encrypted(tmp_path, keys, keys) as pair:
        for number in range(3):
            pair.holder.hold([number])
            pair.fetch(transfer_id(number), "", wanted([number]))
            assert pair.finish(transfer_id(number)).missing == ()
        assert pair.fetcher.endpoint.stats().links == 1


def ends_without_a_block(pair: Pair, outcome: str, detail: str) -> None:
    pair.holder.hold([0])
    pair.fetch(T, "", wanted([0]))
    ended = pair.finish(T)
    assert (ended.outcome, ended.missing) == (outcome, (0,))
    assert detail in ended.detail
    assert pair.fetcher.blocks(T) == {}
    assert pair.holder.endpoint.stats().blocks_out == 0


def test_a_fetcher_with_another_fleets_keys_is_refused(tmp_path: Path, keys: Keys) -> None:
    stranger = worker_keys(tmp_path / "other")
    with encrypted(tmp_path, stranger, keys) as pair:
        ends_without_a_block(pair, "peer_lost", "key")
        assert pair.fetcher.endpoint.stats().dropped["unknown_key"] >= 1


def test_an_unknown_client_key_is_refused_and_counted_by_the_holder(tmp_path: Path, keys: Keys) -> None:
    public, secret = zmq.curve_keypair()
    with encrypted(tmp_path, replace(keys, public=public, secret=secret), keys) as pair:
        ends_without_a_block(pair, "peer_lost", "key")
        assert pair.holder.endpoint.stats().dropped["client_key"] >= 1


def test_another_transfer_key_is_refused_and_counted_by_both(tmp_path: Path, keys: Keys) -> None:
    with encrypted(tmp_path, replace(keys, transfer=secrets.token_bytes(32)), keys) as pair:
        ends_without_a_block(pair, "peer_lost", "key")
        assert pair.fetcher.endpoint.stats().dropped["unknown_key"] >= 1
        assert pair.holder.endpoint.stats().dropped["hello"] >= 1


def test_a_fetcher_without_keys_asks_nothing_of_a_holder_with_keys(tmp_path: Path, keys: Keys) -> None:
    with encrypted(tmp_path, None, keys) as pair:
        ends_without_a_block(pair, "refused", "no --keys")


def test_a_fetcher_with_keys_asks_nothing_in_plain_text(tmp_path: Path, keys: Keys) -> None:
    with encrypted(tmp_path, keys, None) as pair:
        ends_without_a_block(pair, "refused", "does not encrypt")


def test_an_earlier_incarnation_is_refused_by_name(tmp_path: Path, keys: Keys) -> None:
    with encrypted(tmp_path, keys, keys) as pair:
        old = replace(pair.holder.endpoint.peer, incarnation=6)
        pair.fetcher.endpoint.fetch(T, 1, old, "", wanted([0]), 60)
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing) == ("refused", (0,))
        assert ended.detail.startswith("stale_incarnation")


def test_a_dead_authenticator_lets_nobody_in(tmp_path: Path, keys: Keys) -> None:
    with encrypted(tmp_path, keys, keys) as pair:
        authenticator = pair.holder.endpoint._authenticator
        assert authenticator is not None
        authenticator.close()
        pair.holder.hold([0])
        pair.fetch(T, "", wanted([0]))
        pair.settle()
        pair.clock.now += 5.0
        assert pair.finish(T).missing == (0,)
        assert pair.holder.endpoint.stats().blocks_out == 0


def test_a_holder_that_closes_ends_the_fetch_at_once(tmp_path: Path, keys: Keys) -> None:
    with encrypted(tmp_path, keys, keys) as pair:
        pair.holder.endpoint.open_stream("r#1")
        pair.fetch(T, "r#1", wanted([0]))
        pair.run(lambda: pair.holder.of(WantedChanged))
        pair.holder.endpoint.close()
        pair.sides = [pair.fetcher]
        assert pair.finish(T).outcome == "peer_lost"


@pytest.mark.parametrize(
    "address",
    [
        "tcp://10.1.2.3:7000",
        "tcp://kv.example:7000",
        "tcp://127.0.0.1:0;10.1.2.3:7000",
        "tcp://127.0.0.1@10.1.2.3:7000",
        "tcp://127.0.0.1.example:7000",
        "ws://10.1.2.3:7000",
        "tipc://{1,1}",
    ],
)
def test_without_keys_no_other_machine_is_dialled(address: str) -> None:
    with pytest.raises(DialRefused, match="unencrypted"):
        addresses(address, None)


class Stranger:
    """Dials a bulk port with whatever credentials; says whether it was let in, or hung up on."""

    def __init__(self, address: str, hello: tuple[bytes, bytes] | None) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = self._context.socket(zmq.DEALER)
        if hello is not None:
            self.socket.setsockopt(zmq.ROUTING_ID, hello[0])
            say_hello(self.socket, *hello)
        self._monitor = self.socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | HANDSHAKE_FAILED | zmq.EVENT_DISCONNECTED
        )
        self.socket.connect(address)

    def event(self) -> int:
        assert self._monitor.poll(5000), "nothing happened"
        return int(parse_monitor_message(self._monitor.recv_multipart())["event"])

    def __enter__(self) -> Stranger:
        return self

    def __exit__(self, *error: object) -> None:
        self.socket.disable_monitor()
        self._monitor.close(linger=0)
        self.socket.close(linger=0)
        self._context.term()


def bulk_port(pair: Pair, keys: Keys) -> str:
    return addresses(pair.holder.endpoint.peer.kv_address, keys)[1]


@pytest.mark.parametrize(
    "hello",
    [None, (LINK, b"x"), (LINK, secrets.token_bytes(32)), (LINK, channel.hello(FLEET, LINK))],
    ids=["none", "short", "guessed", "of another fleet"],
)
def test_a_stranger_may_send_nothing_to_the_bulk_port(
    tmp_path: Path, keys: Keys, hello: tuple[bytes, bytes] | None
) -> None:
    with encrypted(tmp_path, keys, keys) as pair, Stranger(bulk_port(pair, keys), hello) as stranger:
        stranger.socket.send_multipart([b"x"] * 1000)
        assert stranger.event() != zmq.EVENT_HANDSHAKE_SUCCEEDED
        if hello is not None:
            pair.run(lambda: pair.holder.endpoint.stats().dropped["hello"] >= 1)
        assert not pair.holder.endpoint._holder.out.poll(0)
        fetched(pair, range(3))


def test_frames_without_end_from_a_stranger_are_not_kept(tmp_path: Path, keys: Keys) -> None:
    """ZMTP by hand, as no ZeroMQ client would speak it: the handshake's first command never ends its message."""
    with encrypted(tmp_path, keys, keys) as pair:
        host, port = bulk_port(pair, keys).removeprefix("tcp://").rsplit(":", 1)
        with socket.create_connection((host, int(port))) as stranger:
            stranger.settimeout(10)
            stranger.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"PLAIN".ljust(20, b"\0") + bytes(32))
            with suppress(ConnectionError):
                for _ in range(1000):
                    stranger.sendall(b"\x01\x01x" * 1000)
                while stranger.recv(1 << 16):
                    pass
        assert not pair.holder.endpoint._holder.out.poll(0)
        fetched(pair, range(3))


def test_a_hello_of_another_link_is_counted_and_not_answered(tmp_path: Path, keys: Keys) -> None:
    hello = (LINK, channel.hello(keys.transfer, LINK))
    with encrypted(tmp_path, keys, keys) as pair, Stranger(bulk_port(pair, keys), hello) as stranger:
        hostile = [[b""], [b"x"] * 9, [channel.hello(keys.transfer, b"\x02" * LINK_BYTES)]]
        for frames in hostile:
            stranger.socket.send_multipart(frames)
        assert stranger.event() == zmq.EVENT_HANDSHAKE_SUCCEEDED
        pair.run(lambda: pair.holder.endpoint.stats().dropped["hello"] >= len(hostile))
        fetched(pair, range(3))
        assert not stranger.socket.poll(0)


def test_a_frame_too_long_for_a_hello_ends_the_connection(tmp_path: Path, keys: Keys) -> None:
    hello = (LINK, channel.hello(keys.transfer, LINK))
    with encrypted(tmp_path, keys, keys) as pair, Stranger(bulk_port(pair, keys), hello) as stranger:
        stranger.socket.send(bytes(1 << 20))
        assert stranger.event() == zmq.EVENT_HANDSHAKE_SUCCEEDED
        assert stranger.event() == zmq.EVENT_DISCONNECTED
        fetched(pair, range(3))


def test_sessions_are_bounded_and_the_oldest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sealing, "MAX_SESSIONS", 3)
    sessions = sealing.Sealing(FLEET, LAYOUT)
    links = [bytes([n + 1]) * LINK_BYTES for n in range(5)]
    for link in links:
        assert sessions.greet(link, channel.hello(FLEET, link)) is not None
    assert [sessions.seal(link, b"x", None) is not None for link in links] == [False, False, True, True, True]
    sessions.forget(links[4])
    assert sessions.seal(links[4], b"x", None) is None
    assert sessions.greet(links[0], channel.hello(FLEET, links[1])) is None


@pytest.mark.parametrize("ports", ["1/99999", "99999/1", "0/0"])
def test_ports_that_are_none_are_a_lost_peer(tmp_path: Path, keys: Keys, ports: str) -> None:
    with encrypted(tmp_path, keys, keys) as pair:
        peer = replace(pair.holder.endpoint.peer, kv_address=f"tcp://127.0.0.1:{ports}")
        pair.fetcher.endpoint.fetch(T, 1, peer, "", wanted([0]), 60)
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing) == ("peer_lost", (0,))


@pytest.mark.parametrize("bind", ["tcp://0.0.0.0:0", "tcp://*:7000", "tcp://[::]:7000"])
def test_a_wildcard_is_no_address_to_tell_others(bind: str, keys: Keys) -> None:
    with pytest.raises(StartupError, match="wildcard"):
        endpoint_at(bind, keys=keys)


def session() -> tuple[Sealer, Opener]:
    pool = BufferPool(1 << 12)
    return Sealer(FLEET, LINK, pool), Opener(FLEET, LINK, pool)


def opened(opener: Opener, frames: tuple[bytes, object]) -> tuple[bytes, bytes | None]:
    message, payload = opener.open(frames[0], frames[1])  # type: ignore[arg-type]
    return message, None if payload is None else bytes(payload)


def test_what_is_sealed_opens_and_hides_what_it_is() -> None:
    sealer, opener = session()
    for number in range(5):
        payload = bytes([number]) * 1000
        frame, sealed = sealer.seal(b"message", payload)
        assert sealed is not None
        assert b"message" not in frame
        assert payload not in bytes(sealed)
        assert opened(opener, (frame, sealed)) == (b"message", payload)
    assert opened(opener, sealer.seal(b"", None)) == (b"", None)


def test_no_number_is_used_twice_and_no_salt() -> None:
    sealer, _ = session()
    assert len({sealer.seal(b"same", None)[0] for _ in range(100)}) == 100
    assert len({bytes(sealer.seal(b"same", b"same")[1] or b"") for _ in range(100)}) == 100
    assert sealer.seal(b"", None)[0][:16] != session()[0].seal(b"", None)[0][:16]


def reason(opener: Opener, frame: bytes, payload: bytes | None) -> str:
    with pytest.raises(Unsealable) as refused:
        opener.open(frame, payload)
    return refused.value.reason


def test_a_repeated_or_late_message_is_refused_and_the_next_still_opens() -> None:
    sealer, opener = session()
    first, second, third = (sealer.seal(b"%d" % n, None)[0] for n in range(3))
    opener.open(second, None)
    assert reason(opener, second, None) == "replayed"
    assert reason(opener, first, None) == "replayed"
    assert opener.open(third, None)[0] == b"2"


def test_every_flipped_bit_is_refused() -> None:
    sealer, opener = session()
    opener.open(*sealer.seal(b"", None))
    frame, payload = sealer.seal(b"message", b"payload")
    assert payload is not None
    whole = bytes(payload)
    for at in range(8 * len(frame)):
        damaged = bytearray(frame)
        damaged[at // 8] ^= 1 << at % 8
        assert reason(opener, bytes(damaged), whole) in ("forged", "session", "replayed")
    for at in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[at // 8] ^= 1 << at % 8
        assert reason(opener, frame, bytes(damaged)) == "forged"
    assert opened(opener, (frame, whole)) == (b"message", b"payload")


def test_a_cut_message_or_one_of_other_frames_is_refused() -> None:
    sealer, opener = session()
    opener.open(*sealer.seal(b"", None))
    frame, payload = sealer.seal(b"message", b"payload")
    other, alone = sealer.seal(b"other", b"another")[0], sealer.seal(b"alone", None)[0]
    assert payload is not None
    whole = bytes(payload)
    assert {reason(opener, frame[:n], whole) for n in range(len(frame))} == {"truncated", "forged"}
    assert {reason(opener, frame, whole[:n]) for n in range(len(whole))} == {"truncated", "forged"}
    assert reason(opener, frame, None) == "forged"
    assert reason(opener, alone, whole) == "forged"
    assert reason(opener, other, whole) == "forged"


def test_another_session_fleet_or_link_is_refused() -> None:
    sealer, opener = session()
    opener.open(*sealer.seal(b"", None))
    pool = BufferPool(1)
    later = Sealer(FLEET, LINK, pool)
    later.seal(b"", None)
    assert reason(opener, later.seal(b"x", None)[0], None) == "session"
    for key, link in ((b"g" * 32, LINK), (FLEET, b"\x02" * LINK_BYTES)):
        assert reason(Opener(FLEET, LINK, pool), Sealer(key, link, pool).seal(b"x", None)[0], None) == "forged"


def test_a_hello_is_of_its_link_and_fleet() -> None:
    frame = channel.hello(FLEET, LINK)
    assert channel.is_hello(FLEET, LINK, frame)
    assert not channel.is_hello(FLEET, b"\x02" * LINK_BYTES, frame)
    assert not channel.is_hello(b"g" * 32, LINK, frame)
    assert not channel.is_hello(FLEET, LINK, frame[:-1])
    assert not channel.is_hello(FLEET, LINK[:-1], channel.hello(FLEET, LINK[:-1]))
    assert all(channel.new_link()[0] != 0 for _ in range(300))
