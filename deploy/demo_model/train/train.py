"""Trains the demo model.

    python -m deploy.demo_model.train.train --output DIR --minutes 75
    python -m deploy.demo_model.train.train --output DIR --minutes 75 --resume

`DIR/model` is a model directory, renewed with every checkpoint. `DIR/checkpoints` is what `--resume` continues from.
`DIR/train.log` tells of every run.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import platform
import random
import shutil
import signal
import sys
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from itertools import accumulate
from pathlib import Path
from queue import Empty
from types import FrameType
from typing import Any, Protocol

# a waiting thread must not spin: two threads share two cores with the process that makes the examples
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer

from deploy.demo_model.train.examples import MODEL_DIR, Example, examples
from deploy.demo_model.train.hints import LOOK_HEAD, NOWHERE, START_HEAD, Sentences, pointing_loss
from deploy.demo_model.train.muon import Adam, Muon, Optimizer, split
from deploy.demo_model.train.network import Layer, Network, Places, Shape, read_weights, write_model

AHEAD = 6
"""Batches that are ordered before they are needed."""
STEPS_PER_SEED = 32
"""A stream of examples starts anew this often, so that a resumed run has few batches to make and drop."""
CANDIDATES = 12
"""Examples among which a row looks for one that still fits."""
REPORT_SECONDS = 20.0
ABSENT, CONTEXT, TRAINED = 0, 1, 2
"""What a token is as a target: none (padding, the start of a conversation), another's words, the assistant's."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")

MakeExamples = Callable[[int, int], Iterator[Example]]


@dataclass(frozen=True, slots=True)
class Stage:
    tokens: int
    """With `--minutes` not given."""
    time: float
    """Share of the time, with `--minutes`."""
    mix: tuple[tuple[int, int, float], ...]
    """Row length, rows of a step, share of the steps."""
    seed: int


STAGES = (
    Stage(8_000_000, 0.22, ((256, 32, 1.0),), 1),
    Stage(12_000_000, 0.28, ((512, 16, 0.4), (1024, 8, 0.3), (256, 32, 0.3)), 2),
    Stage(10_000_000, 0.25, ((512, 16, 0.25), (1024, 8, 0.35), (256, 32, 0.25), (4096, 3, 0.15)), 3),
    Stage(10_000_000, 0.25, ((4096, 3, 0.4), (1024, 8, 0.35), (256, 32, 0.25)), 4),
)
WARM_STAGES = (Stage(20_000_000, 1.0, ((256, 32, 0.15), (512, 16, 0.1), (1024, 8, 0.45), (4096, 3, 0.3)), 71),)
"""Of a run that starts with trained weights: nothing has to be learned from short rows first."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """What decides the weights, save for the examples and the network's shape."""

    stages: tuple[Stage, ...] = STAGES
    seed: int = 1
    minutes: float | None = None
    tokens_scale: float = 1.0
    context_weight: float = 0.0
    muon_rate: float = 0.02
    muon_decay: float = 0.05
    adam_rate: float = 0.004
    warmup: int = 60
    decay: float = 0.9
    clip: float = 1.0
    micro_tokens: int = 4096
    start_layer: int = -1
    look_layer: int = -1
    """In which a head is shown where to look, see `hints`; -1: in none."""
    hint_weight: float = 0.2
    pad: int = 0

    @property
    def total_tokens(self) -> float:
        return self.tokens_scale * sum(stage.tokens for stage in self.stages)

    def stage_at(self, fraction: float) -> int:
        """By the share of the time, or of the tokens, that is over."""
        parts = [stage.time if self.minutes else stage.tokens for stage in self.stages]
        ends = [end / sum(parts) for end in accumulate(parts)]
        return next((i for i, end in enumerate(ends) if fraction < end), len(ends) - 1)

    def rate_scale(self, fraction: float, step: int) -> float:
        """Of the learning rates: up over the first steps, level, then straight down to nothing."""
        return min(1.0, (step + 1) / self.warmup, max(0.0, 1.0 - fraction) / self.decay)

    def pick(self, stage: int, step: int) -> tuple[int, int]:
        """Row length and rows of a stage's step."""
        rng = random.Random(f"{self.seed}/{self.stages[stage].seed}/{step}")
        mix = self.stages[stage].mix
        length, rows, _ = rng.choices(mix, [share for *_, share in mix])[0]
        return length, rows


