"""TTFT, inter-token latency and throughput over HTTP: disaggregated beside co-located, in one run.

    python benchmarks/serve.py [--model DIR] [--streams 1,8,32] [--prompt 256] [--tokens 32] [--rounds 2]

Each round starts `kvmesh up` with one prefill and one decode worker, then with two workers that each do both (the same
number of processes and threads), and replays the same prompts against each. Without `--model` the model is a random
25 M Llama. Every answer is checked for its finish reason and its number of tokens before its times count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measure import machine, table

ROOT = Path(__file__).resolve().parents[1]
LAYOUTS = {"1 prefill + 1 decode": ("1", "1"), "2 co-located": ("0", "2")}
READY_S = 120


@dataclass(slots=True)
class Timing:
    """One stream, seconds."""

    ttft: float = 0.0
    gaps: list[float] = field(default_factory=list)
    tokens: int = 0
    finish: str | None = None


def make_model(directory: Path) -> Path:
    """A random 25 M Llama with the demo model's tokenizer."""
    torch.manual_seed(0)
    demo = ROOT / "deploy" / "demo_model"
    config = LlamaConfig(
        vocab_size=2048,
        tie_word_embeddings=True,
        eos_token_id=3,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
    )
    target = directory / "llama-25m"
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (target / name).write_text((demo / name).read_text())
    return target


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


@contextmanager
def served(model: Path, prefill: str, decode: str) -> Iterator[int]:
    port = free_port()
    log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
    command = [sys.executable, "-m", "mesh.cli", "up", str(model), "--prefill", prefill, "--decode", decode]
    child = subprocess.Popen(
        [*command, "--port", str(port), "--threads", "1", "--max-num-seqs", "64"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
        stdout=log,
        stderr=log,
    )
    try:
        wait_ready(port, child)
        yield port
    finally:
        child.send_signal(signal.SIGINT)
        child.wait(30)


def wait_ready(port: int, child: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end and child.poll() is None:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=1) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    raise SystemExit("the service did not become ready")


def prompt_of(stream: int, round_: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 * round_ + stream)
    ids: list[int] = torch.randint(0, 256, (length,), generator=generator).tolist()
    return ids


async def stream_one(port: int, model: str, prompt: list[int], tokens: int) -> Timing:
    """One streamed completion over a bare socket: the client must cost less than what it measures."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    payload = json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 20)
    head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(payload)}\r\n\r\n"
    began = last = time.perf_counter()
    writer.write(head.encode() + payload)
    timing = Timing()
    async for line in reader:
        if line.startswith(b"data: [DONE]"):
            break
        if not line.startswith(b"data: "):
            continue
        event = json.loads(line[6:])
        now = time.perf_counter()
        if "error" in event:
            raise SystemExit(f"the service answered {event['error']}")
        if event.get("usage"):
            timing.tokens = event["usage"]["completion_tokens"]
        for choice in event["choices"]:
            timing.finish = choice["finish_reason"] or timing.finish
            if timing.ttft == 0.0:
                timing.ttft = now - began
            elif choice["text"]:
                timing.gaps.append(now - last)
            last = now
    writer.close()
    if timing.finish != "length" or timing.tokens != tokens:
        raise SystemExit(f"a stream ended with {timing.finish} after {timing.tokens} of {tokens} tokens")
    return timing


async def load(
    port: int, model: str, streams: int, round_: int, arguments: argparse.Namespace
) -> tuple[float, list[Timing]]:
    began = time.perf_counter()
    timings = await asyncio.gather(
        *(stream_one(port, model, prompt_of(i, round_, arguments.prompt), arguments.tokens) for i in range(streams))
    )
    return time.perf_counter() - began, timings


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--streams", default="1,8,32")
    parser.add_argument("--prompt", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="also print the figures as JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        measure(arguments.model or make_model(Path(directory)), arguments)


def measure(model: Path, arguments: argparse.Namespace) -> None:
    counts = [int(s) for s in arguments.streams.split(",")]
    results: dict[tuple[str, int], list[tuple[float, list[Timing]]]] = {}
    for round_ in range(arguments.rounds):
        for layout, (prefill, decode) in LAYOUTS.items():
            with served(model, prefill, decode) as port:
                asyncio.run(load(port, model.name, 2, 10_000 + round_, arguments))  # warm-up
                for streams in counts:
                    outcome = asyncio.run(load(port, model.name, streams, round_ * 100 + streams, arguments))
                    results.setdefault((layout, streams), []).append(outcome)
    rows, figures = [], {}
    for (layout, streams), outcomes in sorted(results.items(), key=lambda r: (r[0][1], r[0][0])):
        ttft = [t.ttft for _, timings in outcomes for t in timings]
        gaps = [g for _, timings in outcomes for t in timings for g in t.gaps]
        rate = statistics.median(streams * arguments.tokens / wall for wall, _ in outcomes)
        values = [
            percentile(ttft, 0.5),
            percentile(ttft, 0.99),
            percentile(gaps, 0.5),
            percentile(gaps, 0.99),
        ]
        figures[f"{streams} streams, {layout}"] = {"ttft_itl_s": values, "tokens_per_s": rate}
        rows.append([str(streams), layout, *(f"{v * 1000:.1f}" for v in values), f"{rate:.0f}"])
    print(f"{machine()}; {model.name}, {arguments.rounds} rounds, all streams at once")
    print(f"prompt {arguments.prompt}, {arguments.tokens} tokens each")
    print(table(["streams", "layout", "TTFT p50 ms", "TTFT p99", "ITL p50 ms", "ITL p99", "tokens/s"], rows))
    if arguments.json:
        print(json.dumps({"machine": machine(), "figures": figures}))


if __name__ == "__main__":
    main()
