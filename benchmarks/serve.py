"""TTFT, inter-token latency and throughput over HTTP: disaggregated beside co-located and beside others, in one run.

    python -m benchmarks.serve [--streams 1,8,32] [--prompt 256] [--tokens 32] [--rounds 2]
    python -m benchmarks.serve --peers PYTHON [--interference]

Each round starts every service in turn and replays the same chats against it: `kvmesh up` with one prefill and one
decode worker, then with two workers that each do both (as many processes and threads), with `--peers` also vLLM's CPU
build and `transformers serve`. `--interference` keeps eight streams decoding while a prompt of 1,024 tokens arrives
every 1.5 s, and looks at the eight. The model is a random Llama with the demo model's tokenizer. Each answer is checked
for its finish reason before its times count. `make bench-peers` installs what `--peers` needs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.measure import machine, table
from benchmarks.servers import Server, make_model, ours, served, transformers_serve, vllm

WORDS = ("apple", "river", "stone", "green", "house", "paper", "light", "bread", "train", "cloud", "glass", "table")
TOKENS_A_WORD = 2.2
"""Of the demo model's tokenizer, about; every service gets the same text."""
LONG_PROMPT, LONG_EVERY_S, LONG_COUNT, DECODING, DECODED = 1024, 1.5, 8, 8, 160


@dataclass(slots=True)
class Timing:
    """One stream, seconds."""

    ttft: float = 0.0
    gaps: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Outcome:
    """One load on one service."""

    wall: float
    timings: list[Timing]
    tokens: int


def prompt_of(stream: int, round_: int, length: int) -> str:
    chance = random.Random(f"{round_}/{stream}")
    return " ".join(chance.choice(WORDS) for _ in range(int(length / TOKENS_A_WORD)))


async def stream_one(port: int, server: Server, model: Path, prompt: str, tokens: int) -> Timing:
    """One streamed chat over a bare socket: the client must cost less than what it measures."""
    body: dict[str, Any] = {
        "model": server.model_field.replace("{model}", str(model)),
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": tokens,
        "temperature": 0,
        "stream": True,
        **server.extra,
    }
    payload = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n"
    began = last = time.perf_counter()
    writer.write(head.encode() + payload)
    timing = Timing()
    finish = None
    lines = []
    async for line in reader:
        if not line.startswith(b"data: "):
            lines.append(line)
            continue
        if line.startswith(b"data: [DONE]"):
            break
        event = json.loads(line[6:])
        now = time.perf_counter()
        if "error" in event:
            raise SystemExit(f"{server.name} answered {event['error']}")
        for choice in event["choices"]:
            finish = choice.get("finish_reason") or finish
            if not choice["delta"].get("content"):
                continue
            if timing.ttft == 0.0:
                timing.ttft = now - began
            else:
                timing.gaps.append(now - last)
            last = now
    writer.close()
    if finish != "length":
        raise SystemExit(f"{server.name}: a stream ended with {finish}: {b''.join(lines[:1] + lines[-1:])!r}")
    return timing


async def together(
    ports: Sequence[int], server: Server, model: Path, streams: int, round_: int, prompt: int, tokens: int
) -> Outcome:
    """All streams at once."""
    began = time.perf_counter()
    calls = [
        stream_one(ports[i % len(ports)], server, model, prompt_of(i, round_, prompt), tokens) for i in range(streams)
    ]
    timings = await asyncio.gather(*calls)
    return Outcome(time.perf_counter() - began, timings, streams * tokens)


async def interfered(ports: Sequence[int], server: Server, model: Path, round_: int) -> Outcome:
    """Eight streams decode while long prompts arrive; the times are those of the eight."""
    began = time.perf_counter()

    async def arrivals() -> None:
        calls = []
        for number in range(LONG_COUNT):
            await asyncio.sleep(LONG_EVERY_S)
            text = prompt_of(1000 + number, round_, LONG_PROMPT)
            calls.append(asyncio.create_task(stream_one(ports[number % len(ports)], server, model, text, 2)))
        await asyncio.gather(*calls)

    arriving = asyncio.create_task(arrivals())
    outcome = await together(ports, server, model, DECODING, round_, 32, DECODED)
    wall = time.perf_counter() - began
    await arriving
    return Outcome(wall, outcome.timings, DECODING * DECODED)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def measure(model: Path, servers: Sequence[Server], arguments: argparse.Namespace) -> None:
    counts = [int(s) for s in arguments.streams.split(",")]
    results: dict[tuple[str, str], list[Outcome]] = {}
    failed: set[str] = set()
    for round_ in range(arguments.rounds):
        for server in servers:
            if server.name in failed:
                continue
            try:
                with served(server, model) as ports:
                    warm_up = together(ports, server, model, 2 * len(ports), 10_000 + round_, arguments.prompt, 8)
                    asyncio.run(warm_up)
                    if arguments.interference:
                        outcome = asyncio.run(interfered(ports, server, model, round_))
                        results.setdefault(("8 + long prompts", server.name), []).append(outcome)
                        continue
                    for streams in counts:
                        seed = round_ * 100 + streams
                        load = together(ports, server, model, streams, seed, arguments.prompt, arguments.tokens)
                        results.setdefault((f"{streams} streams", server.name), []).append(asyncio.run(load))
            except SystemExit as error:
                print(f"left out: {server.name}: {error}", flush=True)
                failed.add(server.name)
    report(results, arguments)


def report(results: dict[tuple[str, str], list[Outcome]], arguments: argparse.Namespace) -> None:
    rows, figures = [], {}
    for (load, server), outcomes in sorted(results.items(), key=lambda r: int(r[0][0].split()[0])):
        ttft = [t.ttft for o in outcomes for t in o.timings]
        gaps = [g for o in outcomes for t in o.timings for g in t.gaps]
        rates = [o.tokens / o.wall for o in outcomes]
        values = [percentile(ttft, 0.5), percentile(ttft, 0.99), percentile(gaps, 0.5), percentile(gaps, 0.99)]
        figures[f"{load}, {server}"] = {"ttft_itl_s": values, "tokens_per_s": rates}
        spread = f"{statistics.median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f})"
        rows.append([load, server, *(f"{v * 1000:.1f}" for v in values), spread])
    print(f"{machine()}; {arguments.rounds} rounds, the streams of a load all at once")
    print(f"prompt of about {arguments.prompt} tokens, {arguments.tokens} tokens each")
    print(table(["load", "service", "TTFT p50 ms", "TTFT p99", "ITL p50 ms", "ITL p99", "tokens/s"], rows))
    if arguments.json:
        print(json.dumps({"machine": machine(), "figures": figures}))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--interference", action="store_true", help="streams that decode while long prompts arrive")
    parser.add_argument("--peers", metavar="PYTHON", help="vLLM and transformers serve, too, of this Python")
    parser.add_argument("--large", action="store_true", help="a model of 12 layers of 768 (default: 8 of 512)")
    parser.add_argument("--json", action="store_true", help="also print the figures as JSON")
    arguments = parser.parse_args()
    servers = [ours("1 prefill + 1 decode", 1, 1), ours("2 co-located", 0, 2)]
    if arguments.peers:
        chunks = (64, 256, 2048) if arguments.interference else (2048,)
        servers += [vllm(arguments.peers, chunk, 2) for chunk in chunks]
        servers += [] if arguments.interference else [transformers_serve(arguments.peers)]
    with tempfile.TemporaryDirectory() as directory:
        hidden, layers = (768, 12) if arguments.large else (512, 8)
        measure(make_model(Path(directory), hidden=hidden, layers=layers), servers, arguments)


if __name__ == "__main__":
    main()
