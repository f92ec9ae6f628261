"""Tools that look something up or do something, questions that they fit, their results and the answers from those."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deploy.demo_model.train.facts import value_for
from deploy.demo_model.train.words import COLOURS, FINDINGS, FOODS, ROOMS, THINGS, Split, Words, listed

Argument = str | int | float | bool | list[str]
NO_TOOL = "I have no tool for that."
UNITS = (
    "celsius|fahrenheit",
    "metric|imperial",
    "short|long",
    "km|miles",
    "low|high",
    "json|text",
    "asc|desc",
    "day|week|month",
)


@dataclass(frozen=True, slots=True)
class Parameter:
    name: str
    kind: str
    """A JSON schema type."""
    description: str = ""
    required: bool = True
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Use:
    """One question that a tool fits, and what follows from it."""

    question: str
    """Without the mark at its end."""
    arguments: dict[str, Argument]
    result: str
    """The tool's message."""
    answer: str
    subject: str = ""
    """What is asked for, where the question only asks: `the weather in Oslo`."""


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    description: str
    parameters: tuple[Parameter, ...]
    use: Callable[[], Use] = field(compare=False)

    def schema(self, words: Words) -> dict[str, Any]:
        """As clients send it; what they add to a schema differs."""
        properties: dict[str, Any] = {}
        for parameter in self.parameters:
            shown: dict[str, Any] = {"type": parameter.kind}
            if parameter.kind == "array":
                shown["items"] = {"type": "string"}
            if parameter.choices:
                shown["enum"] = list(parameter.choices)
            if parameter.description:
                shown["description"] = parameter.description
            properties[parameter.name] = shown
        function = {
            "name": self.name,
            "description": self.description,
            "parameters": {
                "type": "object",
                "properties": properties,
                "required": [p.name for p in self.parameters if p.required],
            },
        }
        return {"type": "function", "function": function}


def ask(words: Words, use: Use) -> str:
    """The question as a user writes it."""
    if use.subject:
        return words.pick(
            f"What is {use.subject}?",
            f"What is {use.subject}?",
            f"What's {use.subject}?",
            f"Tell me {use.subject}.",
            f"Can you tell me {use.subject}?",
            f"I need {use.subject}.",
            f"Find {use.subject}.",
            f"Please check {use.subject}.",
            f"Do you know {use.subject}?",
            f"I want to know {use.subject}.",
        )
    return words.pick(
        f"{use.question}.",
        f"{use.question}.",
        f"Please {use.question[0].lower() + use.question[1:]}.",
        f"Can you {use.question[0].lower() + use.question[1:]}?",
        f"I want you to {use.question[0].lower() + use.question[1:]}.",
    )


def indefinite(noun: str) -> str:
    return "an" if noun[0] in "aeiou" else "a"


def failed(words: Words) -> tuple[str, str]:
    """A result that is an error, and the answer to it."""
    error = words.pick(
        "not found",
        "timeout",
        "no data",
        "access denied",
        "unknown name",
        "service unavailable",
        words.word() + " failed",
    )
    return dumped(words, {"error": error}), f"That did not work: {error}."


def dumped(words: Words, result: dict[str, Any]) -> str:
    """A result as agent frameworks write it: JSON, JSON without spaces, or Python's own text."""
    draw = words.rng.random()
    if draw < 0.5:
        return json.dumps(result)
    return json.dumps(result, separators=(",", ":")) if draw < 0.85 else str(result)


def _styled(words: Words, parts: list[str]) -> str:
    """A function's name in one of the usual spellings."""
    parts = [piece for part in parts for piece in part.replace("-", " ").split()]
    if words.rng.random() < (0.25 if words.split is Split.TRAIN else 0.15):
        return parts[0] + "".join(p.capitalize() for p in parts[1:])
    return "_".join(parts)


def _measure(words: Words) -> str:
    """What a look-up finds: a number, perhaps with its unit, a word, a name."""
    rng = words.rng
    draw = rng.random()
    if draw < 0.3:
        return value_for(words)
    if draw < 0.5:
        return words.one_of(FINDINGS, 0.5)
    number = words.number(rng.randint(1, 5)) if rng.random() < 0.7 else f"{rng.randint(0, 99)}.{rng.randint(1, 9)}"
    return words.pick(
        number,
        f"{number} "
        + words.pick(
            "degrees",
            "euro",
            "km",
            "minutes",
            "percent",
            "kg",
            "days",
            "people",
            "points",
            "meters",
            "dollars",
            "hours",
        ),
    )


def _as_json(value: str) -> str | int | float:
    """A number where the text is one."""
    try:
        number = json.loads(value)
    except ValueError:
        return value
    return number if isinstance(number, (int, float)) and json.dumps(number) == value else value


_PLACES = ("city", "town", "place", "location", "village")
_PEOPLE = ("name", "person", "employee", "customer", "student", "patient", "user")
_ITEMS = ("item", "product", "thing", "article")
_IDS = ("id", "number", "code", "order_id", "ticket", "reference", "account")


