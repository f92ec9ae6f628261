"""Stop strings and the text of a choice: the result never depends on how the text was cut."""

from __future__ import annotations

import random

import pytest

from proxy.text.choice import ChoiceText, Piece
from proxy.text.detokenizer import detokenizer
from proxy.text.stopstrings import StopStrings
from tests.proxy.tiny_tokenizer import EOS, byte_level

TOKENIZER = byte_level()


def cut(text: str, seed: int) -> list[str]:
    choose = random.Random(seed)
    parts, rest = [], text
    while rest:
        size = choose.randint(1, 4)
        parts.append(rest[:size])
        rest = rest[size:]
    return parts


def through(parts: list[str], stops: list[str], include: bool = False) -> tuple[str, str | None]:
    checker = StopStrings(stops, include=include)
    out = ""
    for part in parts:
        out += checker.push(part)
        if checker.matched is not None:
            return out, checker.matched
    return out + checker.flush(), None


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ["two"], ("one ", "two")),
        ("one two three", ["four"], ("one two three", None)),
        ("one two three", ["three", "o t"], ("one tw", "o t")),
        ("aaab", ["aab"], ("a", "aab")),
        ("abcd", ["abcd", "bc"], ("a", "bc")),
        ("abc", ["bc", "abc"], ("", "abc")),
        ("a 😀 b", ["😀"], ("a ", "😀")),
        ("almost sto", ["stop"], ("almost sto", None)),
        ("\n\nUser:", ["\nUser", "\n\n"], ("", "\n\n")),
    ],
)
def test_the_first_stop_string_ends_the_text(
    text: str, stops: list[str], expected: tuple[str, str | None], seed: int
) -> None:
    assert through(cut(text, seed), stops) == expected


def test_a_stop_string_can_be_part_of_the_text() -> None:
    assert through(["one tw", "o three"], ["two"], include=True) == ("one two", "two")


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    checker = StopStrings(["stop"])
    assert [checker.push(p) for p in ("a", "s", "t", "x", "sto")] == ["a", "", "", "stx", ""]
    assert checker.flush() == "sto"


def run(text: str, *, finish: str = "length", extra: tuple[int, ...] = (), **options: object) -> list[Piece]:
    stops = options.pop("stops", None)
    checker = StopStrings(stops) if isinstance(stops, list) else None
    choice = ChoiceText(detokenizer(TOKENIZER, []), checker, **options)  # type: ignore[arg-type]
    tokens = [*TOKENIZER.encode(text, add_special_tokens=False), *extra]
    return [choice.push([t], finish if i == len(tokens) - 1 else None) for i, t in enumerate(tokens)]


def test_offsets_say_where_each_token_begins() -> None:
    text = "hello é😀 w"
    pieces = run(text)
    whole = "".join(piece.text for piece in pieces)
    assert whole == text
    assert [p.offsets[0] for p in pieces] == [0, 5, 6, 7, 7, 7, 7, 8]


def test_the_end_token_is_counted_and_not_shown() -> None:
    shown = run("hi", finish="stop", extra=(TOKENIZER.encode("!", add_special_tokens=False)[0],))
    assert "".join(p.text for p in shown) == "hi"
    assert sum(p.num_tokens for p in shown) == 3


def test_the_end_token_is_shown_when_it_is_part_of_the_text() -> None:
    bang = TOKENIZER.encode("!", add_special_tokens=False)[0]
    shown = run("hi", finish="stop", extra=(bang,), hide_stop_token=False)
    assert "".join(p.text for p in shown) == "hi!"


def test_the_last_token_is_shown_when_the_length_ends_the_choice() -> None:
    assert "".join(p.text for p in run("hi", finish="length", extra=(EOS,))) == "hi"


def test_a_stop_string_ends_the_choice_with_the_token_that_completes_it() -> None:
    choice = ChoiceText(detokenizer(TOKENIZER, []), StopStrings(["b"]))
    piece = choice.push(TOKENIZER.encode("abc", add_special_tokens=False), None)
    assert piece == Piece("a", 2, "stop", (0, 1), stop_string="b")
    assert choice.finish == "stop"


def test_held_text_comes_with_the_finish() -> None:
    assert "".join(p.text for p in run("sto", stops=["stop"])) == "sto"


def test_a_stop_string_within_min_tokens_is_not_looked_for() -> None:
    pieces = run("abab", stops=["b"], min_tokens=3)
    assert "".join(p.text for p in pieces[:4]) == "aba"
    assert pieces[3].finish == "stop"
