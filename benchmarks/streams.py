"""What the proxy itself costs per streamed token: many streams through one proxy process, beside a bare server.

    python -m benchmarks.streams [--streams 1000] [--tokens 40] [--rounds 2] [--pace 0.1]

This process is the workers and the clients: it speaks the workers' control protocol to a real proxy process, asks it
for `--streams` chat streams over as many connections, and per step sends one token for each of them. The bare server is
uvicorn with uvloop and an ASGI function that sends the same frames when it is told that a step is done. Both are driven
alike, in turn:

- flat out: the next step begins when every stream has the last one's token; tokens per second of wall time
- paced: a step every `--pace` seconds; from a step's beginning to a token's arrival, p50 and p99

Processor time and memory are those of the server process alone (/proc), so that what runs beside it matters little for
them. Every stream's text and finish are checked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop
import zmq

from benchmarks.measure import machine, table
from mesh import wire
from mesh.layout import KvLayout
from mesh.messages import Beat, Decode, Load, Register, TokenBatch, TokenDelta, Welcome, WorkerInfo
from mesh.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "deploy" / "demo_model"
WORD = "a"
BEAT_S = 0.5
READY_S = 60.0
TICKS = os.sysconf("SC_CLK_TCK")
PAGE = resource.getpagesize()
LAYOUT = KvLayout(layers=5, kv_heads=2, head_dim=64, block_tokens=16, dtype="bfloat16")
IDLE = Load(0, 0, 0, 0, 1 << 20, 0, 0, 0, 1e6)


@dataclass(slots=True)
class Client(asyncio.Protocol):
    """One connection that reads one stream."""

    request: bytes
    frame: bytes
    """What every frame with a token contains."""
    on_token: Callable[[], None]
    ended: asyncio.Future[None]
    received: bytearray = field(default_factory=bytearray)
    tokens: int = 0
    arrivals: list[float] = field(default_factory=list)
    transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        for _ in range(data.count(self.frame)):
            self.tokens += 1
            self.arrivals.append(time.monotonic())
            self.on_token()
        if data.endswith(b"0\r\n\r\n") and not self.ended.done():
            self.ended.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.ended.done():
            self.ended.set_exception(error or ConnectionError("the server closed a stream"))


class Steps:
    """Counts tokens of one step over all streams."""

    def __init__(self, streams: int) -> None:
        self._streams = streams
        self._arrived = 0
        self._done: asyncio.Event = asyncio.Event()
        self.begun: list[float] = []

    def token(self) -> None:
        self._arrived += 1
        if self._arrived == self._streams * len(self.begun):
            self._done.set()

    def begin(self) -> None:
        self._done.clear()
        self.begun.append(time.monotonic())

    async def done(self) -> None:
        await asyncio.wait_for(self._done.wait(), READY_S)


class Backend:
    """Workers of the proxy, played here."""

    def __init__(self, control: str, token: int) -> None:
        self._token = token
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.connect(control)
        self._loop = asyncio.get_running_loop()
        self.jobs: list[Decode] = []
        self.welcome = asyncio.Event()
        self._loop.add_reader(int(self._socket.getsockopt(zmq.FD)), self._drain)
        self._send(Register(_worker()))
        self._beats = asyncio.create_task(self._beat())

    async def close(self) -> None:
        self._beats.cancel()
        self._loop.remove_reader(int(self._socket.getsockopt(zmq.FD)))
        self._socket.close(0)
        self._context.term()

    def step(self, index: int, last: bool) -> None:
        """One token for every request."""
        finish = "length" if last else None
        deltas = [TokenDelta(j.request_id, j.attempt, index, (self._token,), (), finish, None, ()) for j in self.jobs]
        self._send(TokenBatch(tuple(deltas)))

    async def _beat(self) -> None:
        while True:
            self._send(Beat(1, False, IDLE))
            await asyncio.sleep(BEAT_S)

    def _send(self, message: Any) -> None:
        self._socket.send(wire.encode(message, 1))
        self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        while not self._socket.closed:
            try:
                message = wire.decode(self._socket.recv(zmq.NOBLOCK)).message
            except zmq.Again:
                return
            if isinstance(message, Welcome):
                self.welcome.set()
            elif isinstance(message, Decode):
                self.jobs.append(message)


def _worker() -> WorkerInfo:
    return WorkerInfo(
        worker_id="both-0",
        incarnation=1,
        role="both",
        kv_address="ipc:///nowhere",
        host="elsewhere",
        pid=os.getpid(),
        model="demo",
        model_digest=b"digest",
        layout=LAYOUT,
        total_blocks=1 << 20,
        max_model_len=8192,
        max_num_seqs=4096,
        max_num_batched_tokens=8192,
        step_bound_s=60.0,
    )


@dataclass(slots=True)
class Server:
    """A server process and how its steps are triggered."""

    pid: int
    port: int
    step: Callable[[int, bool], None]
    ready: Callable[[int], AsyncIterator[None]] | None = None
    backend: Backend | None = None

    @property
    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    @property
    def memory(self) -> int:
        """Resident bytes."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * PAGE


