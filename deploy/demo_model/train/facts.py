"""Facts that can be stated, asked for and answered, and sentences to hide them among."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from deploy.demo_model.train.words import (
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    FOODS,
    JOBS,
    ROOMS,
    THINGS,
    VERBS_PAST,
    WEEKDAYS,
    Split,
    Words,
)


@dataclass(frozen=True, slots=True)
class Fact:
    statement: str
    question: str
    answer: str
    value: str
    """What a right answer contains."""
    subject: str
    """Two facts of one text never share subject and kind."""
    key: str
    """A JSON key that fits the value."""


def fact(words: Words) -> Fact:
    """One of the world's kinds of fact, about names and values that are new each time."""
    return words.rng.choices(_MAKERS, _TRAINED_WEIGHTS if _training(words) else _WEIGHTS)[0](words)


def _training(words: Words) -> bool:
    """What is learned last is made more often in training than in evaluation: values that stand before their key."""
    return words.split is Split.TRAIN


def value_for(words: Words) -> str:
    """A name, number, code, place or word, to be anything's value."""
    draw = words.rng.random()
    if draw < 0.06:
        return f"{words.name()} {words.name()}"
    if draw < 0.12:
        return f"{words.pick(*ADJECTIVES)} {words.one_of(words.rng.choice((COLOURS, FOODS, ANIMALS, THINGS)), 0.5)}"
    if draw < 0.3:
        return words.number(words.rng.randint(2, 6))
    if draw < 0.5:
        return words.code()
    if draw < 0.65:
        return words.place()
    if draw < 0.75:
        return words.name()
    if draw < 0.9:
        return words.word()
    return words.one_of(words.rng.choice((COLOURS, FOODS, ANIMALS, THINGS)), 0.4)


def attribute_fact(words: Words, name: str | None = None, attribute: str | None = None) -> Fact:
    """`Ada's door code is 4821.`"""
    name, attribute, value = name or words.name(), attribute or words.attribute(), value_for(words)
    said = words.pick(
        f"{name}'s {attribute} is {value}.",
        f"{name}'s {attribute} is {value}.",
        f"The {attribute} of {name} is {value}.",
        f"{name} has the {attribute} {value}.",
        f"Note that {name}'s {attribute} is {value}.",
    )
    asked = words.pick(
        f"What is {name}'s {attribute}?",
        f"What is {name}'s {attribute}?",
        f"What is the {attribute} of {name}?",
        f"Tell me {name}'s {attribute}.",
        f"Which {attribute} does {name} have?",
        f"Do you remember {name}'s {attribute}?",
    )
    return Fact(said, asked, f"{name}'s {attribute} is {value}.", value, name + attribute, attribute)


def own_fact(words: Words) -> Fact:
    """`My door code is 4821.`, `I live in Oslo.`"""
    draw = words.rng.random()
    if draw < 0.1:
        place = words.place()
        asked = words.pick("Where do I live?", "In which town do I live?", "Where is my home?")
        return Fact(f"I live in {place}.", asked, f"You live in {place}.", place, "my city", "city")
    if draw < 0.15:
        age = str(words.rng.randint(2, 99))
        return Fact(f"I am {age} years old.", "How old am I?", f"You are {age} years old.", age, "my age", "age")
    if draw < 0.2:
        job = words.one_of(JOBS, 0.5)
        asked = words.pick("What is my job?", "What do I work as?")
        return Fact(f"I work as a {job}.", asked, f"You work as a {job}.", job, "my job", "job")
    if draw < 0.27:
        liked = words.one_of(words.rng.choice((FOODS, ANIMALS, THINGS)), 0.5)
        return Fact(f"I like {liked}.", "What do I like?", f"You like {liked}.", liked, "my taste", "taste")
    attribute = "name" if words.rng.random() < 0.3 else words.attribute()
    value = words.name() if attribute == "name" else value_for(words)
    said = words.pick(
        f"My {attribute} is {value}.", f"My {attribute} is {value}.", f"Remember that my {attribute} is {value}."
    )
    if attribute == "name":
        said = words.pick(
            said, f"I am {value}.", f"Hello, I am {value}.", f"Hi, my name is {value}!", f"Call me {value}."
        )
    asked = words.pick(
        f"What is my {attribute}?",
        f"What is my {attribute}?",
        f"Tell me my {attribute}.",
        f"Do you know my {attribute}?",
        f"Do you remember my {attribute}?",
    )
    return Fact(said, asked, f"Your {attribute} is {value}.", value, "my " + attribute, attribute)