@dataclass(frozen=True, slots=True)
class Cursor:
    """Where the data goes on: the next step of a stage, and all tokens before it."""

    stage: int = 0
    step: int = 0
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Batch:
    ids: np.ndarray[Any, np.dtype[np.int32]]
    """[rows, length]"""
    kinds: np.ndarray[Any, np.dtype[np.uint8]]
    """[rows, length] ABSENT, CONTEXT or TRAINED: what the token is as a target."""
    looks: np.ndarray[Any, np.dtype[np.int32]]
    """[rows, length] Where the token should look, or NOWHERE."""


Row = tuple[list[int], list[int], list[int]]
"""Ids, kinds and looks."""


def packed(stream: Iterator[Example], length: int, pad: int) -> Iterator[Row]:
    """The oldest waiting example, then always the longest that fits."""
    waiting: list[Example] = []
    while True:
        ids: list[int] = []
        kinds: list[int] = []
        looks = [NOWHERE] * length
        while True:
            while len(waiting) < CANDIDATES:
                waiting.append(next(stream))
            fits = [e for e in waiting if len(e.ids) <= length - len(ids)]
            if not fits:
                break
            chosen = max(fits, key=lambda e: len(e.ids)) if ids else waiting[0]
            waiting.remove(chosen)
            for source, target in chosen.looks:
                looks[len(ids) + source] = len(ids) + target
            ids += chosen.ids
            kinds += [ABSENT, *(TRAINED if trained else CONTEXT for trained in chosen.trained[1:])]
        rest = length - len(ids)
        yield ids + [pad] * rest, kinds + [ABSENT] * rest, looks


def batches(recipe: Recipe, stage: int, block: int, make: MakeExamples) -> Iterator[Batch]:
    """Those of one block of STEPS_PER_SEED steps: a function of the seed and the numbers alone."""
    rows_of: dict[int, Iterator[Row]] = {}
    for step in range(block * STEPS_PER_SEED, (block + 1) * STEPS_PER_SEED):
        length, rows = recipe.pick(stage, step)
        if length not in rows_of:
            seed = zlib.crc32(f"{recipe.seed}/{recipe.stages[stage].seed}/{block}/{length}".encode())
            rows_of[length] = packed(make(seed, length), length, recipe.pad)
        ids, kinds, looks = zip(*[next(rows_of[length]) for _ in range(rows)], strict=True)
        yield Batch(np.array(ids, np.int32), np.array(kinds, np.uint8), np.array(looks, np.int32))


class Maker:
    """Makes the batch of any step; quickly so when asked for one after the other."""

    def __init__(self, recipe: Recipe, make: MakeExamples) -> None:
        self._recipe, self._make = recipe, make
        self._next: tuple[int, int] | None = None
        self._batches: Iterator[Batch] = iter(())

    def batch(self, stage: int, step: int) -> Batch:
        block, offset = divmod(step, STEPS_PER_SEED)
        if (stage, step) != self._next or offset == 0:
            self._batches = batches(self._recipe, stage, block, self._make)
            for _ in range(offset):
                next(self._batches)
        self._next = (stage, step + 1)
        return next(self._batches)


class Source(Protocol):
    """Batches in the order in which they were asked for."""

    def ask(self, stage: int, step: int) -> None: ...

    def take(self) -> Batch: ...


class DirectSource:
    """Made when taken."""

    def __init__(self, recipe: Recipe, make: MakeExamples) -> None:
        self._maker = Maker(recipe, make)
        self._asked: deque[tuple[int, int]] = deque()

    def ask(self, stage: int, step: int) -> None:
        self._asked.append((stage, step))

    def take(self) -> Batch:
        return self._maker.batch(*self._asked.popleft())


