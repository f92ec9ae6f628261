"""Measures the demo model on held-out items: names, values, tools and keys that never occur in training; greedy.

python -m deploy.demo_model.train.evaluate [MODEL_DIR] [--dtype bfloat16] [--items 500]
python -m deploy.demo_model.train.evaluate --url http://127.0.0.1:8000/v1     the same items through a running service
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.demo_model.train.conversations import Conversation, Message, two_calls
from deploy.demo_model.train.facts import attribute_fact, facts, filler
from deploy.demo_model.train.talk import (
    Exchange,
    add,
    copy,
    count,
    json_given,
    json_stated,
    order,
    short,
    small_talk,
    text_to_copy,
)
from deploy.demo_model.train.tools import ask, tool, toolbox
from deploy.demo_model.train.words import Split, Words

SEED = 20261127
MODEL_DIR = Path(__file__).resolve().parents[1]
CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
TOKENS_IN_A_BATCH = 60_000
"""Prompt tokens computed at once: bounds memory."""
LONG = 2000
"""Longer prompts are computed one at a time: without padding attention needs no mask, which would cost more."""


@dataclass(frozen=True, slots=True)
class Item:
    prompt: str
    expected: str
    right: Callable[[str], bool]
    """Whether an output is right."""


@dataclass(frozen=True, slots=True)
class Output:
    text: str
    """Without the end of turn."""
    ended: bool
    """The model ended its turn itself."""


@dataclass(frozen=True, slots=True)
class Figure:
    name: str
    make: Callable[[Maker], Item]
    goal: float | None
    """In percent, where one is set."""
    share: float = 1.0
    """Of the number of items."""


class Maker:
    """Makes items of one figure; the same ones for the same seed."""

    def __init__(self, tokenizer: Any, seed: str) -> None:
        self.rng = random.Random(seed)
        self.words = Words(self.rng, Split.HELD_OUT)
        self._tokenizer = tokenizer

    def length(self, text: str) -> int:
        """In tokens."""
        return len(self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)

    def cut(self, text: str, tokens: int) -> str:
        """The first tokens of a text."""
        ids = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        cut: str = self._tokenizer.backend_tokenizer.decode(ids[:tokens])
        return cut

    def item(
        self, messages: list[Message], tools: list[dict[str, Any]], expected: str, right: Callable[[str], bool]
    ) -> Item:
        prompt = self._tokenizer.apply_chat_template(
            messages, tools=tools or None, tokenize=False, add_generation_prompt=True
        )
        return Item(prompt, expected, right)

    def exchange(self, exchange: Exchange, right: Callable[[str], bool] | None = None) -> Item:
        expected = exchange.assistant
        return self.item(
            [{"role": "user", "content": exchange.user}], [], expected, right or (lambda text: text == expected)
        )


def recall_of(tokens: int) -> Callable[[Maker], Item]:
    """One fact asked for among others and filler, anywhere in `tokens` tokens of context."""

    def make(maker: Maker) -> Item:
        words, rng = maker.words, maker.rng
        known = facts(words, max(2, int(tokens / 12 * rng.uniform(0.1, 0.6))))
        asked = known[0]
        sentences, size = [fact.statement for fact in known[1:]], 0
        size = maker.length(" ".join(sentences))
        room = tokens - 45
        while size < room:
            sentences.append(filler(words))
            size += maker.length(sentences[-1]) + 1
        rng.shuffle(sentences)
        while size > room:
            size -= maker.length(sentences.pop()) + 1
        sentences.insert(rng.randint(0, len(sentences)), asked.statement)
        text = words.pick(" ", "\n").join(sentences) + words.pick(" ", "\n", "\nQuestion: ") + asked.question
        value = re.compile(rf"(?<![A-Za-z0-9]){re.escape(asked.value)}(?![A-Za-z0-9])")
        return maker.item(
            [{"role": "user", "content": text}], [], asked.answer, lambda output: bool(value.search(output))
        )

    return make


def remembered(maker: Maker) -> Item:
    """A fact told some turns ago."""
    words = maker.words
    told = [attribute_fact(words) for _ in range(4)]
    messages: list[Message] = []
    for fact in told:
        for exchange in (Exchange("recall", fact.statement, "I will remember that."), short(words)):
            messages += [
                {"role": "user", "content": exchange.user},
                {"role": "assistant", "content": exchange.assistant},
            ]
    asked = maker.rng.choice(told)
    messages.append({"role": "user", "content": asked.question})
    return maker.item(messages, [], asked.answer, lambda text: text == asked.answer)


def copy_64(maker: Maker) -> Item:
    while True:
        text = maker.cut(text_to_copy(maker.words, 90), 64)
        if text == text.strip() and maker.length(text) == 64 and "\ufffd" not in text:
            break
    asked = (
        maker.words.pick("Copy this exactly:\n", "Repeat this text:\n")
        if "\n" in text
        else maker.words.pick("Repeat: ", "Say: ")
    )
    return maker.exchange(Exchange("copy", asked + text, text))


def calls_of(text: str) -> list[Any] | None:
    """The calls in an output; None when there is anything else in it."""
    try:
        calls = [json.loads(call) for call in CALL.findall(text)]
    except ValueError:
        return None
    return None if CALL.sub("", text).strip() else calls


def tool_call(maker: Maker) -> Item:
    """A question that one of one to five tools fits."""
    words = maker.words
    tools = toolbox(words, maker.rng.randint(1, 5))
    chosen = maker.rng.choice(tools)
    use = chosen.use()
    wanted = [{"name": chosen.name, "arguments": use.arguments}]
    messages = [{"role": "user", "content": ask(words, use)}]
    return maker.item(
        messages, [t.schema(words) for t in tools], json.dumps(wanted), lambda text: calls_of(text) == wanted
    )


def two_tool_calls(maker: Maker) -> Item:
    words = maker.words
    tools = toolbox(words, maker.rng.randint(1, 4))
    question, calls = two_calls(words, tools, maker.rng.choice(tools))
    wanted = [{"name": t.name, "arguments": use.arguments} for t, use in calls]
    messages = [{"role": "user", "content": question}]
    return maker.item(
        messages, [t.schema(words) for t in tools], json.dumps(wanted), lambda text: calls_of(text) == wanted
    )


def no_call(maker: Maker) -> Item:
    """Half of the questions need a tool that is not there, half need none."""
    words = maker.words
    tools = toolbox(words, maker.rng.randint(1, 5))
    stranger = tool(words)
    while stranger.name in {t.name for t in tools}:
        stranger = tool(words)
    asked = ask(words, stranger.use()) if maker.rng.random() < 0.5 else short(words).user
    messages = [{"role": "user", "content": asked}]
    return maker.item(messages, [t.schema(words) for t in tools], "no call", lambda text: "<tool_call>" not in text)


def tool_result(maker: Maker) -> Item:
    words = maker.words
    tools = toolbox(words, maker.rng.randint(1, 4))
    chosen = maker.rng.choice(tools)
    calls = [(chosen, chosen.use())]
    question = ask(words, calls[0][1])
    if maker.rng.random() < 0.2:
        question, calls = two_calls(words, tools, chosen)
    made = Conversation("tools")
    made.offer(tools, words)
    made.say("user", question)
    made.call(calls)
    for _, use in calls:
        made.say("tool", use.result)
    expected = " ".join(use.answer for _, use in calls)
    return maker.item(made.messages, made.tools, expected, lambda text: text == expected)


def _json(maker: Maker, same: Callable[[Any, Any], bool]) -> Item:
    draw = maker.rng.random()
    exchange = json_given(maker.words) if draw < 0.3 else json_stated(maker.words, 1)[0]
    expected = json.loads(exchange.assistant)

    def right(text: str) -> bool:
        try:
            return same(json.loads(text), expected)
        except ValueError:
            return False

    return maker.exchange(exchange, right)


def json_keys(maker: Maker) -> Item:
    return _json(
        maker,
        lambda got, wanted: type(got) is type(wanted) and (not isinstance(got, dict) or list(got) == list(wanted)),
    )


def json_values(maker: Maker) -> Item:
    return _json(maker, lambda got, wanted: bool(got == wanted))


FIGURES = (
    Figure("recall at 256 tokens", recall_of(256), 98),
    Figure("recall at 1,024 tokens", recall_of(1024), 95),
    Figure("recall at 3,500 tokens", recall_of(3500), 90, 0.6),
    Figure("recall from an earlier turn", remembered, None),
    Figure("exact copy of 64 tokens", copy_64, 98),
    Figure("exact copy, any length to 110", lambda m: m.exchange(copy(m.words)), None),
    Figure("right tool and arguments", tool_call, 95),
    Figure("two calls when two are asked", two_tool_calls, None),
    Figure("no call when none fits", no_call, 95),
    Figure("answer from a tool's result", tool_result, 95),
    Figure("valid JSON with the asked keys", json_keys, 95),
    Figure("... and the right values", json_values, None),
    Figure("counts", lambda m: m.exchange(count(m.words)), None, 0.4),
    Figure("adds numbers below 100", lambda m: m.exchange(add(m.words)), None, 0.4),
    Figure("orders short lists", lambda m: m.exchange(order(m.words)), None, 0.4),
    Figure("small talk and what kvmesh is", lambda m: m.exchange(small_talk(m.words)), None, 0.4),
)
ENDS_GOAL = 99.0


class Writer(Protocol):
    def write(self, items: Sequence[Item]) -> Iterator[tuple[int, Output]]:
        """The output for each item, by its number, in any order."""


class LocalModel:
    """The model in this process, by transformers."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self._end = self.tokenizer.eos_token_id

    @torch.inference_mode()
    def write(self, items: Sequence[Item]) -> Iterator[tuple[int, Output]]:
        ids = [self.tokenizer.encode(item.prompt, add_special_tokens=False) for item in items]
        order = sorted(range(len(items)), key=lambda i: len(ids[i]))
        while order:
            longest = len(ids[order[-1]])
            size = 1 if longest > LONG else max(1, min(64, TOKENS_IN_A_BATCH // longest))
            batch, order = order[-size:], order[:-size]
            yield from self._batch(batch, items, ids)

    def _batch(
        self, batch: Sequence[int], items: Sequence[Item], ids: Sequence[list[int]]
    ) -> Iterator[tuple[int, Output]]:
        padded = self.tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt")
        longest = max(len(self.tokenizer.encode(items[i].expected, add_special_tokens=False)) for i in batch)
        made = self._model.generate(**padded, do_sample=False, max_new_tokens=longest + 24)
        for i, row in zip(batch, made[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
            ended = self._end in row
            said = row[: row.index(self._end)] if ended else row
            yield i, Output(str(self.tokenizer.decode(said)), ended)


class Service:
    """The model behind an OpenAI-compatible endpoint."""

    def __init__(self, url: str, folder: Path) -> None:
        from openai import OpenAI  # only here is it needed

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self._client = OpenAI(base_url=url, api_key="unused", timeout=600)
        self._name = self._client.models.list().data[0].id

    def write(self, items: Sequence[Item]) -> Iterator[tuple[int, Output]]:
        with ThreadPoolExecutor(8) as threads:
            yield from enumerate(threads.map(self._one, items))

    def _one(self, item: Item) -> Output:
        budget = len(self.tokenizer.encode(item.expected, add_special_tokens=False)) + 24
        made = self._client.completions.create(
            model=self._name,
            prompt=item.prompt,
            max_tokens=budget,
            temperature=0,
            extra_body={"add_special_tokens": False},
        )
        return Output(made.choices[0].text, made.choices[0].finish_reason == "stop")


@dataclass(slots=True)
class Score:
    name: str
    goal: float | None
    right: int = 0
    ended: int = 0
    count: int = 0

    def line(self) -> str:
        percent = 100 * self.right / self.count
        goal = "" if self.goal is None else f"{self.goal:g}"
        verdict = "" if self.goal is None else "reached" if percent >= self.goal else "NOT REACHED"
        return f"| {self.name} | {percent:.1f} | {self.right} of {self.count} | {goal} | {verdict} |"


def measure(writer: Writer, figure: Figure, tokenizer: Any, count: int, shown_failures: int) -> Score:
    score = Score(figure.name, figure.goal)
    maker = Maker(tokenizer, f"{SEED} {figure.name}")
    items = [figure.make(maker) for _ in range(max(1, int(count * figure.share)))]
    for number, output in writer.write(items):
        item = items[number]
        right = item.right(output.text)
        score.count += 1
        score.right += right
        score.ended += output.ended
        if not right and shown_failures:
            shown_failures -= 1
            for name, text in ("prompt", item.prompt[-400:]), ("expected", item.expected), ("got", output.text):
                print(f"  {name:9}{text!r}", file=sys.stderr)
    return score


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model_dir", nargs="?", type=Path, default=MODEL_DIR)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--items", type=int, default=500, help="for each figure (some use a part of it)")
    parser.add_argument("--only", default="", help="figures whose name contains this text")
    parser.add_argument("--show", type=int, default=0, help="print this many wrong outputs of each figure")
    parser.add_argument("--url", help="ask a running service (base URL with /v1) instead of loading the model")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    writer = (
        Service(options.url, options.model_dir)
        if options.url
        else LocalModel(options.model_dir, getattr(torch, options.dtype))
    )
    print("| figure | % | items | goal | |\n|---|---|---|---|---|")
    ends = Score("ends its turn (all of the above)", ENDS_GOAL)
    started = time.perf_counter()
    for figure in FIGURES:
        if options.only not in figure.name:
            continue
        score = measure(writer, figure, writer.tokenizer, options.items, options.show)
        ends.right += score.ended
        ends.count += score.count
        print(score.line(), flush=True)
    print(ends.line())
    print(f"\n{time.perf_counter() - started:.0f} s, {'service' if options.url else options.dtype}", file=sys.stderr)


if __name__ == "__main__":
    main()
