"""How much of a transfer the client waits for: blocks travel while later chunks of the prompt are still computed.

    python -m benchmarks.overlap [--prompt 2048] [--chunk 256] [--rounds 8] [--transport shm] [--blocks 400]

This process is the proxy of one real prefill and one real decode worker with a random 25 M Llama. The same prompt goes
two ways, in turn, with nothing cached: the decode worker hears of it with the prefill worker, as always; or only when
the first token is there, so that nothing overlaps. From the first token to the decode worker's own first one, less the
step that made it as that worker reports it, is what of the transfer is exposed. Both ways must give the same tokens.
"""

from __future__ import annotations

import argparse
import os
import random
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import zmq

from benchmarks.measure import machine, table
from benchmarks.servers import VOCAB, make_model
from mesh import wire
from mesh.launcher import WORKER_LOAD_TIME_DEFAULTS
from mesh.messages import Decode, Peer, Prefill, ProxyBeat, Register, TokenBatch, TokenDelta, Welcome, WorkerInfo
from mesh.params import SamplingParams

TOKENS = 12
"""Generated per request."""
READY_S = 120.0
BEAT_S = 2.0
LEASE_S = 10.0
PATIENCE_S = 60.0


@dataclass(slots=True)
class Timed:
    """One request."""

    exposed_s: float
    tokens: list[int]
    transfer_bytes: int


class Proxy:
    """The control socket and nothing else."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], address: str) -> None:
        self._socket = context.socket(zmq.ROUTER)
        self._socket.linger = 0
        self._socket.bind(address)
        self._names: dict[str, bytes] = {}
        self.workers: dict[str, WorkerInfo] = {}
        self._beaten = 0.0

    def close(self) -> None:
        self._socket.close()

    def send(self, worker: str, message: Any) -> None:
        frame = wire.encode(message, 1, self.workers[worker].incarnation)
        self._socket.send_multipart((self._names[worker], frame))

    def peer(self, worker: str) -> Peer:
        info = self.workers[worker]
        return Peer(info.worker_id, info.incarnation, info.kv_address, info.host, info.layout)

    def deltas(self, timeout_s: float) -> Iterator[TokenDelta]:
        """Of the messages that come until some hold tokens."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            if time.monotonic() >= self._beaten + BEAT_S:
                self._beaten = time.monotonic()
                for worker in self.workers:
                    self.send(worker, ProxyBeat("bench"))
            if not self._socket.poll(100):
                continue
            name, frame = self._socket.recv_multipart()
            message = wire.decode(frame).message
            if isinstance(message, Register):
                self._names[message.worker.worker_id] = name
                self.workers[message.worker.worker_id] = message.worker
                self.send(message.worker.worker_id, Welcome("bench", LEASE_S))
            elif isinstance(message, TokenBatch):
                yield from message.deltas
                return

    def wait_for(self, count: int) -> None:
        end = time.monotonic() + READY_S
        while len(self.workers) < count:
            if time.monotonic() > end:
                raise SystemExit("the workers did not register")
            list(self.deltas(1.0))


def request(proxy: Proxy, prompt: list[int], *, overlapped: bool) -> Timed:
    """Runs one request; the two workers' first tokens are told apart by their index."""
    id, root = secrets.token_hex(8), secrets.token_bytes(16)  # a root of its own: nothing is cached
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0)
    common = (id, 1, tuple(prompt), len(prompt), params, root, PATIENCE_S)
    decode = Decode(*common, proxy.peer("prefill-0"), (), 0)
    proxy.send("prefill-0", Prefill(*common, ()))
    if overlapped:
        proxy.send("decode-0", decode)
    tokens: dict[int, int] = {}
    arrived: dict[int, float] = {}
    moved = 0
    first_step_s = 0.0
    while len(tokens) < TOKENS:
        new = list(proxy.deltas(PATIENCE_S))
        if not new:
            raise SystemExit("no token came")
        now = time.perf_counter()
        for delta in new:
            if delta.report is not None:
                moved = max(moved, delta.report.transfer_bytes)
                if delta.index > 0:
                    first_step_s = delta.report.compute_s
            for offset, token in enumerate(delta.tokens):
                tokens.setdefault(delta.index + offset, token)
                arrived.setdefault(delta.index + offset, now)
        if not overlapped and len(tokens) == 1:
            overlapped = True
            proxy.send("decode-0", decode)
    return Timed(arrived[1] - arrived[0] - first_step_s, [tokens[i] for i in range(TOKENS)], moved)


@contextmanager
def worker(role: str, model: Path, folder: str, options: argparse.Namespace) -> Iterator[None]:
    flags = ["--role", role, "--worker-id", f"{role}-0", "--proxy", f"ipc://{folder}/control", "--threads", "1"]
    flags += [
        "--kv-bind",
        f"ipc://{folder}/{role}.kv",
        "--transport",
        options.transport,
        "--kv-blocks",
        str(options.blocks),
    ]
    flags += ["--max-num-batched-tokens", str(options.chunk), "--metrics-bind", "", "--log-level", "warning"]
    environment = {**WORKER_LOAD_TIME_DEFAULTS, **os.environ}
    child = subprocess.Popen([sys.executable, "-m", role, *flags, str(model)], env=environment)
    try:
        yield
    finally:
        child.terminate()
        child.wait(30)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--chunk", type=int, default=256, help="tokens of a prefill step")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--transport", default="shm", help="shm or zmq")
    parser.add_argument(
        "--blocks",
        type=int,
        default=400,
        help="of a pool: few are soon used again, and a page used first costs its zeroing",
    )
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model = make_model(Path(folder))
        proxy = Proxy(zmq.Context.instance(), f"ipc://{folder}/control")
        stack.callback(proxy.close)
        for role in ("prefill", "decode"):
            stack.enter_context(worker(role, model, folder, options))
        proxy.wait_for(2)
        times: dict[bool, list[Timed]] = {True: [], False: []}
        for number in range(options.rounds + 1):
            prompt = random.Random(number).choices(range(VOCAB), k=options.prompt)
            for way in (True, False):
                times[way].append(request(proxy, prompt, overlapped=way))
            if times[True][-1].tokens != times[False][-1].tokens:
                raise SystemExit("the two ways gave different tokens")
    ways = {way: [1e3 * t.exposed_s for t in found[1:]] for way, found in times.items()}  # the first one warms up
    chunks = -(-options.prompt // options.chunk)
    print(f"{machine()}; {options.prompt} tokens in {chunks} chunks, {options.transport}")
    rows = [
        [name, f"{statistics.median(ways[way]):.1f}", f"{min(ways[way]):.1f}", f"{max(ways[way]):.1f}"]
        for name, way in (("as always", True), ("after the prefill", False))
    ]
    print(table(["exposed transfer", "ms, median", "least", "most"], rows))
    print(f"{times[False][-1].transfer_bytes / 2**20:.1f} MiB per request")
    print(
        f"exposed: {statistics.median(ways[True]) / statistics.median(ways[False]):.0%} of the un-overlapped transfer"
    )


if __name__ == "__main__":
    main()
