"""Services under load, ours and others', each started as its users start it, on two cores with a thread each."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mesh.launcher import WORKER_LOAD_TIME_DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
READY_S = 240
MODEL_NAME = "llama"
VOCAB, SPECIAL = 2048, 16
"""Of the demo model's tokenizer; the first ids are those of special tokens."""


@dataclass(frozen=True, slots=True)
class Server:
    name: str
    command: tuple[str, ...]
    """`{port}` and `{model}` are filled in."""
    ready: str = "/health"
    copies: int = 1
    """Clients take turns among them."""
    model_field: str = MODEL_NAME
    extra: dict[str, Any] = field(default_factory=dict)
    """What its requests say besides."""
    env: dict[str, str] = field(default_factory=dict)


def ours(name: str, prefill: int, decode: int) -> Server:
    layout = ("--prefill", str(prefill), "--decode", str(decode), "--max-num-seqs", "64", "--threads", "1")
    command = (sys.executable, "-m", "mesh.cli", "up", "{model}", "--port", "{port}", *layout)
    return Server(name, command, "/ready")


def vllm(python: str, chunk: int, copies: int) -> Server:
    options = ("--max-model-len", "4096", "--max-num-seqs", "64", "--max-num-batched-tokens", str(chunk))
    command = (python, "-m", "vllm.entrypoints.openai.api_server", "--model", "{model}", "--port", "{port}")
    return Server(
        f"{copies} x vLLM, chunk {chunk}",
        (*command, "--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--no-enable-prefix-caching", *options),
        copies=copies,
        env={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"},
    )


def transformers_serve(python: str) -> Server:
    command = (str(Path(python).with_name("transformers")), "serve", "{model}", "--port", "{port}")
    options = ("--continuous-batching", "--dtype", "bfloat16", "--host", "127.0.0.1")
    return Server("transformers serve", (*command, *options), model_field="{model}", env={"HF_HUB_OFFLINE": "1"})


def make_model(directory: Path, *, hidden: int = 512, layers: int = 8) -> Path:
    """A random Llama with the demo model's tokenizer and template. It never ends a turn by itself."""
    torch.manual_seed(0)
    demo = ROOT / "deploy" / "demo_model"
    config = LlamaConfig(
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=3,
        pad_token_id=1,
        hidden_size=hidden,
        intermediate_size=-(-hidden * 8 // 3 // 512) * 512,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=4096,
        initializer_range=0.05,
    )
    target = directory / MODEL_NAME
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight[:SPECIAL] = 0.0
    model.to(torch.bfloat16).save_pretrained(target)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (demo / name).exists():
            (target / name).write_text((demo / name).read_text())
    return target


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
    return port


@contextmanager
def served(server: Server, model: Path) -> Iterator[list[int]]:
    """Its ports, once every copy is ready. Raises `SystemExit` with its last words when one is not."""
    with ExitStack() as stack:
        ports = [free_port() for _ in range(server.copies)]
        children = [stack.enter_context(_started(server, model, port)) for port in ports]
        for port, (child, log) in zip(ports, children, strict=True):
            _wait_ready(f"http://127.0.0.1:{port}{server.ready}", child, log)
        yield ports


@contextmanager
def _started(server: Server, model: Path, port: int) -> Iterator[tuple[subprocess.Popen[bytes], Any]]:
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            [part.replace("{port}", str(port)).replace("{model}", str(model)) for part in server.command],
            cwd=ROOT,
            env={**WORKER_LOAD_TIME_DEFAULTS, **os.environ, "OMP_NUM_THREADS": "1"} | server.env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            yield child, log
        finally:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _wait_ready(url: str, child: subprocess.Popen[bytes], log: Any) -> None:
    end = time.monotonic() + READY_S
    while time.monotonic() < end and child.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=1) as response:
                if response.status == 200:
                    return
        except OSError:
            time.sleep(0.1)
    log.seek(0)
    lines = log.read().decode(errors="replace").strip().splitlines()
    raise SystemExit(f"the service did not become ready: {lines[-1] if lines else 'without a word'}")