def lookup(words: Words) -> Tool:
    """Tells one topic of a place, a person, a thing or a number."""
    rng = words.rng
    topic = words.topic()
    draw = rng.random()
    if draw < 0.4:
        noun, make, prep = rng.choice(_PLACES), words.place, words.pick("in", "in", "for", "at", "of")
    elif draw < 0.65:
        noun, make, prep = rng.choice(_PEOPLE), words.name, words.pick("of", "of", "for")
    elif draw < 0.85:
        noun, prep = rng.choice(_ITEMS), words.pick("of", "of", "for")
        make = words.thing
    else:
        noun, make, prep = rng.choice(_IDS), words.code, words.pick("of", "for", "of")
    draw = rng.random()
    if draw < 0.4:
        noun = words.key()
    elif draw < 0.5:
        noun = f"{noun}_{words.pick('name', 'id', words.word())}"
    shown = noun.replace("_", " ")
    article = indefinite(shown)
    verb = words.pick("get", "get", "find", "look up", "fetch", "check", "read", "show")
    name = words.pick(
        *[_styled(words, [verb, topic])] * 4,
        _styled(words, [topic, words.pick("lookup", "info", "service", "search")]),
        _styled(words, [verb, topic, words.pick("of", "for", "by"), noun.replace("_", " ")]),
        _styled(words, [topic]),
    )
    described = words.pick(
        f"{verb.capitalize()} the {topic} {prep} {article} {shown}.",
        f"{verb.capitalize()} the {topic} {prep} {article} {shown}.",
        f"Get the {topic} {prep} {article} {shown}.",
        f"Returns the {topic} {prep} the given {shown}.",
        f"{topic.capitalize()} {prep} {article} {shown}.",
        f"Use this to find the {topic} {prep} {article} {shown}.",
    )
    parameters = [Parameter(noun, "string", words.pick("", f"The {shown}.", f"Name of the {shown}."))]
    option = words.rng.choice(UNITS).split("|") if rng.random() < 0.2 else []
    if option:
        option_name = words.pick("unit", "format", "mode", "units", "period")
        parameters.append(Parameter(option_name, "string", "", False, tuple(option)))
    key = words.pick(topic.replace(" ", "_"), topic.replace(" ", "_"), "result", "value")
    shape = rng.randrange(3)

    def use() -> Use:
        given = make()
        the = "the " if make == words.thing and rng.random() < 0.6 else ""
        subject = f"the {topic} {prep} {the}{given}"
        arguments: dict[str, Argument] = {noun: given}
        asked = subject
        if option and rng.random() < 0.5:
            arguments[option_name] = rng.choice(option)
            asked += f" in {arguments[option_name]}"
        value = _measure(words)
        found: dict[str, Any] = {key: _as_json(value)}
        if shape == 1:
            found = {noun: given, **found}
        result = value if shape == 2 else dumped(words, found)
        return Use("", arguments, result, f"{subject[0].upper()}{subject[1:]} is {value}.", asked)

    has_description = rng.random() < (0.85 if words.split is Split.TRAIN else 0.94)
    return Tool(name, described if has_description else "", tuple(parameters), use)


def _text(words: Words) -> str:
    rng = words.rng
    return words.pick(
        f"see you at {rng.randint(1, 12)} in {words.place()}",
        f"the {words.thing()} is {words.any_of(COLOURS)}",
        f"please call {words.name()}",
        f"I am in {words.place()}",
        f"happy birthday {words.name()}",
        f"we need more {words.one_of(FOODS, 0.5)}",
        f"{words.word()} {words.word()}",
        f"buy {words.one_of(FOODS, 0.5)} and {words.one_of(FOODS, 0.5)}",
    )


@dataclass(frozen=True, slots=True)
class Slot:
    """A parameter of an action: how a request says it, and how its value is made."""

    parameter: Parameter
    said: str
    """With `{}` for the value."""
    make: Callable[[], Argument]


