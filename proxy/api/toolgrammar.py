"""Calls that are enforced, as a grammar: each format's own writing, with arguments of the functions' schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mesh.errors import RequestError
from mesh.tokenizer import Tokenizer
from proxy.api.argumentschema import ANNOTATIONS
from proxy.api.structured import check_schema, invalid_schema, json_rule, literal, spelled
from proxy.text.pairs import PairsCall, referred, type_of, types_of
from proxy.text.toolformats import JsonWriting, ToolFormat

ANALYSIS = ("<|channel|>analysis<|message|>", "<|end|>", "<|start|>assistant")
FINAL = "<|channel|>final<|message|>"
MAX_DEPTH = 16
"""Of references and alternatives within a parameter."""
MAX_VALUES = 1000
"""Parameters and their alternatives, of all functions: each is looked into, and references multiply them."""
OBJECT = frozenset({"type", "properties", "required", "additionalProperties", *ANNOTATIONS})
TEXT = frozenset({"type", "minLength", "maxLength", *ANNOTATIONS})
"""What can be said of a plain text; `format` is an annotation to JSON schema."""
JSON_TOKEN = re.compile(r'"[^"]*"|.')
PYTHON_NAME = re.compile(r"[A-Za-z0-9_.-]+")
PYTHON_WORDS = {"boolean": '("True" | "False")', "null": '"None"'}


@dataclass(frozen=True, slots=True)
class Enforced:
    """A function that may be called."""

    name: str
    schema: dict[str, Any]
    where: str
    """The schema's place in the body."""


def calls_grammar(functions: Sequence[Enforced], format: ToolFormat, tokenizer: Tokenizer, *, several: bool) -> str:
    """One call (`several`: or more) and nothing else. Raises `RequestError` 400 for what the format cannot say."""
    rules = _Rules(tokenizer)
    rules.start = rules.prologue(format) + rules.calls(functions, format, several=several)
    return rules.text()


def calls_or_form_grammar(
    functions: Sequence[Enforced], format: ToolFormat, tokenizer: Tokenizer, *, several: bool
) -> str:
    """Calls, or what the rule `form` says, which is not part of the grammar."""
    rules = _Rules(tokenizer)
    calls = rules.calls(functions, format, several=several)
    rules.start = f"{rules.prologue(format)}({calls} | {rules.answer(format)}form)"
    return rules.text()


def form_grammar(format: ToolFormat, tokenizer: Tokenizer) -> str:
    """`form` alone, in a format that frames every answer."""
    rules = _Rules(tokenizer)
    rules.start = rules.prologue(format) + rules.answer(format) + "form"
    return rules.text()