@dataclass(slots=True)
class Result:
    """Of one round."""

    tokens_per_s: float
    cpu_us: float
    """Of the server, per token, flat out."""
    memory_kb: float
    """Per stream."""
    p50_ms: float
    p99_ms: float
    paced_cpu_us: float


@contextmanager
def process(*arguments: str, **more: Any) -> Iterator[subprocess.Popen[bytes]]:
    child = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, **more)
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(20)
        except subprocess.TimeoutExpired:  # after a failure clients may still be connected
            child.kill()
            child.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def proxy(streams: int) -> AsyncIterator[Server]:
    token = Tokenizer.load(str(MODEL)).encode(WORD, add_special_tokens=False)
    if len(token) != 1:
        raise SystemExit(f"{WORD!r} is {len(token)} tokens of the demo model; choose another word")
    with tempfile.TemporaryDirectory() as directory:
        port, control = free_port(), f"ipc://{directory}/control"
        limit = str(2 * streams)
        arguments = ("-m", "proxy", str(MODEL), "--port", str(port), "--control", control, "--log-level", "warning")
        with process(*arguments, "--max-concurrent-requests", limit) as child:
            backend = Backend(control, token[0])
            try:
                await asyncio.wait_for(backend.welcome.wait(), READY_S)
                await _listening(port)
                yield Server(child.pid, port, backend.step, backend=backend)
            finally:
                await backend.close()


@asynccontextmanager
async def bare(frame: bytes) -> AsyncIterator[Server]:
    """`frame`: what it sends per token."""
    here, there = socket.socketpair()
    port = free_port()
    arguments = ("-m", "benchmarks.streams", "--bare", str(there.fileno()), str(port), frame.hex())
    with here, there, process(*arguments, pass_fds=(there.fileno(),)) as child:
        await _listening(port)
        yield Server(child.pid, port, lambda index, last: here.sendall(b"!" if last else b"."))


async def _listening(port: int) -> None:
    async with asyncio.timeout(READY_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
                continue
            writer.close()
            return


async def measured(server: Server, streams: int, tokens: int, pace: float) -> tuple[Result, bytes]:
    """One round; and the frame of one token as it came."""
    flat, _ = await _run(server, streams, tokens, 0.0)
    paced, frame = await _run(server, streams, tokens, pace)
    return Result(flat[0], flat[1], flat[2], paced[3], paced[4], paced[1]), frame


async def _run(
    server: Server, streams: int, tokens: int, pace: float
) -> tuple[tuple[float, float, float, float, float], bytes]:
    loop, steps = asyncio.get_running_loop(), Steps(streams)
    memory = server.memory
    body = {
        "model": MODEL.name,
        "messages": [{"role": "user", "content": "Say it again."}],
        "max_tokens": tokens,
        "stream": True,
        "ignore_eos": True,
        "temperature": 0,
    }
    text = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n"
    request = head.encode() + b"Content-Type: application/json\r\n\r\n" + text
    if server.backend is not None:
        server.backend.jobs.clear()
    clients = []
    for _ in range(streams):
        client = Client(request, b'"content":"' + WORD.encode(), steps.token, loop.create_future())
        await loop.create_connection(lambda c=client: c, "127.0.0.1", server.port)  # type: ignore[misc]
        clients.append(client)
    async with asyncio.timeout(READY_S):
        while not _under_way(server, clients):
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.5)
    cpu, began = server.cpu_s, time.monotonic()
    held = 0
    for index in range(tokens):
        steps.begin()
        server.step(index, index == tokens - 1)
        await steps.done()
        if index == tokens // 2:
            held = server.memory - memory
        if pace:
            await asyncio.sleep(max(0.0, began + (index + 1) * pace - time.monotonic()))
    wall, cpu = time.monotonic() - began, server.cpu_s - cpu
    await asyncio.wait_for(asyncio.gather(*(c.ended for c in clients)), READY_S)
    for client in clients:
        _check(client, tokens)
        client.transport.close()
    late = [1e3 * (at - steps.begun[i]) for c in clients for i, at in enumerate(c.arrivals)]
    cuts = statistics.quantiles(late, n=100)
    return (streams * tokens / wall, 1e6 * cpu / streams / tokens, held / 1024 / streams, cuts[49], cuts[98]), (
        _token_frame(bytes(clients[0].received))
    )