class ProcessSource:
    """Made ahead by another process."""

    def __init__(self, recipe: Recipe, make: MakeExamples) -> None:
        processes = multiprocessing.get_context("spawn")
        self._asked, self._made = processes.Queue(), processes.Queue()
        self._process = processes.Process(target=_produce, args=(recipe, make, self._asked, self._made), daemon=True)
        self._process.start()

    def ask(self, stage: int, step: int) -> None:
        self._asked.put((stage, step))

    def take(self) -> Batch:
        while True:
            try:
                batch: Batch = self._made.get(timeout=5)
                return batch
            except Empty:
                if not self._process.is_alive():
                    raise RuntimeError("the process that makes the examples ended") from None

    def close(self) -> None:
        self._process.terminate()
        self._process.join()


def _produce(recipe: Recipe, make: MakeExamples, asked: Any, made: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is the trainer's to handle
    torch.set_num_threads(1)
    maker, parent = Maker(recipe, make), multiprocessing.parent_process()
    while parent is None or parent.is_alive():
        try:
            made.put(maker.batch(*asked.get(timeout=5)))
        except Empty:
            continue


class Feed:
    """Keeps a source busy and knows where a resumed run would go on."""

    def __init__(self, recipe: Recipe, source: Source, cursor: Cursor, fraction: Callable[[int], float]) -> None:
        self._recipe, self._source, self._fraction = recipe, source, fraction
        self._asked: deque[Cursor] = deque()
        self._newest = cursor
        self.cursor = cursor

    def take(self) -> Batch | None:
        """None when the plan is fulfilled."""
        while len(self._asked) < AHEAD and (fraction := self._fraction(self._newest.tokens)) < 1.0:
            self._ask(self._recipe.stage_at(fraction))
        if not self._asked:
            return None
        batch = self._source.take()
        self.cursor = self._asked.popleft()
        return batch

    def _ask(self, stage: int) -> None:
        step = self._newest.step if stage == self._newest.stage else 0
        length, rows = self._recipe.pick(stage, step)
        self._source.ask(stage, step)
        self._newest = Cursor(stage, step + 1, self._newest.tokens + length * rows)
        self._asked.append(self._newest)


@dataclass(slots=True)
class Tally:
    """Of the steps since the last report."""

    tokens: int = 0
    trained: int = 0
    loss: float = 0.0
    hits: int = 0
    norm: float = 0.0
    hints: list[float] = field(default_factory=list)
    """The latest ones."""
    started: float = field(default_factory=time.monotonic)

    @property
    def speed(self) -> float:
        return self.tokens / max(1e-9, time.monotonic() - self.started)


class Trainer:
    """One step after the other; everything that a checkpoint must hold."""

    def __init__(
        self, network: Network, recipe: Recipe, make_source: Callable[[], Source], sentences: Sentences | None = None
    ) -> None:
        """`sentences`: for hints."""
        self.network, self.recipe, self._sentences = network, recipe, sentences
        network.initialise(torch.Generator().manual_seed(recipe.seed))
        matrices, others = split(network.named_parameters())
        self.optimizer = Optimizer(
            Muon(matrices, recipe.muon_rate, decay=recipe.muon_decay), Adam(others, recipe.adam_rate)
        )
        self._make_source = make_source
        self._cursor = Cursor()
        self._feed: Feed | None = None
        self._earlier, self._started = 0.0, time.monotonic()
        self.tally = Tally()

    @property
    def cursor(self) -> Cursor:
        return self._feed.cursor if self._feed else self._cursor

    @property
    def elapsed(self) -> float:
        """Seconds, with those of the runs before."""
        return self._earlier + time.monotonic() - self._started

    def fraction(self, tokens: int) -> float:
        """How much of the plan is over, by time or by `tokens`."""
        minutes = self.recipe.minutes
        return self.elapsed / (60 * minutes) if minutes else tokens / self.recipe.total_tokens

    def step(self) -> bool:
        """False when the plan is fulfilled."""
        self._feed = self._feed or Feed(self.recipe, self._make_source(), self._cursor, self.fraction)
        before = self._feed.cursor.tokens
        batch = self._feed.take()
        if batch is None:
            return False
        scale = self.recipe.rate_scale(self.fraction(before), self.optimizer.steps)
        self._backward(batch)
        self.tally.norm = self.optimizer.step(scale, self.recipe.clip)
        self.tally.tokens += batch.ids.size
        return True

    def _backward(self, batch: Batch) -> None:
        device = self.network.norm.weight.device
        ids = torch.from_numpy(batch.ids).long().to(device)
        kinds = torch.from_numpy(batch.kinds).to(device)
        # the target of a position is the next token; the last one of a row has none
        targets, kinds = ids.roll(-1, 1), kinds.roll(-1, 1)
        kinds[:, -1] = ABSENT
        weights = (kinds == TRAINED).float() + self.recipe.context_weight * (kinds == CONTEXT).float()
        weights /= weights.sum()
        looks = torch.from_numpy(batch.looks).long().to(device)
        rows = max(1, self.recipe.micro_tokens // ids.shape[1])
        for at in range(0, len(ids), rows):
            part = slice(at, at + rows)
            self._micro_step(ids[part], targets[part], weights[part], kinds[part], looks[part])

    def _micro_step(self, ids: Tensor, targets: Tensor, weights: Tensor, kinds: Tensor, looks: Tensor) -> None:
        shown: dict[int, tuple[int, Tensor]] = {}
        if self._sentences is not None:
            starts = self._sentences.starts(ids.cpu()).to(ids.device)
            shown = {self.recipe.start_layer: (START_HEAD, starts), self.recipe.look_layer: (LOOK_HEAD, looks)}
        hints: list[Tensor] = []

        def watch(number: int, layer: Layer, x: Tensor, places: Places) -> None:
            if number in shown:
                head, where = shown[number]
                hints.append(pointing_loss(layer, head, x, places, where, self.network.dtype))

        loss, each, right = self.network.loss(ids, targets, weights, watch)
        for hint in hints:  # the micro steps of a step together weigh as much as one
            loss = loss + self.recipe.hint_weight * weights.sum() * hint
        self.tally.hints = [float(hint.detach()) for hint in hints] or self.tally.hints
        loss.backward()  # type: ignore[no-untyped-call]
        trained = kinds.flatten() == TRAINED
        self.tally.trained += int(trained.sum())
        self.tally.loss += float(each[trained].sum())
        self.tally.hits += int(right[trained].sum())

    def save(self, folder: Path) -> None:
        """A new folder under `folder`/checkpoints, complete or not there, in the place of the older ones."""
        checkpoints = folder / "checkpoints"
        part, done = checkpoints / "part", checkpoints / f"{self.optimizer.steps:08d}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        weights = {f"weights.{name}": p.detach() for name, p in self.network.named_parameters()}
        save_file(weights | self.optimizer.state(), part / "state.safetensors")
        state = {
            "steps": self.optimizer.steps,
            "elapsed": self.elapsed,
            "cursor": asdict(self.cursor),
            "shape": asdict(self.network.shape),
            "seed": self.recipe.seed,
        }
        (part / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        shutil.rmtree(done, ignore_errors=True)
        part.rename(done)
        for old in _checkpoints(folder)[:-1]:
            shutil.rmtree(old)

    def load(self, folder: Path) -> None:
        """The newest checkpoint."""
        found = _checkpoints(folder)
        if not found:
            raise FileNotFoundError(f"no checkpoint to resume from in {folder}")
        state = json.loads((found[-1] / "state.json").read_text())
        if (state["shape"], state["seed"]) != (asdict(self.network.shape), self.recipe.seed):
            raise ValueError(f"the checkpoint in {folder} is of another shape or seed")
        with safe_open(found[-1] / "state.safetensors", "pt") as file:
            saved = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
        with torch.no_grad():
            for name, p in self.network.named_parameters():
                p.copy_(saved[f"weights.{name}"])
        self.optimizer.load(saved, state["steps"])
        self._cursor, self._feed = Cursor(**state["cursor"]), None
        self._earlier, self._started = state["elapsed"], time.monotonic()


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "checkpoints").glob("[0-9]*") if path.is_dir())


class Reporter:
    """A line in place on a terminal, and lasting lines now and then, there and in the log."""

    def __init__(self, folder: Path, trainer: Trainer) -> None:
        self._log = (folder / "train.log").open("a", buffering=1)
        self._trainer = trainer
        self._total = Tally()
        self._written = time.monotonic()

    def say(self, text: str) -> None:
        self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}\n")
        sys.stdout.write(f"\r\x1b[K{text}\n" if sys.stdout.isatty() else f"{text}\n")
        sys.stdout.flush()

    def step(self) -> None:
        now = time.monotonic()
        if now - self._written >= REPORT_SECONDS:
            self.say(self._line())
            self._trainer.tally, self._written = Tally(), now
        elif sys.stdout.isatty():
            sys.stdout.write(f"\r\x1b[K{self._line()}"[: shutil.get_terminal_size().columns + 3])
            sys.stdout.flush()

    def _line(self) -> str:
        trainer, tally = self._trainer, self._trainer.tally
        cursor, steps = trainer.cursor, trainer.optimizer.steps
        fraction = trainer.fraction(cursor.tokens)
        left = trainer.elapsed * (1 - fraction) / max(fraction, 1e-9)
        count = max(1, tally.trained)
        hints = " ".join(f"{hint:.3f}" for hint in tally.hints)
        return (
            f"step {steps}  stage {cursor.stage + 1}  {cursor.tokens / 1e6:.2f} M tokens  {tally.speed:.0f} tokens/s  "
            f"loss {tally.loss / count:.4f}  accuracy {tally.hits / count:.4f}  "
            f"hints {hints}  "
            f"rate x{trainer.recipe.rate_scale(fraction, steps):.3f}  norm {tally.norm:.2f}  "
            f"{fraction:.1%}  left {max(0.0, left) / 60:.1f} min"
        )


