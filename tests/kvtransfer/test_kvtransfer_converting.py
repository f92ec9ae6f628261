"""Blocks between endpoints whose pools differ: named, sized and checked as the holder has them, converted into the
fetcher's pages. Every page is compared with the same numbers cut and converted by plain torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import zmq
from torch import Tensor

from engine.engine import Engine, EngineConfig
from engine.request import EngineRequest
from engine.step import Missing, Row, Sampled
from kernels.blocks import allocate_pool, read_block, write_block
from kernels.conversion import numbers_of, write_part
from kvtransfer.endpoint import BlockArrived, Wanted
from kvtransfer.sockets import Context
from kvtransfer.transports.local import Exchange
from mesh import blockhash
from mesh.keys import WORKER, Keys, create, load
from mesh.layout import KvLayout
from mesh.params import SamplingParams
from mesh.pieces import Piece
from tests.kvtransfer.pairs import ROUTES, Clock, Pair, Side, make_side, transfer_id

CPU = torch.device("cpu")
ROOT = b"r" * 16
NUM_TOKENS = 150
"""Two blocks of 64 and a tail of 22; nine of 16 and one of 6."""
TOKENS = list(range(NUM_TOKENS))
LAYOUT = KvLayout(layers=2, kv_heads=4, head_dim=64, block_tokens=16, dtype="float32")


class Pages:
    """A runner that never runs: pages, and the kernels that write into them."""

    decodes_ahead = False

    def __init__(self, layout: KvLayout) -> None:
        self.layout = layout
        self.num_blocks = 32
        self.pool = allocate_pool((self.num_blocks, *layout.shape), getattr(torch, layout.dtype), CPU)

    def run(self, rows: Sequence[Row]) -> list[Sampled]:
        raise AssertionError("nothing is computed here")

    def read_block(self, block: int, valid_tokens: int) -> bytes:
        return read_block(self.pool, block, valid_tokens)

    def write_block(self, block: int, payload: bytes | memoryview) -> None:
        write_block(self.pool, block, payload)

    def write_parts(self, payload: bytes | memoryview, theirs: KvLayout, parts: Sequence[tuple[int, Piece]]) -> None:
        numbers = numbers_of(payload, theirs.shape, getattr(torch, theirs.dtype), CPU)
        for block, piece in parts:
            write_part(self.pool, block, piece.target, numbers, piece.source)


def numbers() -> Tensor:
    """`[layers, 2, kv_heads, tokens, head_dim]` of the whole sequence; some are beyond float16."""
    generator = torch.Generator().manual_seed(7)
    shape = (LAYOUT.layers, 2, LAYOUT.kv_heads, NUM_TOKENS, LAYOUT.head_dim)
    return torch.randn(shape, generator=generator) * 10 ** (torch.rand(shape, generator=generator) * 6)


def in_format(values: Tensor, dtype: str) -> Tensor:
    limit = torch.finfo(getattr(torch, dtype)).max
    return values.clamp(-limit, limit).to(getattr(torch, dtype))


def block_of(values: Tensor, layout: KvLayout, index: int) -> Tensor:
    """A block of the sequence in `layout`, zero behind its end."""
    block = torch.zeros(layout.shape, dtype=getattr(torch, layout.dtype))
    start = index * layout.block_tokens
    part = values[:, :, list(layout.heads), start : start + layout.block_tokens]
    block[:, :, :, : part.shape[3]] = in_format(part, layout.dtype)
    return block


def hold(side: Side) -> None:
    """The whole sequence, as this side's engine has it."""
    layout, values = side.endpoint.layout, numbers()
    for index, (name, _) in enumerate(blockhash.cut(ROOT, TOKENS, layout.block_tokens)):
        side.held[name] = block_of(values, layout, index).view(torch.uint8).numpy().tobytes()


