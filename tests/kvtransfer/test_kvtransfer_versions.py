"""A KV endpoint of the version before against the present one: the old side is played by hand, byte for byte."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
import xxhash
import zmq

from kvtransfer.integrity import digest
from mesh.messages import FIRST, Peer
from mesh.wire import KV, Versions
from tests.kvtransfer.pairs import LAYOUT, Clock, Pair, Side, connected, content, make_side, name, transfer_id, wanted

BEFORE = KV.highest - 1
FETCH, BLOCKS, CONFIRM, STANDING = 32, 33, 36, 39
OLD, NEW = 77, 7
T = transfer_id(1)
WAIT_MS = 10_000
OLD_LAYOUT = [LAYOUT.layers, LAYOUT.kv_heads, LAYOUT.head_dim, LAYOUT.block_tokens, LAYOUT.dtype]


def frame(tag: int, sender: int, receiver: int, body: list[Any]) -> bytes:
    """As the release before wrote it."""
    packed: bytes = msgpack.packb([BEFORE, tag, sender, receiver, body])
    return packed + xxhash.xxh3_64_digest(packed)


def body_of(received: bytes, tag: int) -> list[Any]:
    """As the release before read it: no frame of another version, no field more."""
    assert xxhash.xxh3_64_digest(received[:-8]) == received[-8:]
    version, found, _, _, body = msgpack.unpackb(received[:-8])
    assert (version, found) == (BEFORE, tag)
    fields: list[Any] = body
    return fields


@contextmanager
def alone(folder: Path, worker: str, incarnation: int) -> Iterator[tuple[Side, Pair, zmq.Context[zmq.Socket[bytes]]]]:
    """One present endpoint, pumped by hand."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    clock = Clock()
    side = make_side(context, folder, "zmq-ipc", clock, worker=worker, incarnation=incarnation)
    pair = Pair(side, side, clock)
    pair.sides = [side]
    try:
        yield side, pair, context
    finally:
        side.endpoint.close()
        context.destroy(linger=0)


def test_an_old_fetcher_gets_blocks_of_a_present_holder(tmp_path: Path) -> None:
    with alone(tmp_path, "p", NEW) as (holder, pair, context):
        holder.hold([0, 1])
        old = context.socket(zmq.DEALER)
        old.connect(holder.endpoint.address)
        wants = [[n, name(n), LAYOUT.block_tokens] for n in (0, 1)]
        old.send(frame(FETCH, OLD, NEW, [T, 1, 0, "", OLD_LAYOUT, [["zmq", ""]], wants, 8, 0, 60.0]))
        pair.run(lambda: holder.endpoint.stats().blocks_out == 2)
        assert body_of(old.recv(), STANDING)[1][0][0] == T
        head, payload = old.recv_multipart()
        _, _, place, blocks = body_of(head, BLOCKS)
        assert place == ["zmq", "", 0, 0]
        assert payload == content(name(0)) + content(name(1))
        for n, header in enumerate(blocks):
            part = content(name(n))
            fitting = digest(T, 1, NEW, OLD, n, name(n), LAYOUT.block_tokens, part)
            assert header == [n, name(n), LAYOUT.block_tokens, len(part), fitting]
        assert body_of(old.recv(), STANDING)[1][0][3] == "closed"
        old.send(frame(CONFIRM, OLD, NEW, [T, 1]))
        pair.run(lambda: holder.endpoint.stats().serving == 0)
        assert holder.endpoint.stats().dropped == {}


def test_a_present_fetcher_gets_blocks_of_an_old_holder(tmp_path: Path) -> None:
    with alone(tmp_path, "d", NEW) as (fetcher, pair, context):
        old = context.socket(zmq.ROUTER)
        old.bind(f"ipc://{tmp_path}/old")
        peer = Peer("p", OLD, f"ipc://{tmp_path}/old", "here", None, FIRST)
        fetcher.endpoint.fetch(T, 1, peer, "", wanted([5]), 60)
        pair.run(lambda: old.poll(0))
        link, asked = old.recv_multipart()
        body = body_of(asked, FETCH)
        assert (body[0], body[4], body[6]) == (T, OLD_LAYOUT, [[5, name(5), LAYOUT.block_tokens]])
        part = content(name(5))
        proof = digest(T, 1, OLD, NEW, 5, name(5), LAYOUT.block_tokens, part)
        header = [5, name(5), LAYOUT.block_tokens, len(part), proof]
        old.send_multipart((link, frame(BLOCKS, OLD, NEW, [T, 1, ["zmq", "", 0, 0], [header]]), part))
        stand = [T, 1, 0, "closed", 1, body[7], 0, 0]
        old.send_multipart((link, frame(STANDING, OLD, NEW, [0, [stand]])))
        assert pair.finish(T).outcome == "ok"
        assert fetcher.blocks(T) == {5: part}
        pair.run(lambda: old.poll(0))
        assert body_of(old.recv_multipart()[1], CONFIRM) == [T, 1]


def test_two_present_ones_use_the_highest(tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        pair.holder.hold([0])
        pair.fetch(T, "s", wanted([0]))
        pair.run(lambda: pair.holder.endpoint._holder.state.leases)
        (lease,) = pair.holder.endpoint._holder.state.leases.values()
        assert lease.version == KV.highest


@pytest.mark.parametrize("spoken", [Versions(7, 8), Versions(1, 3)])
def test_without_a_common_version_a_holder_is_not_asked(spoken: Versions, tmp_path: Path) -> None:
    with connected(tmp_path) as pair:
        peer = replace(pair.holder.endpoint.peer, kv=spoken)
        pair.fetcher.endpoint.fetch(T, 1, peer, "", wanted([0]), 60)
        ended = pair.finish(T)
        assert (ended.outcome, ended.missing) == ("refused", (0,))
        assert ended.detail == f"p speaks KV protocol {spoken} and this worker {KV}"
