"""The model runner: turns a step's rows into tensors, runs the decoder, samples."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.decode_step import DecodeStep
from engine.decoding import Decoding
from engine.memory import activation_bytes, check_weights, count_blocks, free_bytes, is_roomy
from engine.model.config import DTYPES, ModelConfig
from engine.model.digest import model_digest
from engine.model.transformer import Decoder
from engine.model.weights import Checkpoint, Progress
from engine.request import EngineRequest
from engine.sampler import prompt_logprobs, sample
from engine.step import Row, Sampled
from kernels.blocks import allocate_pool, read_block, write_block
from kernels.conversion import numbers_of, write_part
from kernels.pages_ahead import PagesAhead
from kernels.upload import upload
from mesh.errors import EXIT_ENVIRONMENT, EXIT_MEMORY, EXIT_USAGE, StartupError
from mesh.layout import KvLayout
from mesh.messages import TokenLogprob
from mesh.pieces import Piece

LOGIT_BYTES = 64 << 20
"""Prompt log-probabilities are computed in slices: a whole chunk's logits can be larger than the model."""

log = logging.getLogger("kvmesh.runner")


class ModelRunner:
    """A decoder over a paged KV pool. Used by one thread."""

    def __init__(
        self,
        config: ModelConfig,
        model: Decoder,
        layout: KvLayout,
        num_blocks: int,
        max_model_len: int,
        digest: bytes,
        device: torch.device,
        max_num_seqs: int,
        progress: Progress | None = None,
    ) -> None:
        self.config = config
        self.layout = layout
        self.num_blocks = num_blocks
        self.max_model_len = max_model_len
        self.vocab_size = config.vocab_size
        self.digest = digest
        self._model = model
        self._device = device
        # Triton launches on its thread's current device, and the thread that steps is not the one that loads.
        self._on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with torch.inference_mode():
            self._pool = _allocate_pool(layout, num_blocks, device)
            self._ahead = PagesAhead(self._pool) if device.type == "cpu" else None
            windows = sorted(set(config.windows))
            self._build_metadata = model.ops.metadata_builder(self._pool, config.num_heads, windows)
            self._decoding: Decoding | None = None
            self.decodes_ahead = model.ops.static is not None
            if model.ops.static is not None:
                max_blocks = -(-max_model_len // layout.block_tokens)
                step = DecodeStep(
                    model, model.ops.static, self._pool, windows, max_num_seqs, max_blocks, config.vocab_size
                )
                self._decoding = Decoding(step, layout.block_tokens, model.ops.draw)
                if device.type == "cuda":
                    step.capture(progress)

    @staticmethod
    def load(
        model_dir: Path,
        *,
        device: str,
        dtype: str,
        block_tokens: int,
        num_blocks: int,
        memory_utilization: float,
        max_model_len: int,
        max_num_batched_tokens: int,
        max_num_seqs: int = 256,
        progress: Progress | None = None,
    ) -> ModelRunner:
        """Loads a Hugging Face directory and sizes the pool.

        `num_blocks` 0: as many as the memory's share `memory_utilization` holds. `max_model_len` 0: the model's own,
        or what the pool holds if that is less. `dtype` "auto": the checkpoint's. Raises `StartupError`.
        """
        place = _device(device)
        config = ModelConfig.load(model_dir)
        number = _dtype(dtype, config, place)
        layout = KvLayout(config.num_layers, config.num_kv_heads, config.head_dim, block_tokens, _name(number))
        checkpoint = Checkpoint(model_dir, progress)
        free = free_bytes(place, memory_utilization)
        weights = checkpoint.num_parameters() * number.itemsize
        check_weights(weights, free)
        with torch.inference_mode():
            model = Decoder(config, checkpoint, place, number, roomy=is_roomy(weights, free))
        free = free_bytes(place, memory_utilization)
        free -= activation_bytes(config, max_num_batched_tokens, number.itemsize)
        blocks = count_blocks(num_blocks, layout.block_bytes, free, place)
        length = _context_length(max_model_len, config, blocks * block_tokens)
        digest = model_digest(model_dir)
        return ModelRunner(config, model, layout, blocks, length, digest, place, max_num_seqs, progress)

    @torch.inference_mode()
    def run(self, rows: Sequence[Row]) -> list[Sampled]:
        """Computes the rows' KV into their pages and samples where a row catches up. One result per row."""
        with self._on_device:
            return self._compute(rows) if self._decoding is None else self._decoding.run(rows, self._compute)

    def _compute(self, rows: Sequence[Row]) -> list[Sampled]:
        """All rows in one pass."""
        if not rows:
            return []
        if self._ahead is not None:
            self._ahead.reach(max([row.request.block_table[-1] for row in rows]))
        hidden, starts = self._forward(rows)
        prompt: list[tuple[TokenLogprob, ...]] = [()] * len(rows)
        if any(row.request.params.prompt_logprobs is not None for row in rows):
            prompt = [self._prompt_logprobs(row, hidden, start) for row, start in zip(rows, starts, strict=True)]
        sampling = [i for i, row in enumerate(rows) if row.samples]
        results = [Sampled(None, None, entries) for entries in prompt]
        if sampling:
            last = [starts[i] + rows[i].num_tokens - 1 for i in sampling]
            if last != list(range(len(hidden))):
                hidden = hidden.index_select(0, self._ints(last))
            drawn = sample(self._model.logits(hidden), [rows[i].request for i in sampling], self._model.ops.draw)
            for i, one in zip(sampling, drawn, strict=True):
                results[i] = Sampled(one.token, one.logprob, prompt[i], one.failure)
        return results

    @torch.inference_mode()
    def read_block(self, block: int, valid_tokens: int) -> bytes:
        """A copy of the page's bytes, zero where a token position is not below `valid_tokens`."""
        return read_block(self._pool, block, valid_tokens)

    @torch.inference_mode()
    def write_block(self, block: int, payload: bytes | memoryview) -> None:
        """Overwrites the page; `len(payload) == layout.block_bytes`."""
        if self._ahead is not None:
            self._ahead.reach(block)
        write_block(self._pool, block, payload)

    @torch.inference_mode()
    def write_parts(self, payload: bytes | memoryview, theirs: KvLayout, parts: Sequence[tuple[int, Piece]]) -> None:
        """Writes parts of one block of a worker whose layout is `theirs`, each into its page, converted."""
        numbers = numbers_of(payload, theirs.shape, getattr(torch, theirs.dtype), self._device)
        for block, piece in parts:
            if self._ahead is not None:
                self._ahead.reach(block)
            write_part(self._pool, block, piece.target, numbers, piece.source)

    def _forward(self, rows: Sequence[Row]) -> tuple[Tensor, list[int]]:
        """Hidden states `[tokens, hidden]` and, per row, the index of its first token in them."""
        # Neighbours of like length share an attention batch.
        order = sorted(range(len(rows)), key=lambda i: (rows[i].num_tokens, _kv_tokens(rows[i])))
        ordered = [rows[i] for i in order]
        metadata = self._build_metadata(
            [row.num_tokens for row in ordered],
            [_kv_tokens(row) for row in ordered],
            [row.request.block_table for row in ordered],
        )
        tokens = self._ints(list(chain.from_iterable(_tokens(row) for row in ordered)))
        starts = [0] * len(rows)
        start = 0
        for i in order:
            starts[i] = start
            start += rows[i].num_tokens
        return self._model.forward(tokens, self._pool, metadata), starts

    def _prompt_logprobs(self, row: Row, hidden: Tensor, start: int) -> tuple[TokenLogprob, ...]:
        """About the prompt tokens that follow the row's positions; the last prompt position is followed by none."""
        request = row.request
        top = request.params.prompt_logprobs
        if top is None:
            return ()
        first = request.num_computed_tokens
        stop = min(first + row.num_tokens, request.num_prompt_tokens - 1)
        size = max(1, LOGIT_BYTES // (4 * self.vocab_size))
        entries: list[TokenLogprob] = []
        for begin in range(first, stop, size):
            end = min(begin + size, stop)
            logits = self._model.logits(hidden[start + begin - first : start + end - first])
            entries.extend(prompt_logprobs(logits, request.tokens[begin + 1 : end + 1], top))
        return tuple(entries)

    def _ints(self, values: Sequence[int]) -> Tensor:
        return upload(np.asarray(values, dtype=np.int64), self._device)


def _kv_tokens(row: Row) -> int:
    """Tokens of the row's request whose KV exists once the step is done."""
    return row.request.num_computed_tokens + row.num_tokens


def _tokens(row: Row) -> list[int]:
    request: EngineRequest = row.request
    return request.tokens[request.num_computed_tokens : _kv_tokens(row)]


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise StartupError(f"device {name} is not known; use cpu, cuda or cuda:N", EXIT_USAGE) from None
    if device.type not in ("cpu", "cuda"):
        raise StartupError(f"device {name} is not supported; use cpu, cuda or cuda:N", EXIT_USAGE)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise StartupError(f"device {name} is not there: {count} CUDA devices are usable", EXIT_ENVIRONMENT)
        torch.cuda.set_device(device)
    return device


def _dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    if name not in ("auto", *DTYPES):
        raise StartupError(f"dtype {name} is not known; use auto, {', '.join(DTYPES)}", EXIT_USAGE)
    chosen = config.dtype if name == "auto" else name
    if chosen == "float16" and device.type == "cpu":
        log.warning("float16 is converted to float32: many CPUs multiply it hundreds of times slower")
        chosen = "float32"
    dtype: torch.dtype = getattr(torch, chosen)
    return dtype


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _context_length(wanted: int, config: ModelConfig, pool_tokens: int) -> int:
    longest = config.rope.max_context
    if wanted > longest:
        raise StartupError(f"--max-model-len {wanted} is more than the model's {longest}", EXIT_USAGE)
    if wanted > pool_tokens:
        raise StartupError(f"--max-model-len {wanted} does not fit the KV pool of {pool_tokens} tokens", EXIT_MEMORY)
    if not wanted and longest > pool_tokens:
        log.warning("the context is limited to %d tokens by the KV pool, of the model's %d", pool_tokens, longest)
    return wanted or min(longest, pool_tokens)


def _allocate_pool(layout: KvLayout, num_blocks: int, device: torch.device) -> Tensor:
    try:
        return allocate_pool((num_blocks, *layout.shape), getattr(torch, layout.dtype), device)
    except (RuntimeError, MemoryError, OSError):
        size = num_blocks * layout.block_bytes
        raise StartupError(f"cannot allocate a KV pool of {size} bytes on {device}", EXIT_MEMORY) from None