class _Rules:
    """A grammar that is being written."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._lines: list[str] = []
        self._values = 0
        self.start = ""

    def text(self) -> str:
        return "\n".join([f"start: {self.start}", *self._lines])

    def _spelled(self, text: str) -> str:
        return spelled(text, self._tokenizer)

    def _rule(self, body: str, options: str = "") -> str:
        name = f"rule_{len(self._lines)}"
        self._lines.append(f"{name}{options}: {body}")
        return name

    def _text_until(self, mark: str, pattern: str = "(?s:.*)") -> str:
        """Any text and the mark behind it."""
        if self._tokenizer.backend.token_to_id(mark) in self._tokenizer.special_token_ids:
            return f"{self._rule(f'/{pattern}/')} {self._spelled(mark)}"
        return self._rule(f"/{pattern}/", f"[suffix={literal(mark)}]")

    def prologue(self, format: ToolFormat) -> str:
        """What may come before the answer."""
        if not format.always:
            return ""
        begin, end, role = ANALYSIS
        return f"({self._spelled(begin)} {self._text_until(end)} {self._spelled(role)})? "

    def answer(self, format: ToolFormat) -> str:
        return f"{self._spelled(FINAL)} " if format.always else ""

    def calls(self, functions: Sequence[Enforced], format: ToolFormat, *, several: bool) -> str:
        one = self._rule("\n  | ".join(self._call(function, format) for function in functions))
        parts = [self._spelled(format.before)] if format.before else []
        parts.append(one)
        if several and not format.always:
            parts.append(f"({self._spelled(format.between)} {one})*" if format.between else f"{one}*")
        if format.after:
            parts.append(self._spelled(format.after))
        return " ".join(parts)

    def _call(self, function: Enforced, format: ToolFormat) -> str:
        check_schema(function.where, function.schema)
        writing = format.writing
        if isinstance(writing, JsonWriting):
            return self._json_call(function, writing)
        return self._pairs_call(function, writing) if isinstance(writing, PairsCall) else self._python_call(function)

    def _json_call(self, function: Enforced, writing: JsonWriting) -> str:
        before, index, after = (part.replace("NAME", function.name) for part in writing.opening.partition("INDEX"))
        # a bare object in JSON's own tokens, so that another object may be the alternative
        texts = JSON_TOKEN.findall(before) if before.startswith("{") else [before]
        parts = [self._spelled(text) for text in texts]
        if index:
            parts += ["/[0-9]{1,3}/", self._spelled(after)]
        parts.append(json_rule(function.schema))
        closing = self._tokenizer.backend.token_to_id(writing.closing)
        if writing.closing and closing not in self._tokenizer.eos_token_ids:
            parts.append(self._spelled(writing.closing))
        return " ".join(parts)

    def _pairs_call(self, function: Enforced, call: PairsCall) -> str:
        gap, (outer, outer_end) = call.gap, call.wrapper
        parts = [self._spelled((outer + gap if outer else "") + call.opening + function.name + call.name_end + gap)]
        for name, schema, required in _parameters(function):
            if re.search(r"[<>\s]", name) or not name:
                raise _unsaid(function, f"a parameter named {name[:80]}")
            begin = call.key[0] + name + call.key[1] + (gap + call.value[0] if call.value[0] else "")
            value = self._pair_value(function, schema, call, 0)
            pair = f"{self._spelled(begin + call.edge)} {value}" + (f" {literal(gap)}" if gap else "")
            parts.append(pair if required else f"({pair})?")
        parts.append(self._spelled(call.closing + (gap + outer_end if outer else "")))
        return " ".join(parts)

    def _pair_value(self, function: Enforced, schema: Any, call: PairsCall, depth: int) -> str:
        """A parameter's value and the mark behind it."""
        self._values += 1
        if depth > MAX_DEPTH or self._values > MAX_VALUES:
            raise _unsaid(function, "such deep references, or so many values")
        if isinstance(schema, dict) and "$ref" in schema:
            schema = referred(schema["$ref"], function.schema)
            if schema is None:
                raise invalid_schema(function.where, "a $ref must name a part of the schema")
            return self._pair_value(function, schema, call, depth + 1)
        if schema is False:
            raise _unsaid(function, "a parameter without a value")
        if schema is True or not schema.keys() - ANNOTATIONS:
            return self._text_until(call.value[1])
        types = types_of(schema, function.schema)
        if "const" in schema or "enum" in schema:
            return self._pair_literal(function, schema, call)
        if types is not None and "string" not in types:
            return f"{json_rule(_rooted(schema, function))} {self._spelled(call.edge + call.value[1])}"
        parts = _alternatives(function, schema, types, MAX_VALUES - self._values)
        if parts is None:
            return self._pair_text(function, schema, call)
        return f"({' | '.join(self._pair_value(function, part, call, depth + 1) for part in parts)})"

    def _pair_literal(self, function: Enforced, schema: dict[str, Any], call: PairsCall) -> str:
        if other := schema.keys() - {"type", "const", "enum", *ANNOTATIONS}:
            raise _unsaid(function, f"given values with {min(other)[:80]}")
        values = [schema["const"]] if "const" in schema else schema["enum"]
        kinds = types_of({"type": schema["type"]}, {}) if "type" in schema else None
        texts = [
            value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for value in (values if isinstance(values, list) else ())
            if kinds is None or type_of(value, kinds) in kinds
        ]
        if not texts or any(call.value[1] in text for text in texts):
            raise _unsaid(function, f"no value, or one with {call.value[1]} in it")
        return f"({' | '.join(map(literal, texts))}) {self._spelled(call.edge + call.value[1])}"

    def _pair_text(self, function: Enforced, schema: dict[str, Any], call: PairsCall) -> str:
        for keyword in schema:
            if keyword not in TEXT:
                raise _unsaid(function, f"a text with {keyword[:80]}")
        least, most = schema.get("minLength", 0), schema.get("maxLength", "")
        if not least and most == "":
            return self._text_until(call.value[1])
        if not all(isinstance(n, int) and n >= 0 for n in (least, most or 0)):
            raise invalid_schema(function.where, "minLength and maxLength must be numbers from 0")
        pattern = f"(?s:.{{{least},{most}}})" + (r"\n" if call.lines else "")
        return self._text_until(call.value[1], pattern)

    def _python_call(self, function: Enforced) -> str:
        """Its arguments from the last to the first, each time for when others are before it and for when none are."""
        first = later = ""
        for name, schema, required in reversed(_parameters(function)):
            if not PYTHON_NAME.fullmatch(name):
                raise _unsaid(function, f"a parameter named {name[:80]}")
            one = f"{literal(name + '=')} {self._python_value(function, schema)}"
            head, tail = f"{one} {later}".strip(), f'", " {one} {later}'.strip()
            if required:
                first, later = self._rule(head), self._rule(tail)
            else:
                first = self._rule(f"{head} | {first or literal('')}")
                later = self._rule(f"{tail} | {later or literal('')}")
        return f'{literal(function.name + "(")} {first} ")"'

    def _python_value(self, function: Enforced, schema: Any) -> str:
        if isinstance(schema, dict) and not schema.keys() - {"type", *ANNOTATIONS}:
            word = PYTHON_WORDS.get(str(schema.get("type")))
            if word is not None:
                return word
        return json_rule(_rooted(schema, function))