def _home(words: Words) -> Fact:
    name, place = words.name(), words.place()
    said = words.pick(f"{name} lives in {place}.", f"{name} moved to {place}.", f"{name} has a house in {place}.")
    asked = words.pick(f"Where does {name} live?", f"In which town does {name} live?", f"Where is {name}'s home?")
    return Fact(said, asked, f"{name} lives in {place}.", place, name + "city", "city")


def _job(words: Words) -> Fact:
    name, job = words.name(), words.one_of(JOBS, 0.5)
    said = words.pick(f"{name} works as a {job}.", f"{name} is a {job}.")
    asked = words.pick(f"What does {name} work as?", f"What is {name}'s job?", f"Which job does {name} have?")
    return Fact(said, asked, f"{name} works as a {job}.", job, name + "job", "job")


def _age(words: Words) -> Fact:
    name, age = words.name(), str(words.rng.randint(2, 99))
    said = words.pick(f"{name} is {age} years old.", f"{name} turned {age} this year.")
    return Fact(said, f"How old is {name}?", f"{name} is {age} years old.", age, name + "age", "age")


def _code(words: Words) -> Fact:
    thing = words.thing()
    code = words.code() if words.rng.random() < 0.6 else words.number(words.rng.randint(3, 6))
    kind = words.pick("code", "code", "number", "password", "key")
    said = words.pick(
        f"The {kind} for the {thing} is {code}.",
        f"The {kind} of the {thing} is {code}.",
        f"{code} is the {kind} for the {thing}.",
    )
    if _training(words) and words.rng.random() < 0.45:
        said = f"{code} is the {kind} for the {thing}."
    asked = words.pick(
        f"What is the {kind} for the {thing}?",
        f"What is the {kind} of the {thing}?",
        f"Which {kind} does the {thing} have?",
        f"Tell me the {kind} for the {thing}.",
    )
    return Fact(said, asked, f"The {kind} for the {thing} is {code}.", code, thing + kind, kind)


def _location(words: Words) -> Fact:
    thing = words.thing()
    described = f"{words.one_of(COLOURS, 0.4)} {thing}" if words.rng.random() < 0.4 else thing
    room = f"in the {words.one_of(ROOMS, 0.5)}" if words.rng.random() < 0.6 else f"in {words.place()}"
    said = words.pick(f"The {described} is {room}.", f"You will find the {described} {room}.")
    asked = words.pick(f"Where is the {described}?", f"Where can I find the {described}?")
    return Fact(said, asked, f"The {described} is {room}.", room.split()[-1], described + "place", "place")


def _owner(words: Words) -> Fact:
    thing, name = words.thing(), words.name()
    described = f"{words.one_of(COLOURS, 0.4)} {thing}" if words.rng.random() < 0.4 else thing
    said = words.pick(f"The {described} belongs to {name}.", f"{name} owns the {described}.")
    if _training(words) and words.rng.random() < 0.5:
        said = f"{name} owns the {described}."
    asked = words.pick(f"Who owns the {described}?", f"Whose is the {described}?")
    return Fact(said, asked, f"The {described} belongs to {name}.", name, described + "owner", "owner")


def _number(words: Words) -> Fact:
    place, number = words.place(), words.number(words.rng.randint(2, 6))
    kind = words.pick("office", "shop", "school", "hotel", "bank", "club")
    said = words.pick(
        f"The phone number of the {kind} in {place} is {number}.", f"You can call the {kind} in {place} on {number}."
    )
    asked = words.pick(
        f"What is the phone number of the {kind} in {place}?", f"On which number can I call the {kind} in {place}?"
    )
    answer = f"The phone number of the {kind} in {place} is {number}."
    return Fact(said, asked, answer, number, place + kind, "phone")


