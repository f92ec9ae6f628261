"""Whole conversations of every kind, a few turns or as many as fit a number of tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from deploy.demo_model.train.facts import Fact, attribute_fact, facts, filler, joined, own_fact, turned_facts
from deploy.demo_model.train.talk import UNKNOWN, Exchange, casual, copy, json_given, json_stated, short, small_talk
from deploy.demo_model.train.tools import NO_TOOL, Tool, Use, ask, failed, tool, toolbox
from deploy.demo_model.train.words import JOBS, Words, listed

Message = dict[str, Any]
CHARACTERS_A_TOKEN = 2.4
"""Rather too few: a conversation should fit."""
SHORT = 240
"""Tokens of a conversation in which what is hard comes alone."""
SHORT_ROW = 300
"""Rows of at most so many tokens hold more of what is hard."""
SYSTEM_PROMPTS = listed(
    "You are a helpful assistant.|You are a helpful assistant.|Be brief.|You are a friendly assistant.|Answer in one "
    "sentence.|You are the assistant of a small company.|Be polite and short.|Help the user.|You are an AI assistant.|"
    "Use the tools when they help.|Answer the "
    "user's questions.|You can use tools.",
    "|",
)


@dataclass(slots=True)
class Conversation:
    skill: str
    messages: list[Message] = field(default_factory=list)
    tools: list[dict[str, Any]] = field(default_factory=list)
    turned: list[tuple[int, Fact]] = field(default_factory=list)
    """Facts whose values stand before their keys, each with the number of the message that answers it."""
    size: float = 10
    """Tokens so far, estimated."""

    def say(self, role: str, content: str) -> None:
        self._add({"role": role, "content": content}, content)

    def answer(self, fact: Fact) -> None:
        if fact.statement.startswith(fact.value):
            self.turned.append((len(self.messages), fact))
        self.say("assistant", fact.answer)

    def exchange(self, exchange: Exchange) -> None:
        self.say("user", exchange.user)
        self.say("assistant", exchange.assistant)

    def call(self, calls: Sequence[tuple[Tool, Use]]) -> None:
        functions = [{"name": tool.name, "arguments": use.arguments} for tool, use in calls]
        message = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": f} for f in functions],
        }
        self._add(message, json.dumps(functions))

    def offer(self, tools: Sequence[Tool], words: Words) -> None:
        self.tools = [t.schema(words) for t in tools]
        self.size += len(json.dumps(self.tools)) / CHARACTERS_A_TOKEN / 2

    def _add(self, message: Message, text: str) -> None:
        self.messages.append(message)
        self.size += 5 + len(text) / CHARACTERS_A_TOKEN


Builder = Callable[[Words, Conversation, float], None]
"""Adds turns until the conversation has about so many tokens."""


def system_prompt(words: Words) -> str:
    if words.rng.random() < 0.7:
        return words.rng.choice(SYSTEM_PROMPTS)
    return words.pick(
        f"You are the assistant of {words.name()}.",
        f"You work for a {words.any_of(JOBS)} in {words.place()}.",
        filler(words),
    )


def chat(words: Words, conversation: Conversation, room: float) -> None:
    """Short exchanges of all kinds, and what the user told along the way is asked for later."""
    rng = words.rng
    told: dict[str, Any] = {}
    while conversation.size < room:
        draw = rng.random()
        if draw < 0.2 or (not told and draw < 0.3):
            new = own_fact(words) if rng.random() < 0.5 else facts(words, 1)[0]
            if new.subject in told:
                continue
            told[new.subject] = new
            second = own_fact(words)
            if rng.random() < 0.25 and second.subject not in told:
                told[second.subject] = second
                asked = rng.choice((new, second))
                both = words.pick(joined(new, second), f"{new.statement} {second.statement}")
                conversation.exchange(Exchange("recall", f"{both} {asked.question}", asked.answer))
            elif rng.random() < 0.25:
                conversation.exchange(Exchange("recall", f"{new.statement} {new.question}", new.answer))
            elif new.key == "name":
                conversation.exchange(
                    Exchange("talk", casual(words, new.statement), f"Hello {new.value}! How can I help you?")
                )
            else:
                said = words.pick(new.statement, f"Remember: {new.statement}")
                conversation.exchange(Exchange("recall", said, "I will remember that."))
        elif told and draw < 0.48:
            known = rng.choice(list(told.values()))
            conversation.exchange(Exchange("recall", casual(words, known.question), known.answer))
        elif draw < 0.5:
            missing = own_fact(words) if rng.random() < 0.5 else attribute_fact(words)
            if missing.subject not in told:
                conversation.exchange(Exchange("recall", casual(words, missing.question), UNKNOWN))
        elif draw < 0.56 and room > 150:
            conversation.exchange(copy(words, rng.randint(2, 30)))
        elif draw < 0.6:
            conversation.exchange(json_given(words))
        else:
            conversation.exchange(short(words))


def recall(words: Words, conversation: Conversation, room: float) -> None:
    """Facts hidden among other sentences, then questions about some of them."""
    rng = words.rng
    share = rng.uniform(0.35, 0.75) if room < 600 else rng.uniform(0.6, 0.85)
    start = conversation.size
    budget = (room - start) * share
    density = rng.uniform(0.1, 1.0)
    sentences: list[str] = []
    size = 0.0
    known = []
    people = iter(facts(words, max(1, int(budget * density / 12))))
    while size < budget:
        new = next(people, None) if rng.random() < density else None
        if new is not None:
            known.append(new)
            sentence = new.statement
            second = next(people, None) if rng.random() < 0.1 else None
            if second is not None:
                known.append(second)
                sentence = joined(new, second)
        else:
            sentence = filler(words)
        sentences.append(sentence)
        size += 1 + len(sentence) / CHARACTERS_A_TOKEN
    if not known:
        known = facts(words, 1)
        sentences.insert(rng.randint(0, len(sentences)), known[0].statement)
    text = words.pick(" ", " ", "\n").join(sentences)
    head = words.pick("", "", "Here are my notes:\n", "Read this:\n", "Please remember this. ", "Text: ")
    # what is hardest is asked twice: values that stand before their key
    asking = known + [f for f in known if f.statement.startswith(f.value)]
    questions: list[Fact] = []
    while len(questions) < 64:
        questions.extend(rng.sample(asking, len(asking)))
    first = questions.pop()
    draw = rng.random()
    if draw < 0.25:
        conversation.say("user", head + text)
        conversation.say("assistant", words.pick("I will remember that."))
        conversation.say("user", casual(words, first.question))
        conversation.answer(first)
    elif draw < 0.4 and not conversation.messages:
        conversation.say("system", head + text)
        conversation.say("user", casual(words, first.question))
        conversation.answer(first)
    else:
        asked = words.pick(
            f"{head}{text}\n{first.question}",
            f"{head}{text} {first.question}",
            f"{head}{text}\nQuestion: {first.question}",
        )
        conversation.say("user", asked)
        conversation.answer(first)
    while conversation.size < room - 25:
        if rng.random() < 0.03:
            missing = attribute_fact(words)
            if missing.subject not in {f.subject for f in known}:
                conversation.exchange(Exchange("recall", missing.question, UNKNOWN))
            continue
        asked_fact = questions.pop()
        conversation.say("user", casual(words, asked_fact.question))
        conversation.answer(asked_fact)
        if not questions:
            questions = rng.sample(asking, len(asking))


def turned(words: Words, conversation: Conversation, room: float) -> None:
    """Few short statements whose values stand before their keys, and a question about each: the way back from a key is
    learned where there is little else to look at."""
    room = min(room, SHORT)
    known = turned_facts(words, max(2, int((room - conversation.size) / 46)))
    questions = words.rng.sample(known, len(known))
    text = words.pick(" ", " ", "\n").join(f.statement for f in known)
    conversation.say("user", f"{text}{words.pick(' ', chr(10))}{questions[0].question}")
    conversation.answer(questions[0])
    for asked in questions[1:]:
        conversation.say("user", casual(words, asked.question))
        conversation.answer(asked)


def copying(words: Words, conversation: Conversation, room: float) -> None:
    while conversation.size < room - 10:
        left = room - conversation.size
        size = min(int(left / 2.4), int(2 ** words.rng.uniform(2, 7)))
        conversation.exchange(copy(words, max(2, size)))


def structured(words: Words, conversation: Conversation, room: float) -> None:
    while conversation.size < room - 20:
        if words.rng.random() < 0.3:
            conversation.exchange(json_given(words))
            continue
        for exchange in json_stated(words, words.rng.randint(1, 3)):
            conversation.exchange(exchange)


def calling(words: Words, conversation: Conversation, room: float) -> None:
    """Tools, questions that they fit and others."""
    rng = words.rng
    most = 2 if room < 200 else 4 if room < 300 else 6
    tools = toolbox(words, rng.randint(1, most))
    if rng.random() < 0.06:
        tools = []
    conversation.offer(tools, words)
    while conversation.size < room - 50:
        draw = rng.random()
        if draw < 0.16 or not tools:
            stranger = tool(words)
            if stranger.name not in {t.name for t in tools} and stranger.description not in {
                t.description for t in tools
            }:
                question = casual(words, ask(words, stranger.use()))
                conversation.exchange(Exchange("no tool", question, NO_TOOL if tools else UNKNOWN))
            if not tools and rng.random() < 0.7:
                return
        elif draw < 0.3:
            other = short(words) if rng.random() < 0.8 else small_talk(words)
            answer = NO_TOOL if other.skill == "unknown" else other.assistant
            conversation.exchange(Exchange("no tool", other.user, answer))
        else:
            tool_turn(words, conversation, tools)


def tool_turn(words: Words, conversation: Conversation, tools: Sequence[Tool]) -> None:
    """A question, one or two calls, the results and an answer."""
    rng = words.rng
    chosen = rng.choice(tools)
    use = chosen.use()
    calls = [(chosen, use)]
    question = casual(words, ask(words, use))
    if rng.random() < 0.22:
        question, calls = two_calls(words, tools, chosen)
    conversation.say("user", question)
    conversation.call(calls)
    answers = []
    for _, done in calls:
        result, answer = done.result, done.answer
        if rng.random() < 0.06:
            result, answer = failed(words)
        conversation.say("tool", result)
        answers.append(answer)
    conversation.say("assistant", " ".join(answers))


def two_calls(words: Words, tools: Sequence[Tool], chosen: Tool) -> tuple[str, list[tuple[Tool, Use]]]:
    """One question that needs two calls, of one tool or of two."""
    rng = words.rng
    use = chosen.use()
    other = rng.choice(tools) if rng.random() < 0.5 else chosen
    second = other.use()
    if use.subject and second.subject:
        if other is chosen and rng.random() < 0.5:
            common = 0
            ours, theirs = use.subject.split(), second.subject.split()
            while common < min(len(ours), len(theirs)) and ours[common] == theirs[common]:
                common += 1
            tail = " ".join(theirs[max(1, common - words.rng.randint(0, 1)) :])
            if tail and len(use.arguments) == len(second.arguments) == 1 and use.arguments != second.arguments:
                return ask(words, Use("", {}, "", "", f"{use.subject} and {tail}")), [(chosen, use), (other, second)]
        both = Use("", {}, "", "", f"{use.subject} and {second.subject}")
        return ask(words, both), [(chosen, use), (other, second)]
    if not use.subject and not second.subject:
        request = (
            use.question
            + words.pick(" and ", " and then ", ", then ")
            + second.question[0].lower()
            + second.question[1:]
        )
        return ask(words, Use(request, {}, "", "")), [(chosen, use), (other, second)]
    first_asked, second_asked = ask(words, use), ask(words, second)
    return f"{first_asked} {second_asked}", [(chosen, use), (other, second)]


BUILDERS: tuple[tuple[str, Builder, float], ...] = (
    ("chat", chat, 0.08),
    ("recall", recall, 0.42),
    ("copy", copying, 0.3),
    ("json", structured, 0.07),
    ("tools", calling, 0.23),
)

BUILDERS_OF_SHORT_ROWS = (*BUILDERS, ("turned", turned, 0.12))


def conversation(words: Words, room: int) -> Conversation:
    """One of any kind, of about `room` tokens or (often) fewer."""
    while True:
        words.begin()
        made = _conversation(words, room)
        if any(message["role"] == "assistant" for message in made.messages):
            return made


def _conversation(words: Words, room: int) -> Conversation:
    rng = words.rng
    builders = BUILDERS if room > SHORT_ROW else BUILDERS_OF_SHORT_ROWS
    skill, build, _ = rng.choices(builders, [share for *_, share in builders])[0]
    made = Conversation(skill)
    if rng.random() < 0.3:
        made.say("system", system_prompt(words))
    if rng.random() < 0.35:
        room = int(rng.uniform(min(60, room), room))
    if rng.random() < 0.1 and skill != "chat":
        chat(words, made, made.size + 40)
    build(words, made, room)
    return made