class Stop:
    """Set by Ctrl-C and SIGTERM; the step that runs is finished first."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


def keep_memory() -> None:
    """Has the C library keep freed memory: the page faults of fresh tensors cost as much time as the products."""
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        mmap_max, trim_threshold, top_pad = -4, -1, -2
        library.mallopt(mmap_max, 0)
        library.mallopt(trim_threshold, -1)
        library.mallopt(top_pad, 256 << 20)


def train(
    trainer: Trainer,
    reporter: Reporter,
    output: Path,
    export: Callable[[], None],
    checkpoint_minutes: float,
    limit: int | None,
) -> None:
    """Until the plan is fulfilled, a signal comes or `limit` steps are done."""
    stop, saved = Stop(), time.monotonic()
    while not stop.asked and (limit is None or trainer.optimizer.steps < limit) and trainer.step():
        reporter.step()
        if time.monotonic() - saved >= 60 * checkpoint_minutes:
            trainer.save(output)
            export()
            saved = time.monotonic()
    trainer.save(output)
    export()
    reporter.say(f"{'stopped' if stop.asked else 'done'} after step {trainer.optimizer.steps}")


def _parser() -> argparse.ArgumentParser:
    shape, recipe = Shape(), Recipe()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder of the model, the checkpoints and the log")
    add("--resume", action="store_true", help="continue from the newest checkpoint of the folder")
    add("--start", type=Path, help="begin with the weights of this model directory instead of random ones")
    add("--minutes", type=float, help="plan by time, that of resumed runs together; without it by the stages' tokens")
    add("--tokens-scale", type=float, default=1.0, help="times the stages' tokens (default: 1)")
    add("--steps", type=int, help="stop after this many steps, whatever the plan")
    add("--seed", type=int, default=recipe.seed)
    add("--tokenizer", type=Path, default=MODEL_DIR, help="folder of tokenizer.json (default: the demo model's)")
    for item in fields(Shape):
        if item.name != "vocab":
            default = getattr(shape, item.name)
            add(f"--{item.name.replace('_', '-')}", type=type(default), default=default, help=f"(default: {default})")
    add("--context-weight", type=float, default=recipe.context_weight, help="loss weight of tokens of others (0)")
    add("--muon-rate", type=float, default=recipe.muon_rate, help="learning rate of matrices (0.02)")
    add("--muon-decay", type=float, default=recipe.muon_decay, help="weight decay of matrices (0.05)")
    add("--adam-rate", type=float, default=recipe.adam_rate, help="learning rate of embeddings and gains (0.004)")
    add("--warmup", type=int, default=recipe.warmup, help="steps (60)")
    add("--decay", type=float, default=recipe.decay, help="share of the plan in which the rate falls (0.9)")
    add("--clip", type=float, default=recipe.clip, help="largest gradient norm (1)")
    add("--micro-tokens", type=int, default=recipe.micro_tokens, help="positions of a forward pass (4096)")
    add("--start-layer", type=int, default=-1, help="one of its heads is shown where sentences begin (none)")
    add("--look-layer", type=int, default=-1, help="one of its heads is shown where a value's key is (none)")
    add("--hint-weight", type=float, default=recipe.hint_weight, help="of their attention's losses (0.2)")
    add("--checkpoint-minutes", type=float, default=3.0)
    add("--threads", type=int, default=2)
    add("--device", default="auto", help="cpu, cuda or auto")
    add("--dtype", default="bfloat16", choices=("bfloat16", "float32"), help="of the products")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="needs a C++ compiler")
    return parser


def _tokens(folder: Path) -> tuple[int, dict[str, int]]:
    """The vocabulary's size, and config.json's ids of special tokens."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    return len(tokenizer), ids


