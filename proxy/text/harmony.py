"""The harmony format of gpt-oss: an output is messages, each in a channel, and some of them are calls.

    <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json
    <|message|>{...}<|call|>    or    <|start|>assistant<|channel|>final<|message|>...<|return|>

`analysis` is what the model thinks; a message to a declared function is a call; every other message is text. What is no
message is text as the model wrote it, marks and all.
"""

from __future__ import annotations

import re

from proxy.text.jsonvalue import json_value
from proxy.text.source import BLANKS, Malformed, Source, Steps
from proxy.text.toolcalls import CallList, Found, Functions, Parsed, ToolCall, unique_id

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")
MARKS = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)
MAX_HEADER_CHARS = 512
"""A header is a few words; without this bound text after a stray mark would be held until the end."""
RECIPIENT = re.compile(r"(?:^|\s)to=(\S+)")
TO, FUNCTIONS = " to=", "functions."


class HarmonyParser:
    """See `proxy.text.toolcalls.CallParser`."""

    __slots__ = (
        "_found",
        "_functions",
        "_list",
        "_shows_thoughts",
        "_source",
        "_steps",
        "_texts",
        "_thoughts",
        "thinking",
    )

    def __init__(self, functions: Functions, *, parallel: bool = True, thoughts: bool = True) -> None:
        """Not `thoughts`: what the model thinks is left out."""
        self._shows_thoughts = thoughts
        self._list = CallList(functions, unique_id, parallel=parallel)
        self._source = Source()
        self._steps = self._messages(self._source)
        self._texts: list[str] = []
        self._thoughts: list[str] = []
        self._found: list[ToolCall] = []
        self.thinking = False

    @property
    def called(self) -> bool:
        return self._list.called

    @property
    def done(self) -> bool:
        return self._list.done

    @property
    def may_be_done(self) -> bool:
        return self._list.may_be_done

    def push(self, text: str) -> Parsed:
        self._source.add(text)
        return self._parsed()

    def flush(self, *, complete: bool = False) -> Parsed:
        self._source.over = True
        return self._parsed()

    def _parsed(self) -> Parsed:
        next(self._steps, None)
        thoughts = "".join(self._thoughts) if self._shows_thoughts else ""
        parsed = Parsed("".join(self._texts), tuple(self._found), thoughts)
        for parts in (self._texts, self._found, self._thoughts):
            parts.clear()
        return parsed

    def _messages(self, source: Source) -> Steps[None]:
        # a prompt that ends with the role may be continued by the recipient
        yield from self._one(source, (START, CHANNEL, TO))
        while not self.done and not (yield from source.ended()):
            yield from self._one(source, (START, CHANNEL))

    def _one(self, source: Source, beginnings: tuple[str, ...]) -> Steps[None]:
        """A message, or text outside of messages."""
        source.forget()
        try:
            if (yield from source.ahead(*beginnings)):
                yield from self._message(source, beginnings)
            else:
                yield from self._plain(source)
        except Malformed:
            self._texts.append(source.taken)

    def _message(self, source: Source, beginnings: tuple[str, ...]) -> Steps[None]:
        header = yield from self._header(source, beginnings)
        recipient = RECIPIENT.search(header.replace(CHANNEL, " ").replace(CONSTRAIN, " "))
        channel = header.partition(CHANNEL)[2].split()
        if recipient is not None:
            yield from self._call(source, recipient[1])
        else:
            self.thinking = channel[:1] == ["analysis"]
            yield from self._body(source, self._thoughts if self.thinking else self._texts)
            self.thinking = False

    def _plain(self, source: Source) -> Steps[None]:
        """Text outside of messages, up to the next one."""
        text, mark = yield from source.part(START, CHANNEL, *ENDS)
        self._texts.append(text)
        if mark in ENDS:
            self._texts.append(mark)
        elif mark:
            source.back(mark)

    def _header(self, source: Source, beginnings: tuple[str, ...]) -> Steps[str]:
        """All before a message's body; the mark before that is taken as well."""
        header = yield from source.mark(*beginnings)
        while True:
            text, mark = yield from source.part(*MARKS)
            header += text
            if len(header) > MAX_HEADER_CHARS:
                source.back(header[MAX_HEADER_CHARS:] + mark)
                raise Malformed
            if mark == MESSAGE:
                return header
            known = mark in (CHANNEL, CONSTRAIN) and len(header) + len(mark) <= MAX_HEADER_CHARS
            if not known and (mark or not text):
                source.back(mark)
                raise Malformed
            header += mark

    def _body(self, source: Source, sink: list[str]) -> Steps[None]:
        while True:
            text, mark = yield from source.part(START, CHANNEL, *ENDS)
            sink.append(text)
            if mark in (START, CHANNEL):
                source.back(mark)
            if mark or not text:
                return

    def _call(self, source: Source, recipient: str) -> Steps[None]:
        yield from source.run(BLANKS)
        arguments = yield from json_value(source, "{")
        yield from source.run(BLANKS)
        if not (yield from source.ended()) and not (yield from source.ahead(START, CHANNEL)):
            yield from source.mark(*ENDS)
        name = recipient.removeprefix(FUNCTIONS) if recipient.startswith(FUNCTIONS) else ""
        made = self._list.add([Found(name, arguments)])
        if not made:
            raise Malformed
        self._found += made
