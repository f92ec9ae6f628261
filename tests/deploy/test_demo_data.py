"""The demo model's training data: the splits are apart, and answers are what the questions ask for."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from transformers import AutoTokenizer

from deploy.demo_model.train.conversations import Conversation, conversation
from deploy.demo_model.train.evaluate import FIGURES, Maker
from deploy.demo_model.train.examples import MODEL_DIR, Encoder, examples
from deploy.demo_model.train.facts import facts
from deploy.demo_model.train.tokenizer import IM_END
from deploy.demo_model.train.tools import toolbox
from deploy.demo_model.train.words import Split, Words, split_of


def words(seed: int, split: Split = Split.TRAIN) -> Words:
    return Words(random.Random(seed), split)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR)


def drawn(make: Callable[[Words], Iterable[str]], split: Split, draws: int) -> set[str]:
    source = words(7, split)
    return {word for _ in range(draws) for word in make(source)}


@pytest.mark.parametrize(
    "make",
    [
        lambda w: [w.name()],
        lambda w: [w.place()],
        lambda w: [w.code()],
        lambda w: [w.number(5)],
        lambda w: [w.topic()],
        lambda w: [w.key()],
        lambda w: [t.name for t in toolbox(w, 3)],
    ],
    ids=["names", "places", "codes", "numbers", "topics", "keys", "tools"],
)
def test_what_is_held_out_never_occurs_in_training(make: Callable[[Words], Iterable[str]]) -> None:
    trained, held_out = drawn(make, Split.TRAIN, 3000), drawn(make, Split.HELD_OUT, 400)

    assert len(held_out) > 20
    assert not trained & held_out


def test_a_word_keeps_its_split_in_every_spelling() -> None:
    assert split_of("zip_code") is split_of("zipCode") is split_of("Zip code")


def test_the_same_seed_makes_the_same_conversations() -> None:
    def made() -> list[Conversation]:
        source = words(3)
        return [conversation(source, 300) for _ in range(20)]

    assert made() == made()


def test_no_two_facts_of_a_text_answer_one_question() -> None:
    known = facts(words(1), 200)

    assert len({fact.question for fact in known}) == len(known)
    assert all(fact.value in fact.statement and fact.value in fact.answer for fact in known)


def test_calls_are_of_offered_tools_with_their_parameters() -> None:
    source, calls = words(2), 0
    for _ in range(400):
        made = conversation(source, 400)
        offered = {tool["function"]["name"]: tool["function"]["parameters"] for tool in made.tools}
        for message in made.messages:
            for call in message.get("tool_calls", ()):
                calls += 1
                schema, given = offered[call["function"]["name"]], call["function"]["arguments"]
                assert set(schema["required"]) <= given.keys() <= schema["properties"].keys()
    assert calls > 100


def test_trained_tokens_are_what_the_assistant_says(tokenizer: Any) -> None:
    made = Conversation("recall")
    made.say("user", "My name is Ada.")
    made.say("assistant", "Hello Ada!")
    made.say("user", "assistant\nWhat is my name?")
    made.say("assistant", "Your name is Ada.")

    example = Encoder().encode(made)

    said = tokenizer.decode([i for i, trained in zip(example.ids, example.trained, strict=True) if trained])
    assert said == f"Hello Ada!{IM_END}Your name is Ada.{IM_END}"


def test_examples_fit_their_length() -> None:
    source = examples(5, 200)

    for _ in range(50):
        example = next(source)
        assert len(example.ids) == len(example.trained) <= 200
        assert any(example.trained)


@pytest.mark.parametrize("figure", FIGURES, ids=lambda figure: figure.name)
def test_evaluation_accepts_the_expected_and_refuses_another(figure: Any, tokenizer: Any) -> None:
    maker = Maker(tokenizer, "test")
    for _ in range(10):
        item = figure.make(maker)
        if figure.name in ("right tool and arguments", "two calls when two are asked"):
            calls = (f"<tool_call>{json.dumps(call)}</tool_call>" for call in json.loads(item.expected))
            assert item.right("\n".join(calls))
        elif item.expected != "no call":
            assert item.right(item.expected)
        assert not item.right("<tool_call>{}</tool_call>")


@pytest.mark.parametrize("length", [256, 1024, 3500])
def test_recall_items_have_the_asked_length(length: int, tokenizer: Any) -> None:
    figure = next(f for f in FIGURES if f.name == f"recall at {length:,} tokens")
    maker = Maker(tokenizer, "test")

    for _ in range(5):
        assert 0.75 * length <= maker.length(figure.make(maker).prompt) <= 1.1 * length