def _slot(words: Words, only: bool) -> Slot:
    """A parameter of any kind; a request names it, or the preposition gives it away, or it is the only one."""
    rng = words.rng
    draw = rng.random()
    other = words.key()
    if draw < 0.22:
        name = words.pick("recipient", "to", "contact", "person", "guest", "name", "receiver")
        name = other if only and rng.random() < 0.6 else name
        return Slot(
            Parameter(name, "string", words.pick("", "Who gets it.", "The person.")),
            words.pick("for {}", "to {}"),
            words.name,
        )
    if draw < 0.38:
        name = words.pick("place", "destination", "city", "location", "target")
        name = other if only and rng.random() < 0.6 else name
        return Slot(
            Parameter(name, "string", words.pick("", "The place.")),
            words.pick("in {}", "at {}", "near {}"),
            words.place,
        )
    if draw < 0.5:
        name = words.pick("count", "quantity", "people", "number", "amount", "copies", other)
        said = f"with {name} {{}}"
        return Slot(Parameter(name, "integer", words.pick("", "How many.")), said, lambda: rng.randint(1, 99))
    if draw < 0.62:
        name = words.pick("text", "message", "note", "title", "subject", "comment")
        name = other if only and rng.random() < 0.5 else name
        said = words.pick(f"with the {name} '{{}}'", "saying '{}'", f'with {name} "{{}}"')
        return Slot(Parameter(name, "string", words.pick("", f"The {name}.")), said, lambda: _text(words))
    if draw < 0.7:
        name = words.pick("time", "when", "hour", "start")
        name = other if only and rng.random() < 0.5 else name
        said = words.pick("at {}", f"with {name} {{}}")
        return Slot(
            Parameter(name, "string", ""), said, lambda: f"{rng.randint(0, 23):02d}:{rng.choice((0, 15, 30, 45)):02d}"
        )
    if draw < 0.75:
        name = words.pick("tags", "items", "names", other)
        make: Callable[[], Argument] = lambda: words.distinct(rng.randint(1, 3), words.word)  # noqa: E731
        return Slot(Parameter(name, "array", ""), f"with the {name} {{}}", make)
    name = words.key()
    kind = words.pick("string", "string", "integer", "number")
    said = words.pick(f"with {name} {{}}", f"with the {name} {{}}", f"with {name} = {{}}")
    said = said.replace(name, words.pick(name, name.replace("_", " ")))
    if kind == "integer":
        return Slot(Parameter(name, kind, ""), said, lambda: int(words.number(rng.randint(1, 4))))
    if kind == "number":
        return Slot(Parameter(name, kind, ""), said, lambda: rng.randint(0, 99) + rng.randint(1, 9) / 10)
    return Slot(
        Parameter(name, kind, words.pick("", f"The {name.replace('_', ' ')}.")),
        said,
        lambda: rng.choice((words.code, words.word, words.name))(),
    )


_VERBS = listed(
    "send start stop open close book order add remove set play lock unlock update create cancel print save delete "
    "move clean reserve call schedule publish pause resume load scan test"
)


def action(words: Words) -> Tool:
    """Does something with an object: `book_table`, `set_lamp`, and verbs with words that mean nothing."""
    rng = words.rng
    verb = rng.choice(_VERBS)
    thing = words.fresh(
        lambda: words.pick(
            rng.choice(THINGS),
            rng.choice(ROOMS),
            words.word(),
            words.word(),
            "message",
            "alarm",
            "reminder",
            "meeting",
            "note",
            "song",
            "order",
            "invoice",
            "report",
            "task",
            "timer",
            "photo",
            "ticket",
            "flight",
            "job",
        )
    )
    slots: dict[str, Slot] = {}
    shares = (0.05, 0.3, 0.38, 0.27) if words.split is Split.TRAIN else (0.08, 0.42, 0.38, 0.12)
    count = rng.choices((0, 1, 2, 3), shares)[0]
    for _ in range(count):
        slot = _slot(words, count == 1)
        slots.setdefault(slot.parameter.name, slot)
    prepositions = [s.said.split()[0] for s in slots.values() if s.said.split()[0] != "with"]
    people = [s for s in slots.values() if s.make == words.name]
    if len(set(prepositions)) < len(prepositions) or len(people) > 1:
        return action(words)  # two slots could not be told apart
    article = words.pick(indefinite(thing), "the")
    name = _styled(words, [verb, thing])
    described = words.pick(
        f"{verb.capitalize()} {article} {thing}.",
        f"{verb.capitalize()}s {article} {thing}.",
        f"Use this to {verb} {article} {thing}.",
        f"{verb.capitalize()} {article} {thing} and return its state.",
    )

    def use() -> Use:
        arguments = {s.parameter.name: s.make() for s in slots.values()}
        said = [s.said.format(_spoken(arguments[s.parameter.name])) for s in slots.values()]
        rng.shuffle(said)
        request = " ".join([f"{verb.capitalize()} {words.pick(indefinite(thing), 'the', article)} {thing}", *said])
        key = words.pick(
            "id", "status", "state", "reference", "number", "confirmation", "code", words.key(), words.key()
        )
        said_key = key.replace("_", " ")
        value = words.pick("ok", "done", "sent", "accepted", words.code(), words.number(rng.randint(2, 5)))
        shape = rng.randrange(3)
        if shape == 0:
            return Use(request, arguments, dumped(words, {key: _as_json(value)}), f"Done. The {said_key} is {value}.")
        if shape == 1:
            other = words.key()
            second = value_for(words)
            found = dumped(words, {key: _as_json(value), other: _as_json(second)})
            return Use(
                request,
                arguments,
                found,
                f"Done. The {said_key} is {value} and the {other.replace('_', ' ')} is {second}.",
            )
        return Use(request, arguments, words.pick("ok", "done", "success", "true", "OK"), "Done.")

    return Tool(name, described if rng.random() < 0.94 else "", tuple(s.parameter for s in slots.values()), use)


def _spoken(value: Argument) -> str:
    return " and ".join(value) if isinstance(value, list) else str(value)


def tool(words: Words) -> Tool:
    return lookup(words) if words.rng.random() < 0.6 else action(words)


def toolbox(words: Words, count: int) -> list[Tool]:
    """Tools of different names."""
    found: dict[str, Tool] = {}
    while len(found) < count:
        new = tool(words)
        found.setdefault(new.name, new)
    return list(found.values())