def _under_way(server: Server, clients: list[Client]) -> bool:
    """All of them: at the proxy's workers; with the bare server's heads."""
    if server.backend is not None:
        return len(server.backend.jobs) == len(clients)
    return all(client.received for client in clients)


def _check(client: Client, tokens: int) -> None:
    body = bytes(client.received)
    if not body.startswith(b"HTTP/1.1 200"):
        raise SystemExit(f"a stream was refused: {body[:300]!r}")
    if client.tokens != tokens or body.count(b'"finish_reason":"length"') != 1 or b"[DONE]" not in body:
        raise SystemExit(f"a stream is not whole: {client.tokens} of {tokens} tokens")


def _token_frame(body: bytes) -> bytes:
    at = body.index(b'"content":"' + WORD.encode())
    start = body.rindex(b"data: ", 0, at)
    return body[start : body.index(b"\n\n", at) + 2]


async def compared(options: argparse.Namespace) -> None:
    print(f"{machine()}; {options.streams} streams, {options.tokens} tokens each", flush=True)
    found: dict[str, list[Result]] = {"kvmesh proxy": [], "bare uvicorn": []}
    for _ in range(options.rounds):
        async with proxy(options.streams) as server:
            result, frame = await measured(server, options.streams, options.tokens, options.pace)
            found["kvmesh proxy"].append(result)
        async with bare(frame) as server:
            result, _ = await measured(server, options.streams, options.tokens, options.pace)
            found["bare uvicorn"].append(result)
    header = ["", "tokens/s", "CPU µs/token", "CPU µs/token, paced", "KiB/stream", "p50 ms", "p99 ms"]
    rows = []
    for name, results in found.items():
        values = [
            [r.tokens_per_s for r in results],
            [r.cpu_us for r in results],
            [r.paced_cpu_us for r in results],
            [r.memory_kb for r in results],
            [r.p50_ms for r in results],
            [r.p99_ms for r in results],
        ]
        rows.append([name, *(f"{statistics.median(v):.0f}" for v in values)])
    print(table(header, rows))
    print(f"p50 and p99: from a step's beginning to a token's arrival, a step every {options.pace * 1e3:.0f} ms")
    pairs = list(zip(*found.values(), strict=True))
    for what, ratios in (
        ("tokens/s over bare", [a.tokens_per_s / b.tokens_per_s for a, b in pairs]),
        ("bare's CPU time over ours", [b.cpu_us / a.cpu_us for a, b in pairs]),
    ):
        print(f"{what}: {', '.join(f'{r:.2f}' for r in ratios)}")


def serve_bare(descriptor: int, port: int, frame: bytes) -> None:
    """Sends `frame` to every stream with each byte that comes; `!` is the last one."""
    import uvicorn

    trigger = socket.socket(fileno=descriptor)
    trigger.setblocking(False)
    waiting: list[asyncio.Queue[bytes]] = []
    last = frame.replace(b'"finish_reason":null', b'"finish_reason":"length"') + b"data: [DONE]\n\n"

    async def triggers() -> None:
        loop = asyncio.get_running_loop()
        while True:
            marks = await loop.sock_recv(trigger, 4096)
            if not marks:
                return
            for mark in marks:
                for queue in waiting:
                    queue.put_nowait(last if mark == ord("!") else frame)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        waiting.append(queue)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})
        more = True
        while more:
            body = await queue.get()
            more = body is not last
            await send({"type": "http.response.body", "body": body, "more_body": more})
        waiting.remove(queue)

    async def main() -> None:
        config = uvicorn.Config(app, port=port, log_level="warning", lifespan="off", http="httptools", backlog=4096)
        task = asyncio.create_task(triggers())
        await uvicorn.Server(config).serve()
        task.cancel()

    uvloop.run(main())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pace", type=float, default=0.1, help="seconds of a step in the paced part")
    parser.add_argument("--bare", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        descriptor, port, frame = options.bare
        serve_bare(int(descriptor), int(port), bytes.fromhex(frame))
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4 * options.streams + 256)), hard))
    uvloop.run(compared(options))


if __name__ == "__main__":
    main()
