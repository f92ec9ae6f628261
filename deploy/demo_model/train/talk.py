"""Skills without tools: each makes one exchange, a user's message and the assistant's answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass

from deploy.demo_model.train.facts import fact, facts, filler, value_for
from deploy.demo_model.train.words import (
    ADJECTIVES,
    ANIMALS,
    COLOURS,
    FOODS,
    JOBS,
    THINGS,
    Split,
    Words,
    split_of,
)


@dataclass(frozen=True, slots=True)
class Exchange:
    skill: str
    user: str
    assistant: str


SMALL_TALK: tuple[tuple[str, str], ...] = (
    (
        "Hello!|Hello|Hi|Hi!|Hi there|Hey|Hey there!|Good day|Greetings|Good morning|Good evening|hello there",
        "Hello! How can I help you?",
    ),
    (
        "How are you?|How are you doing?|How is it going?|Are you well?|How do you feel?",
        "I am well, thank you. How can I help you?",
    ),
    (
        "Thanks|Thank you|Thanks a lot!|Thank you very much.|Many thanks|That helps, thank you.|Great, thanks!",
        "You are welcome.",
    ),
    ("Bye|Goodbye|See you|Bye bye|Good night|See you later!|Farewell", "Goodbye!"),
    (
        "Who are you?|What are you?|What is your name?|Tell me about yourself.|Introduce yourself.|Are you a robot?|"
        "Are you human?|Are you an AI?|Which model are you?|What model is this?|Who am I talking to?",
        "I am the kvmesh demo model, a very small language model.",
    ),
    (
        "What can you do?|How can you help me?|What are you good at?|What are your skills?|Help|help me|What should I "
        "ask you?|What can I ask you?|Give me some ideas.",
        "I can remember what you tell me, repeat text, call tools, answer in JSON, count, add small numbers and sort "
        "short lists.",
    ),
    (
        "What can you not do?|What are your limits?|What are you bad at?|Do you know everything?|Are you smart?",
        "I know very little about the world. I only know what you tell me in this conversation.",
    ),
    (
        "Who made you?|Who built you?|Who trained you?|Where do you come from?",
        "I was trained from nothing by the makers of kvmesh, on made-up conversations.",
    ),
    (
        "How big are you?|How many parameters do you have?|How large are you?|What is your size?",
        "I have a few million parameters, which is tiny for a language model.",
    ),
    (
        "What is kvmesh?|Tell me about kvmesh.|What does kvmesh do?|Explain kvmesh.|kvmesh?|What is this system?|"
        "What am I running?",
        "kvmesh is a system that serves language models with separate prefill and decode workers.",
    ),
    (
        "What does prefill do?|What is a prefill worker?|What is prefill?|What does the prefill worker do?",
        "A prefill worker reads the whole prompt and turns it into KV blocks and the first token.",
    ),
    (
        "What does decode do?|What is a decode worker?|What is decode?|What does the decode worker do?",
        "A decode worker takes the KV blocks and writes the answer, one token after the other.",
    ),
    (
        "What is a KV block?|What are KV blocks?|What is a block?|What is in a KV block?",
        "A KV block holds the keys and values of a few tokens for every layer.",
    ),
    (
        "Why are prefill and decode separate?|Why split prefill and decode?|What is disaggregation?|Why disaggregate?",
        "Prefill needs much computing and decode needs much memory bandwidth, so each has its own workers.",
    ),
    (
        "What does the proxy do?|What is the proxy?|What is the proxy for?",
        "The proxy speaks the OpenAI API and sends each request to the right workers.",
    ),
    (
        "What happens when a worker dies?|Can a worker fail?|What if a worker is killed?",
        "Another worker continues the answer, and the client sees only a short pause.",
    ),
    (
        "What is Redis for?|Why Redis?|What does Redis do here?",
        "Redis holds hints about which worker has which block. Nothing breaks without it.",
    ),
    ("Are you sure?|Really?|Is that right?|Is that true?", "I think so, but I am a very small model."),
    (
        "Tell me a joke.|Make me laugh.|Do you know a joke?",
        "A decode worker walks into a bar. It asks for one token at a time.",
    ),
    ("Ok|Okay|Fine|Good|Great|Nice|Cool|I see|Alright|Perfect|Wonderful", "Is there anything else I can do for you?"),
    ("No|No, thanks|Nothing|That is all|No, that is all.", "All right."),
    (
        "What language do you speak?|Do you speak German?|Do you speak French?|Can you speak Spanish?",
        "I speak only a little English.",
    ),
    ("I am sad|I am tired|I am angry|I feel bad|I am bored", "I am sorry to hear that. Can I do something for you?"),
    ("I am happy|I feel great|I am fine|I am well", "I am glad to hear that."),
    ("Sorry|I am sorry|My mistake|Excuse me", "No problem."),
)
UNKNOWN = "I do not know that. I only know what you tell me."


def casual(words: Words, text: str) -> str:
    """Sometimes as people type: without the capital, without the mark at the end."""
    draw = words.rng.random()
    if draw < 0.08 and not text[:2].isupper():
        text = text[0].lower() + text[1:]
    if draw > 0.95:
        text = text.rstrip("?.!")
    return text


def small_talk(words: Words) -> Exchange:
    asked, answer = words.rng.choice(SMALL_TALK)
    return Exchange("talk", casual(words, words.rng.choice(asked.split("|"))), answer)


def unknown(words: Words) -> Exchange:
    """A question about the world outside."""
    rng = words.rng
    place, name, word = words.place(), words.name(), words.word()
    thing = rng.choice((words.any_of(THINGS), words.any_of(FOODS), words.any_of(ANIMALS), word))
    asked = words.pick(
        f"What is the capital of {place}?",
        f"Who was {name} {words.name()}?",
        f"Who is the president of {place}?",
        f"Who invented the {thing}?",
        f"When was the {thing} invented?",
        f"Why is the {thing} {rng.choice(ADJECTIVES)}?",
        f"Write a poem about a {thing}.",
        f"Write a story about {name}.",
        f"How do I make a {thing}?",
        f"How do I cook {words.any_of(FOODS)}?",
        f"What is a {thing}?",
        f"What does {word} mean?",
        f"Translate {thing} into {words.pick('French', 'German', 'Spanish', 'Latin')}.",
        f"Explain {word}.",
        f"How far is it from {place} to {words.place()}?",
        f"What happened in {rng.randint(1000, 2030)}?",
        f"Which {words.any_of(JOBS)} is the best?",
        f"Is a {thing} bigger than a {words.any_of(ANIMALS)}?",
        f"What should I do in {place}?",
        "What day is it?",
        "What is the meaning of life?",
        "Who won the game?",
        "What is the news?",
        "Write a program.",
        "Explain quantum physics.",
        "How does a computer work?",
    )
    return Exchange("unknown", casual(words, asked), UNKNOWN)


def count(words: Words) -> Exchange:
    rng = words.rng
    draw = rng.random()
    if draw < 0.4:
        first = rng.choice((1, 1, 1, rng.randint(0, 30)))
        last = first + rng.randint(1, 11)
        asked = words.pick(f"Count from {first} to {last}.", f"Count {first} to {last}.")
        if first == 1:
            asked = words.pick(asked, f"Count to {last}.", f"Please count to {last}.")
        return Exchange("count", asked, ", ".join(map(str, range(first, last + 1))))
    if draw < 0.5:
        last = rng.randint(3, 12)
        return Exchange("count", f"Count down from {last} to 1.", ", ".join(map(str, range(last, 0, -1))))
    items = words.distinct(rng.randint(1, 9), lambda: rng.choice((words.name, words.thing, words.word))())
    listed = ", ".join(items)
    asked = words.pick(
        f"How many items are in this list: {listed}?",
        f"How many words are there: {listed}?",
        f"Count these: {listed}",
        f"How long is this list? {listed}",
    )
    return Exchange("count", asked, f"There are {len(items)}." if len(items) > 1 else "There is 1.")


def add(words: Words) -> Exchange:
    rng = words.rng
    high = rng.choice((9, 20, 50, 99, 99))
    a, b = rng.randint(0, high), rng.randint(0, high)
    asked = words.pick(
        f"What is {a} + {b}?",
        f"What is {a} plus {b}?",
        f"What is {a}+{b}?",
        f"{a}+{b}",
        f"{a} + {b}",
        f"{a} + {b} = ?",
        f"Add {a} and {b}.",
        f"How much is {a} + {b}?",
        f"How much is {a} and {b}?",
        f"Calculate {a} + {b}.",
    )
    return Exchange("add", asked, f"{a} + {b} = {a + b}")


def order(words: Words) -> Exchange:
    rng = words.rng
    size = rng.randint(2, 5)
    if rng.random() < 0.6:
        numbers = rng.sample(range(rng.choice((10, 30, 100))), size)
        listed = ", ".join(map(str, numbers))
        down = rng.random() < 0.25
        asked = words.pick(
            f"Sort {listed} from high to low." if down else f"Sort {listed} from low to high.",
            f"Put these numbers in falling order: {listed}" if down else f"Put these numbers in order: {listed}",
            f"Sort these numbers, largest first: {listed}" if down else f"Sort these numbers: {listed}",
        )
        return Exchange("order", asked, ", ".join(map(str, sorted(numbers, reverse=down))))
    known = rng.choice((FOODS, ANIMALS, THINGS, COLOURS))
    items = words.distinct(size, lambda: words.any_of(known))
    listed = ", ".join(items)
    asked = words.pick(
        f"Sort these words: {listed}",
        f"Put these words in alphabetical order: {listed}",
        f"Sort alphabetically: {listed}",
    )
    return Exchange("order", asked, ", ".join(sorted(items)))


def text_to_copy(words: Words, size: int) -> str:
    """About `size` tokens of one of many kinds."""
    rng = words.rng
    kind = rng.randrange(11)
    if words.split is Split.TRAIN and rng.random() < 0.25:
        return _repetitive(words, size)  # what is learned last is made more often in training
    if kind == 0:
        return " ".join(words.word() for _ in range(max(1, size // 4)))
    if kind == 1:
        return " ".join(
            rng.choice((words.name, words.place, words.code, words.word))() for _ in range(max(1, size // 4))
        )
    if kind == 2:
        return " ".join(filler(words) for _ in range(max(1, size // 16)))
    if kind == 3:
        return " ".join(fact(words).statement for _ in range(max(1, size // 12)))
    if kind == 4:
        mark = words.pick("- ", "* ", "")
        return "\n".join(
            f"{mark}{rng.choice((words.thing, words.name, words.code))()}" for _ in range(max(1, size // 6))
        )
    if kind == 5:
        return _code_lines(words, max(1, size // 14))
    if kind == 6:
        return json.dumps({words.key(): _json_value(words) for _ in range(max(1, size // 9))})
    if kind == 7:
        numbers = [words.number(rng.randint(1, 6)) for _ in range(max(1, size // 5))]
        return words.pick(", ", " ", "; ").join(numbers)
    if kind in (8, 9):
        return _repetitive(words, size)
    return _odd_characters(words, size)


def _code_lines(words: Words, count: int) -> str:
    rng = words.rng
    names = [words.word() for _ in range(3)]

    def line() -> str:
        a, b, n = rng.choice(names), rng.choice(names), rng.randrange(100)
        return words.pick(
            f"{a} = {n}",
            f"{a} = {b} + {n}",
            f'{a} = "{words.word()}"',
            f"print({a}, {b})",
            f"return {a} * {b}",
            f"if {a} > {n}:",
            f"for {a} in range({n}):",
            f"def {a}({b}):",
            f"import {a}",
            f"{a}.{b}({n})",
            f"while {a} != {b}:",
            f"{a}[{n}] = {b}",
            f"# {a} {b}",
            f"curl -s http://{a}:{n}/{b}",
            f"SELECT {a} FROM {b} WHERE id = {n};",
            f"<{a}>{words.word()}</{a}>",
        )

    text, depth = [], 0
    for _ in range(count):
        new = line()
        text.append("    " * depth + new)
        depth = depth + 1 if new.endswith(":") else rng.randint(0, depth)
    return "\n".join(text)


def _repetitive(words: Words, size: int) -> str:
    """Few parts in no order: where one stands in it can only be known from what came long before."""
    rng = words.rng
    make = rng.choice((words.word, words.name, words.code, words.thing, lambda: words.number(rng.randint(1, 3))))
    parts = words.distinct(rng.randint(2, 6), make)
    mark = words.pick(" ", " ", ", ", "\n", "-", " and ")
    return mark.join(rng.choice(parts) for _ in range(max(2, size // 4)))


_MARKS = list("!#$%&()*+,-./:;<=>?@[]^_{|}~'\"\\`")
_RARE = [*"äöüßéèàçñøåœ€£°±²µ½÷ΩλπЖдя中文日本語한국🙂🚀👍❤🎉"]


def _odd_characters(words: Words, size: int) -> str:
    """Marks, rare letters and signs between words."""
    rng, parts, left = words.rng, [], size
    while left > 0:
        draw = rng.random()
        if draw < 0.4:
            parts.append(words.word())
            left -= 3
        elif draw < 0.75:
            parts.append("".join(rng.choice(_MARKS) for _ in range(rng.randint(1, 3))))
            left -= 2
        else:
            parts.append("".join(rng.choice(_RARE) for _ in range(rng.randint(1, 2))))
            left -= 4
        parts.append(words.pick("", " ", " "))
    return "".join(parts).strip(' "') or words.word()


def copy(words: Words, size: int | None = None) -> Exchange:
    rng = words.rng
    text = text_to_copy(words, size or min(110, int(2 ** rng.uniform(2, 7))))
    one_line = "\n" not in text
    if one_line and rng.random() < 0.6:
        quoted = f'"{text}"' if '"' not in text and rng.random() < 0.3 else text
        asked = words.pick(
            "Repeat after me: ",
            "Repeat: ",
            "Copy this text: ",
            "Say ",
            "Say: ",
            "Write: ",
            "Echo: ",
            "Repeat this exactly: ",
            "Please repeat: ",
        )
        return Exchange("copy", asked + quoted, text)
    asked = words.pick(
        "Copy this exactly:",
        "Repeat this text:",
        "Repeat the following:",
        "Write this again:",
        "Copy the following text exactly:",
    )
    if rng.random() < 0.25:
        fenced = f"```{words.pick('', 'python', 'text', 'json')}\n{text}\n```"
        return Exchange("copy", f"{words.pick('Copy this code:', 'Repeat this code:', asked)}\n{fenced}", fenced)
    return Exchange("copy", f"{asked}\n{text}", text)


def say_often(words: Words) -> Exchange:
    word, times = words.word(), words.rng.randint(2, 5)
    asked = words.pick(f"Say {word} {times} times.", f"Repeat {word} {times} times.", f"Write {word} {times} times.")
    return Exchange("copy", asked, " ".join([word] * times))


def _json_value(words: Words) -> str | int | bool:
    if words.split is Split.TRAIN and words.rng.random() < 0.25:
        # whether it is a number is decided by what comes after its first digits
        return f"{words.number(words.rng.randint(1, 5))}{words.pick('-', '-', '')}{words.code()}"
    draw = words.rng.random()
    if draw < 0.3:
        return int(words.number(words.rng.randint(1, 5)))
    return value_for(words) if draw < 0.95 else draw < 0.975


def _spoken(value: str | int | bool) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _typed(value: str) -> str | int:
    """Digits are a number in JSON; with a leading zero they are a text."""
    return int(value) if value.isdigit() and (value[0] != "0" or value == "0") else value


def _keys_in_words(words: Words, keys: list[str]) -> str:
    if len(keys) == 1:
        return f"the key {keys[0]}"
    listed = ", ".join(keys[:-1]) + " and " + keys[-1]
    return words.pick("the keys ", "keys ", "the keys: ") + listed


def json_stated(words: Words, turns: int) -> list[Exchange]:
    """Values are stated; each turn asks for some of them as JSON, the later ones about the same text."""
    rng = words.rng
    if rng.random() < 0.35:
        known = facts(words, rng.randint(1, 4))
        values: dict[str, str | int | bool] = {f.key.replace(" ", "_"): _typed(f.value) for f in known}
        sentences = [f.statement for f in known]
        if len(values) < len(known) or any(split_of(key) is not words.split for key in values):
            return json_stated(words, turns)
    else:
        keys = words.distinct(rng.randint(1, 6), words.key)
        values = {key: _json_value(words) for key in keys}
        values = {key: _typed(v) if isinstance(v, str) else v for key, v in values.items()}
        form = words.pick(
            "The {k} is {v}.", "The {k} is {v}.", "{k}: {v}.", "{k} is {v}.", "Its {k} is {v}.", "{k} = {v},"
        )
        sentences = [form.format(k=words.pick(k, k.replace("_", " ")), v=_spoken(v)) for k, v in values.items()]
    rng.shuffle(sentences)
    exchanges = []
    text = " ".join(sentences)
    for turn in range(turns):
        chosen = list(values)
        rng.shuffle(chosen)
        chosen = chosen[: rng.randint(1, len(chosen))]
        listed = _keys_in_words(words, chosen)
        asked = words.pick(
            f"Answer in JSON with {listed}.",
            f"Give me a JSON object with {listed}.",
            f"Write this as JSON with {listed}.",
            f"Return JSON with {listed}.",
            f"Reply only with JSON that has {listed}.",
            f"As JSON, {listed}.",
        )
        if turn == 0:
            asked = words.pick(f"{text} {asked}", f"{text}\n{asked}", f"{asked} {text}", f"{asked}\n{text}")
        exchanges.append(Exchange("json", asked, json.dumps({key: values[key] for key in chosen})))
    return exchanges


def json_given(words: Words) -> Exchange:
    """Keys and values in the request itself."""
    rng = words.rng
    if rng.random() < 0.2:
        items = [_typed(value_for(words)) for _ in range(rng.randint(1, 5))]
        asked = words.pick("Return a JSON list of: ", "Make a JSON array of: ", "Write as a JSON list: ")
        return Exchange("json", asked + ", ".join(map(str, items)), json.dumps(items))
    keys = words.distinct(rng.randint(1, 5), words.key)
    values = {key: _json_value(words) for key in keys}
    values = {key: _typed(v) if isinstance(v, str) else v for key, v in values.items()}
    pairs = [words.pick("{k} {v}", "{k} {v}", "{k} = {v}", "{k}: {v}") for _ in range(1)] * len(keys)
    said = [pair.format(k=k, v=_spoken(v)) for pair, (k, v) in zip(pairs, values.items(), strict=True)]
    listed = said[0] if len(said) == 1 else ", ".join(said[:-1]) + " and " + said[-1]
    asked = words.pick(
        "Make a JSON object with ", "Return JSON with ", "Write JSON with ", "Give me JSON with ", "JSON with "
    )
    return Exchange("json", f"{asked}{listed}.", json.dumps(values))


SHORT_SKILLS: tuple[tuple[Callable[[Words], Exchange], float], ...] = (
    (small_talk, 4),
    (unknown, 1.5),
    (count, 2),
    (add, 3.5),
    (order, 3.5),
    (say_often, 0.7),
)


def short(words: Words) -> Exchange:
    """An exchange of a few dozen tokens."""
    makers, weights = zip(*SHORT_SKILLS, strict=True)
    maker: Callable[[Words], Exchange] = words.rng.choices(makers, weights)[0]
    return maker(words)