@dataclass(slots=True, eq=False)
class Receiver:
    """A fetching endpoint and the engine behind it."""

    side: Side
    pages: Pages
    engine: Engine
    request: EngineRequest
    missing: tuple[Missing, ...] = ()

    def expect(self, theirs: KvLayout) -> None:
        equal = self.side.endpoint.layout.taking(theirs).equal
        self.missing = self.engine.expect(self.request, None if equal else theirs)

    def bring(self, holder: Side, clock: Clock, number: int) -> None:
        """Fetches all that is missing from one holder and writes what comes."""
        pair = Pair(self.side, holder, clock)
        pair.fetch(transfer_id(number), "", [Wanted(m.index, m.hash, m.valid_tokens) for m in self.missing])
        ended = pair.finish(transfer_id(number))
        assert (ended.outcome, ended.corrupt) == ("ok", 0)
        theirs = holder.endpoint.layout
        for event in self.side.of(BlockArrived):
            if event.transfer_id == transfer_id(number):
                equal = self.side.endpoint.layout.taking(theirs).equal
                self.engine.fill(self.request.key, event.index, event.payload, None if equal else theirs)
        self.engine.check()

    def assert_holds_all(self, formats: Sequence[str]) -> None:
        """Every page has its part of the sequence after passing through these number formats."""
        values = numbers()
        for dtype in formats:
            values = in_format(values, dtype).float()
        layout = self.pages.layout
        assert sorted(self.request.fetched_pages) == list(range(-(-NUM_TOKENS // layout.block_tokens)))
        for index, page in self.request.fetched_pages.items():
            valid = min(layout.block_tokens, NUM_TOKENS - index * layout.block_tokens)
            found, wanted = self.pages.pool[page], block_of(values, layout, index)
            assert torch.equal(found[..., :valid, :].float(), wanted[..., :valid, :].float()), index
            assert bool(found.float().isfinite().all())


@contextmanager
def ends(
    folder: Path,
    own: Sequence[KvLayout],
    theirs: Sequence[KvLayout],
    route: str = "zmq-ipc",
    keys: Keys | None = None,
) -> Iterator[tuple[list[Receiver], list[Side], Clock]]:
    """Receivers with the layouts `own` and holders of the whole sequence in the layouts `theirs`."""
    clock, exchange = Clock(), Exchange()
    with ExitStack() as stack:

        def side(worker: str, incarnation: int, layout: KvLayout) -> Side:
            context: Context = zmq.Context()
            made = make_side(
                context,
                folder,
                route,
                clock,
                worker=worker,
                incarnation=incarnation,
                exchange=exchange,
                layout=layout,
                keys=keys,
            )
            stack.callback(context.term)
            stack.callback(made.endpoint.close)
            return made

        holders = [side("p", 7 + n, layout) for n, layout in enumerate(theirs)]
        for holder in holders:
            hold(holder)
        receivers = []
        for n, layout in enumerate(own):
            pages = Pages(layout)
            engine = Engine(pages, EngineConfig(4, 64, 400))
            request = EngineRequest("a", list(TOKENS), NUM_TOKENS, SamplingParams(max_tokens=4), ROOT)
            receivers.append(Receiver(side("d", 20 + n, layout), pages, engine, request))
        yield receivers, holders, clock


def check(folder: Path, own: KvLayout, theirs: KvLayout, route: str = "zmq-ipc", keys: Keys | None = None) -> None:
    with ends(folder, [own], [theirs], route, keys) as ((receiver,), (holder,), clock):
        receiver.expect(theirs)
        receiver.bring(holder, clock, 1)
        receiver.assert_holds_all([theirs.dtype, own.dtype])


SIZES = [(16, 64), (64, 16), (16, 24)]
FORMATS = [("float32", "bfloat16"), ("bfloat16", "float16"), ("float16", "float32"), ("bfloat16", "float8_e4m3fn")]


@pytest.mark.parametrize(("theirs", "own"), [(64, 64), *SIZES])
def test_unequal_block_sizes(theirs: int, own: int, tmp_path: Path) -> None:
    check(tmp_path, replace(LAYOUT, block_tokens=own), replace(LAYOUT, block_tokens=theirs))


@pytest.mark.parametrize(("theirs", "own"), FORMATS)
def test_unequal_number_formats(theirs: str, own: str, tmp_path: Path) -> None:
    check(tmp_path, replace(LAYOUT, dtype=own), replace(LAYOUT, dtype=theirs))


@pytest.mark.parametrize(("theirs", "own"), SIZES)
def test_both_at_once(theirs: int, own: int, tmp_path: Path) -> None:
    check(
        tmp_path,
        replace(LAYOUT, block_tokens=own, dtype="bfloat16"),
        replace(LAYOUT, block_tokens=theirs, dtype="float32"),
    )


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(("theirs", "own"), [(128, 16), (16, 128)])
def test_every_transport_carries_blocks_of_the_holders_size(route: str, theirs: int, own: int, tmp_path: Path) -> None:
    """Large ones, which travel alone, to a fetcher whose own travel together, and the other way round."""
    check(
        tmp_path,
        replace(LAYOUT, block_tokens=own, dtype="bfloat16"),
        replace(LAYOUT, block_tokens=theirs),
        route,
    )


@pytest.mark.parametrize(("theirs", "own"), [(512, 64), (16, 128)])
def test_a_group_carries_parcels_of_the_holders_size(theirs: int, own: int, tmp_path: Path) -> None:
    """Larger than the largest of one's own: a block of 2 MiB that travels alone, or ten together."""
    layouts = replace(LAYOUT, block_tokens=own), replace(LAYOUT, block_tokens=theirs)
    with ends(tmp_path, [layouts[0]], [layouts[1]], "gloo") as ((receiver,), (holder,), clock):
        receiver.expect(layouts[1])
        receiver.bring(holder, clock, 1)
        receiver.assert_holds_all(["float32"])
        stats = receiver.side.endpoint.stats()
        assert set(stats.bytes_in) == {"gloo"}
        assert "transport" not in stats.dropped


@pytest.mark.parametrize(("theirs", "own"), [(64, 16), (16, 64)])
def test_sealed_blocks_are_of_the_holders_size(theirs: int, own: int, tmp_path: Path) -> None:
    create(tmp_path / "keys")
    keys = load(str(tmp_path / "keys"), WORKER)
    check(tmp_path, replace(LAYOUT, block_tokens=own), replace(LAYOUT, block_tokens=theirs), "zmq-tcp", keys)


def cut_into(degree: int, **changes: int | str) -> list[KvLayout]:
    """The slices of a tensor-parallel worker's ranks."""
    return [replace(LAYOUT, tp=degree, rank=rank, **changes) for rank in range(degree)]  # type: ignore[arg-type]


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("changes", [{}, {"block_tokens": 64}, {"dtype": "float16", "block_tokens": 24}])
def test_all_heads_from_a_holder_of_each_slice(degree: int, changes: dict[str, int | str], tmp_path: Path) -> None:
    theirs = cut_into(degree, **changes)
    with ends(tmp_path, [LAYOUT], theirs) as ((receiver,), holders, clock):
        receiver.expect(theirs[0])
        for number, holder in enumerate(holders):
            assert receiver.request.fetched_pages == {}, "no block is whole before its last slice"
            receiver.bring(holder, clock, number)
        receiver.assert_holds_all([theirs[0].dtype])


@pytest.mark.parametrize("degree", [2, 4])
@pytest.mark.parametrize("changes", [{}, {"block_tokens": 64, "dtype": "bfloat16"}])
def test_each_slice_from_a_holder_of_all_heads(degree: int, changes: dict[str, int | str], tmp_path: Path) -> None:
    with ends(tmp_path, cut_into(degree, **changes), [LAYOUT]) as (receivers, (holder,), clock):
        for number, receiver in enumerate(receivers):
            receiver.expect(LAYOUT)
            receiver.bring(holder, clock, number)
            receiver.assert_holds_all([receiver.pages.layout.dtype])


@pytest.mark.parametrize(
    ("own", "theirs"), [(cut_into(2)[1], cut_into(4)[2:]), (cut_into(4)[1], cut_into(2)[:1])], ids=["merge", "split"]
)
def test_slices_of_unequal_degrees(own: KvLayout, theirs: list[KvLayout], tmp_path: Path) -> None:
    with ends(tmp_path, [own], theirs) as ((receiver,), holders, clock):
        receiver.expect(theirs[0])
        for number, holder in enumerate(holders):
            receiver.bring(holder, clock, number)
        receiver.assert_holds_all(["float32"])


def test_a_slice_that_does_not_come_makes_every_block_a_miss(tmp_path: Path) -> None:
    theirs = cut_into(2)
    with ends(tmp_path, [LAYOUT], theirs) as ((receiver,), holders, clock):
        receiver.expect(theirs[0])
        receiver.bring(holders[0], clock, 1)
        assert receiver.engine.load().held_blocks == 10
        assert receiver.engine.ready("a") == NUM_TOKENS
        assert receiver.engine.load().held_blocks == 0
        assert receiver.engine.snapshot() == ()


def test_a_slice_without_a_common_head_is_refused(tmp_path: Path) -> None:
    first, second = cut_into(2)
    with ends(tmp_path, [first], [second]) as ((receiver,), (holder,), clock):
        pair = Pair(receiver.side, holder, clock)
        pair.fetch(transfer_id(1), "", [Wanted(0, bytes(16), 16)])
        ended = pair.finish(transfer_id(1))
        assert (ended.outcome, ended.detail) == (
            "refused",
            "layout: rank 1 of 2 -> 0 of 2: no head in common",
        )