def _parameters(function: Enforced) -> list[tuple[str, Any, bool]]:
    """Name, schema and whether it must be given, for each; others than the declared ones are not written."""
    schema = function.schema
    for keyword in schema:
        if keyword not in OBJECT:
            raise _unsaid(function, keyword[:80])
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(properties, dict) or not isinstance(required, list) or schema["type"] != "object":
        raise invalid_schema(function.where, "it must be of type object, with properties and a list of the required")
    names = dict.fromkeys([*properties, *(name for name in required if isinstance(name, str))])
    return [(name, properties.get(name, {}), name in required) for name in names]


def _alternatives(
    function: Enforced, schema: dict[str, Any], types: frozenset[str] | None, limit: int
) -> list[Any] | None:
    """Of a value that may be a string; None: it is nothing but a string."""
    for keyword in ("anyOf", "oneOf"):
        parts = schema.get(keyword)
        if isinstance(parts, list):
            if other := schema.keys() - {"type", keyword, *ANNOTATIONS}:
                raise _unsaid(function, f"alternatives with {min(other)[:80]}")
            if len(parts) > limit:
                raise _unsaid(function, "so many values")
            kinds = [types_of(part, function.schema) for part in parts]
            known = [kind for part in kinds for kind in part or ("string", "string")]
            if keyword == "oneOf" and len(set(known)) < len(known):
                raise _unsaid(function, "oneOf of alternatives that may overlap")
            return parts
    if types is not None and len(types) > 1:
        return [{**schema, "type": name} for name in sorted(types)]
    return None


def _rooted(schema: Any, function: Enforced) -> Any:
    """A part of the schema that can still refer to the whole's definitions."""
    shared = {name: function.schema[name] for name in ("$defs", "definitions") if name in function.schema}
    return {**shared, **schema} if isinstance(schema, dict) else schema


def _unsaid(function: Enforced, what: str) -> RequestError:
    return invalid_schema(function.where, f"a call of this model's format cannot be held to {what}")