def _colour(words: Words) -> Fact:
    name, thing, colour = words.name(), words.thing(), words.one_of(COLOURS, 0.4)
    said = words.pick(f"{name}'s {thing} is {colour}.", f"{name} has a {colour} {thing}.")
    asked = words.pick(f"What colour is {name}'s {thing}?", f"Which colour does {name}'s {thing} have?")
    return Fact(said, asked, f"{name}'s {thing} is {colour}.", colour, name + thing, "colour")


def _meeting(words: Words) -> Fact:
    name, day, hour = words.name(), words.rng.choice(WEEKDAYS), words.rng.randint(1, 12)
    when = f"on {day} at {hour}"
    said = words.pick(f"The meeting with {name} is {when}.", f"{name} comes to the meeting {when}.")
    asked = f"When is the meeting with {name}?"
    return Fact(said, asked, f"The meeting with {name} is {when}.", when, name + "meeting", "meeting")


_MAKERS: tuple[Callable[[Words], Fact], ...] = (
    attribute_fact,
    _home,
    _job,
    _age,
    _code,
    _location,
    _owner,
    _number,
    _colour,
    _meeting,
)
_WEIGHTS = (8, 3, 2, 1, 4, 3, 2, 2, 1, 1)
_TRAINED_WEIGHTS = (9, 3, 4, 1, 6, 3, 6, 2, 2, 1.5)


def turned_facts(words: Words, count: int) -> list[Fact]:
    """`count` facts whose values stand before their keys. Nothing that is written left to right finds these for free:
    what follows the key in the text is not its value."""
    found: dict[str, Fact] = {}
    while len(found) < count:
        new = words.rng.choice((_code, _owner, _turned_attribute))(words)
        if new.statement.startswith(new.value):
            found.setdefault(new.subject, new)
    return list(found.values())


def _turned_attribute(words: Words) -> Fact:
    new = attribute_fact(words)
    owner = new.answer.removesuffix(f" is {new.value}.")
    return replace(new, statement=f"{new.value} is {owner}.")


def facts(words: Words, count: int) -> list[Fact]:
    """`count` facts of which no two answer one question; some people and attributes occur more than once."""
    found: dict[str, Fact] = {}
    names: list[str] = []
    attributes: list[str] = []
    while len(found) < count:
        if names and words.rng.random() < 0.4:
            # The same name with another attribute, or the reverse: only both together tell which is meant.
            if words.rng.random() < 0.5:
                new = attribute_fact(words, name=words.rng.choice(names))
            else:
                new = attribute_fact(words, attribute=words.rng.choice(attributes))
        else:
            new = fact(words)
        if new.subject[0].isupper() and new.subject.endswith(new.key):
            names.append(new.subject.removesuffix(new.key))
            attributes.append(new.key)
        found.setdefault(new.subject, new)
    return list(found.values())


def joined(first: Fact, second: Fact) -> str:
    """Two statements in one sentence."""
    rest = second.statement
    if rest.startswith(("My ", "The ", "You ", "Note ")):
        rest = rest[0].lower() + rest[1:]
    return f"{first.statement.rstrip('.!')} and {rest}"


def filler(words: Words) -> str:
    """A sentence that states nothing anybody asks for."""
    rng = words.rng
    who = words.pick("the", "every", "one") + " " + rng.choice(ADJECTIVES) + " " + words.any_of(JOBS)
    if rng.random() < 0.4:
        who = words.name()
    what = (
        words.pick("the", "one", "every")
        + " "
        + rng.choice(ADJECTIVES)
        + " "
        + words.any_of(rng.choice((THINGS, FOODS)))
    )
    end = words.pick(
        "",
        "",
        f" in the {words.any_of(ROOMS)}",
        f" near {words.place()}",
        f" on {rng.choice(WEEKDAYS)}",
        " before the rain came",
        " for a friend",
        " without a word",
        f" with the {words.any_of(ANIMALS)}",
    )
    sentence = f"{who} {rng.choice(VERBS_PAST)} {what}{end}."
    return sentence[0].upper() + sentence[1:]