def _set_up(options: argparse.Namespace) -> tuple[Trainer, Callable[[], None], ProcessSource]:
    vocab, tokens = _tokens(options.tokenizer)
    shape = Shape(**{f.name: getattr(options, f.name) for f in fields(Shape) if f.name != "vocab"}, vocab=vocab)
    given = {f.name: getattr(options, f.name) for f in fields(Recipe) if f.name not in ("stages", "pad")}
    stages = STAGES if options.start is None else WARM_STAGES
    recipe = Recipe(stages, **given, pad=tokens["pad_token_id"])
    device = options.device if options.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    network = Network(shape, getattr(torch, options.dtype), options.compile).to(device)
    source = ProcessSource(recipe, partial(examples, folder=options.tokenizer))
    sentences = Sentences.of(options.tokenizer) if max(recipe.start_layer, recipe.look_layer) >= 0 else None
    trainer = Trainer(network, recipe, lambda: source, sentences)

    def export() -> None:
        write_model(network, options.output / "model", tokens)
        for name in TOKENIZER_FILES:
            if (options.tokenizer / name).exists():
                shutil.copy(options.tokenizer / name, options.output / "model" / name)

    return trainer, export, source


def _say_configuration(options: argparse.Namespace, trainer: Trainer, say: Callable[[str], None]) -> None:
    count = sum(p.numel() for p in trainer.network.parameters())
    say(f"python {platform.python_version()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    say(f"{trainer.network.shape}: {count / 1e6:.2f} M parameters, {options.dtype}, compiled: {options.compile}")
    say(f"{trainer.recipe}")


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    if not options.resume and _checkpoints(options.output):
        raise SystemExit("the output folder holds a checkpoint: give --resume, or another folder")
    keep_memory()
    torch.set_num_threads(options.threads)
    # one compiled layer per row length and number of rows
    torch._dynamo.config.recompile_limit = 64
    options.output.mkdir(parents=True, exist_ok=True)
    trainer, export, source = _set_up(options)
    try:
        reporter = Reporter(options.output, trainer)
        _say_configuration(options, trainer, reporter.say)
        if options.start is not None and not options.resume:
            read_weights(trainer.network, options.start)
            reporter.say("started from the weights of another run")
        if options.resume:
            trainer.load(options.output)
            reporter.say(f"resumed after step {trainer.optimizer.steps}, {trainer.elapsed / 60:.1f} minutes")
        train(trainer, reporter, options.output, export, options.checkpoint_minutes, options.steps)
    finally:
        source.close()


if __name__ == "__main__":
    main()
