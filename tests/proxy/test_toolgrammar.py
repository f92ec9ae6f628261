"""Enforced calls, format by format: the grammar lets a call through that the parser reads, and no talk."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from mesh.errors import RequestError
from mesh.grammar import Vocabulary, compile_grammar
from mesh.tokenizer import Tokenizer
from proxy.api.argumentschema import accepts_by
from proxy.api.structured import with_form
from proxy.api.toolgrammar import Enforced, calls_grammar, calls_or_form_grammar, form_grammar
from proxy.text.toolcalls import Function
from proxy.text.toolformats import FORMATS, ToolFormat
from tests.proxy.test_toolformats import SINGLE
from tests.proxy.tiny_tokenizer import byte_level
from tests.proxy.toolformats import glm45, hermes, llama3_json
from tests.proxy.toolformats.cases import Call, Writer, dumped


def python(call: Call) -> str:
    """With JSON's quotes; the words of Python only where they stand alone."""
    words = {"true": "True", "false": "False", "null": "None"}
    texts = ((key, dumped(value)) for key, value in call[1].items())
    return f"{call[0]}({', '.join(f'{key}={words.get(text, text)}' for key, text in texts)})"


WRITERS: dict[str, Writer] = {
    **SINGLE,
    "glm47": glm45.WITHOUT_BREAKS,
    "llama4_json": llama3_json.BARE,
    "hermes": Writer(call=lambda c: hermes.call(dumped({"name": c[0], "arguments": c[1]}))),
    **{name: replace(SINGLE[name], call=python) for name in ("pythonic", "llama4_pythonic", "olmo3")},
}
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SAVE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "description": "What."},
        "n": {"type": "integer", "minimum": 1, "maximum": 99},
        "unit": {"enum": ["c", "f"]},
        "tags": {"type": "array", "items": {"$ref": "#/$defs/tag"}},
        "ok": {"type": "boolean"},
    },
    "required": ["text", "n"],
    "additionalProperties": False,
    "$defs": {"tag": {"type": "string", "maxLength": 3}},
}
SCHEMAS: dict[str, dict[str, Any]] = {"weather": CITY, "time": {"type": "object", "properties": {}}, "save": SAVE}
ODD_NAMES = ("NAME", "INDEX", "functions.f", "f-1")
ENFORCED = [Enforced(name, schema, "tools.0.function.parameters") for name, schema in SCHEMAS.items()]
OSLO: Call = ("weather", {"city": "Oslo 東京 'a' \"b\" <c>"})
TIME: Call = ("time", {})
LESS: Call = ("save", {"text": "one\ntwo", "n": 7})
MORE: Call = ("save", {"text": "", "n": 42, "unit": "c", "tags": ["ab", "c"], "ok": True})
LATER: Call = ("save", {"text": "x", "n": 1, "ok": False})


class Marked:
    """A vocabulary that has every format's marks, as special tokens or not at all."""

    def __init__(self, *, special: bool) -> None:
        self.special = special
        self.tokenizer = byte_level()
        if special:
            backend = self.tokenizer.backend
            marks = {mark for format in FORMATS for mark in format.all_marks}
            backend.add_special_tokens(sorted(marks - {"function"}))
            size = backend.get_vocab_size(with_added_tokens=True)
            ends = (3, backend.token_to_id("<|call|>") or 3)
            self.tokenizer = Tokenizer(backend, eos_token_ids=ends, vocab_size=size)
        self.compiler = Vocabulary.of(self.tokenizer).tokenizer()

    def write(self, format: ToolFormat, *calls: Call) -> str:
        """An answer as its tokens are read; the end of a sequence is no part of it."""
        text = WRITERS[format.name].write(*calls)
        return text.removesuffix("<|call|>") if self.special else text

    def accepts(self, grammar: str, text: str) -> bool:
        """Whether the text is all of what the grammar allows."""
        matcher = compile_grammar(self.compiler, grammar)
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


PLAIN, SPECIAL = Marked(special=False), Marked(special=True)


def enforced(format: ToolFormat, marked: Marked, names: Sequence[str] = tuple(SCHEMAS), *, several: bool = True) -> str:
    functions = [function for function in ENFORCED if function.name in names]
    return calls_grammar(functions, format, marked.tokenizer, several=several)


def read(format: ToolFormat, text: str) -> list[Call]:
    parser = format.parser({name: Function(schema, lambda arguments: True) for name, schema in SCHEMAS.items()})
    parsed = parser.push(text) + parser.flush()
    assert parsed.text == ""
    return [(call.name, json.loads(call.arguments)) for call in parsed.calls]


def test_every_format_has_a_writer() -> None:
    assert {format.name for format in FORMATS} == set(WRITERS)


@pytest.mark.parametrize("marked", [PLAIN, SPECIAL], ids=["texts", "special tokens"])
@pytest.mark.parametrize("format", FORMATS, ids=lambda format: format.name)
class TestEnforced:
    def test_calls_and_nothing_else(self, format: ToolFormat, marked: Marked) -> None:
        write = partial(marked.write, format)
        grammar = enforced(format, marked)
        for call in (OSLO, TIME, LESS, MORE, LATER):
            assert marked.accepts(grammar, write(call)), write(call)
            assert read(format, write(call)) == [call]
        for text in ("Hello", " ", "", write(OSLO)[:-1], f"Sure! {write(OSLO)}", write(OSLO) + " Done.", "{}", "[]"):
            assert not marked.accepts(grammar, text), text

    def test_no_other_function_and_no_other_arguments(self, format: ToolFormat, marked: Marked) -> None:
        write = partial(marked.write, format)
        grammar = enforced(format, marked)
        for call in (
            ("unheard_of", {}),
            ("weather", {}),
            ("weather", {"town": "Oslo"}),
            ("save", {"text": "x"}),
            ("save", {"text": "x", "n": 100}),
            ("save", {"text": "x", "n": 1, "unit": "k"}),
            ("save", {"text": "x", "n": 1, "tags": ["long"]}),
            ("save", {"text": "x", "n": 1, "other": 2}),
        ):
            assert not marked.accepts(grammar, write(call)), write(call)

    def test_any_name_is_itself(self, format: ToolFormat, marked: Marked) -> None:
        functions = [Enforced(name, SCHEMAS["time"], "") for name in ODD_NAMES]
        grammar = calls_grammar(functions, format, marked.tokenizer, several=False)
        assert all(marked.accepts(grammar, marked.write(format, (name, {}))) for name in ODD_NAMES)

    def test_several_calls_or_one(self, format: ToolFormat, marked: Marked) -> None:
        write = partial(marked.write, format)
        both = write(OSLO, TIME)
        assert marked.accepts(enforced(format, marked), both) == (not format.always)
        assert not marked.accepts(enforced(format, marked, several=False), both)
        named = enforced(format, marked, ["time"], several=False)
        assert marked.accepts(named, write(TIME))
        assert not marked.accepts(named, write(OSLO))

    def test_calls_or_a_form(self, format: ToolFormat, marked: Marked) -> None:
        write = partial(marked.write, format)
        form = 'start: x\nx: %json {"type": "object", "properties": {"}{": {"type": "integer"}}, "required": ["}{"]}'
        grammar = with_form(calls_or_form_grammar(ENFORCED, format, marked.tokenizer, several=True), form)
        final = "<|channel|>final<|message|>" if format.always else ""
        assert marked.accepts(grammar, final + '{"}{": 5}')
        assert marked.accepts(grammar, write(OSLO))
        assert marked.accepts(grammar, write(MORE))
        for text in (final + "{}", final + '{"}{": "x"}', final + "Hello", write(OSLO) + final + '{"}{": 5}'):
            assert not marked.accepts(grammar, text), text


SMALL: dict[str, Any] = {
    "type": "object",
    "properties": {
        "text": {"type": "string", "maxLength": 3},
        "n": {"type": "integer", "minimum": -9, "maximum": 99},
        "ok": {"type": "boolean"},
        "pair": {
            "type": "object",
            "properties": {"a": {"enum": ["x", None]}},
            "required": ["a"],
            "additionalProperties": False,
        },
        "list": {"type": "array", "items": {"type": "string", "maxLength": 2}, "maxItems": 2},
        "maybe": {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 9}, {"type": "null"}]},
    },
    "required": ["text", "maybe"],
    "additionalProperties": False,
}


def walk(marked: Marked, grammar: str, rng: random.Random) -> str:
    """An output that the grammar allows, its tokens drawn from those that may follow."""
    matcher = compile_grammar(marked.compiler, grammar)
    tokens: list[int] = []
    while len(tokens) < 5000:
        allowed = np.unpackbits(np.frombuffer(matcher.compute_bitmask(), np.uint8), bitorder="little").nonzero()[0]
        token = int(rng.choice(allowed))
        if token in marked.tokenizer.eos_token_ids:
            return marked.tokenizer.decode(tokens, skip_special_tokens=False)
        matcher.consume_token(token)
        tokens.append(token)
    raise AssertionError("the walk does not end")


@pytest.mark.parametrize("marked", [PLAIN, SPECIAL], ids=["texts", "special tokens"])
@pytest.mark.parametrize("format", [f for f in FORMATS if not f.always], ids=lambda format: format.name)
def test_whatever_the_grammar_allows_is_calls_that_fit_the_schema(format: ToolFormat, marked: Marked) -> None:
    function = Function(SMALL, accepts_by(SMALL, ""))
    grammar = calls_grammar([Enforced("f", SMALL, "")], format, marked.tokenizer, several=True)
    rng = random.Random(format.name)
    for _ in range(6):
        output = walk(marked, grammar, rng)
        parser = format.parser({"f": function})
        parsed = parser.push(output) + parser.flush()
        assert parsed.text == "", output
        assert parsed.calls


@pytest.mark.parametrize("name", ["llama3_json", "pythonic", "hermes"])
def test_a_form_that_looks_like_a_call_is_the_other_alternative(name: str) -> None:
    format = next(format for format in FORMATS if format.name == name)
    grammar = calls_or_form_grammar(ENFORCED, format, PLAIN.tokenizer, several=True)
    call = PLAIN.write(format, OSLO)
    for schema in ("true", '{"type": "object"}', '{"properties": {"name": {"type": "string"}, "parameters": {}}}'):
        either = with_form(grammar, f"start: %json {schema}")
        for text in (
            call,
            '{"name": "weather", "parameters": {"town": 5}}',
            '{"name": "x"}',
            "{}",
            '{"name": "weather"}',
        ):
            assert PLAIN.accepts(either, text), (schema, text)
    listed = with_form(grammar, 'start: "[" /[0-9]+/ "]"')
    assert PLAIN.accepts(listed, call)
    assert PLAIN.accepts(listed, "[12]")


@pytest.mark.parametrize("marked", [PLAIN, SPECIAL], ids=["texts", "special tokens"])
def test_harmony_may_think_before_it_calls(marked: Marked) -> None:
    harmony = next(format for format in FORMATS if format.always)
    thought = "<|channel|>analysis<|message|>Well, {let} me\nsee.<|end|><|start|>assistant"
    call = marked.write(harmony, TIME)
    assert marked.accepts(enforced(harmony, marked), thought + call)
    assert not marked.accepts(enforced(harmony, marked), thought)
    form = with_form(form_grammar(harmony, marked.tokenizer), 'start: "yes" | "no"')
    assert marked.accepts(form, thought + "<|channel|>final<|message|>yes")
    assert marked.accepts(form, "<|channel|>final<|message|>no")
    assert not marked.accepts(form, thought + call)
    assert not marked.accepts(form, "yes")


def one_parameter(schema: Any, name: str = "v", more: Mapping[str, Any] | None = None) -> list[Enforced]:
    whole = {"type": "object", "properties": {name: schema}, "required": [name], **(more or {})}
    return [Enforced("f", whole, "tools.0.function.parameters")]


QWEN = next(format for format in FORMATS if format.name == "qwen3_coder")
PYTHON = next(format for format in FORMATS if format.name == "pythonic")


@pytest.mark.parametrize(
    ("schema", "allowed", "refused"),
    [
        ({"type": "string"}, ["", "a", "<b>\n\n</b> é", "5"], []),
        ({"type": "string", "maxLength": 3, "minLength": 1}, ["a", "é\nb"], ["", "abcd"]),
        ({"enum": ["a b", 5, None, True]}, ["a b", "5", "null", "true"], ["", "6", '"a b"', "True"]),
        ({"const": "x"}, ["x"], ["y"]),
        ({"enum": ["", "a"]}, ["", "a"], ["b"]),
        ({"type": "integer", "enum": [1, "a"]}, ["1"], ["a"]),
        ({"oneOf": [{"type": "string"}, {"type": "null"}]}, ["anything"], []),
        ({"anyOf": [{"type": "string", "maxLength": 2}, {"type": "integer"}]}, ["ab", "123"], ["abc"]),
        ({"type": "integer"}, ["5", "-7"], ["5.5", "five", ""]),
        ({"type": "number", "maximum": 9}, ["5.5", "9"], ["10"]),
        ({"type": "boolean"}, ["true"], ["True", "1"]),
        ({"type": "null"}, ["null"], ["None"]),
        ({"type": ["integer", "null"]}, ["5", "null"], ["x"]),
        ({"type": ["string", "null"]}, ["anything", "null"], []),
        ({"type": "array", "items": {"type": "integer"}}, ["[1, 2]", "[]"], ['["x"]', "1"]),
        ({"type": "object"}, ['{"a": {"b": 1}}'], ["[]", "x"]),
        ({"anyOf": [{"type": "integer"}, {"enum": ["a", "b"]}]}, ["5", "a"], ["c", "5.5"]),
        ({"$ref": "#/$defs/d"}, ["5"], ["x"]),
        ({"anyOf": [{"$ref": "#/$defs/d"}, {"type": "null"}]}, ["5", "null"], ["x"]),
        ({"type": "array", "items": {"$ref": "#/$defs/d"}}, ["[5]"], ['["x"]']),
        ({"type": "string", "format": "date"}, ["2026-01-01"], []),
        ({}, ["anything", "5", "{"], []),
        (True, ["anything"], []),
    ],
)
def test_a_plain_value_is_held_to_its_schema(schema: Any, allowed: list[str], refused: list[str]) -> None:
    functions = one_parameter(schema, more={"$defs": {"d": {"type": "integer"}}})
    grammar = calls_grammar(functions, QWEN, PLAIN.tokenizer, several=False)

    def call(text: str) -> str:
        return f"<tool_call>\n<function=f>\n<parameter=v>\n{text}\n</parameter>\n</function>\n</tool_call>"

    assert [text for text in allowed if not PLAIN.accepts(grammar, call(text))] == []
    assert [text for text in refused if PLAIN.accepts(grammar, call(text))] == []


@pytest.mark.parametrize(
    ("functions", "word"),
    [
        (one_parameter({"type": "string", "pattern": "a+"}), "pattern"),
        (one_parameter({"enum": ["a</parameter>"]}), "</parameter>"),
        (one_parameter({"type": "string"}, "a>b"), "a>b"),
        (one_parameter({"type": "string"}, ""), "named"),
        (one_parameter({"$ref": "#/$defs/none"}), "$ref"),
        (one_parameter({"$ref": "#/properties/v"}), "deep"),
        (one_parameter(False), "without a value"),
        (one_parameter({"pattern": "a+"}), "pattern"),
        (one_parameter({"not": {}}), "not"),
        (one_parameter({"allOf": [{"type": "string"}]}), "allOf"),
        (one_parameter({"enum": []}), "no value"),
        (one_parameter({"enum": ["a"], "minLength": 1}), "minLength"),
        (one_parameter({"oneOf": [{"type": "string"}, {"const": "a"}]}), "overlap"),
        (one_parameter({"type": "string", "minLength": -1}), "minLength"),
        (one_parameter({"anyOf": [{"type": "string"}], "maxLength": 3}), "maxLength"),
        (one_parameter({"type": "string"}, more={"anyOf": []}), "anyOf"),
        (one_parameter({"type": "string"}, more={"patternProperties": {}}), "patternProperties"),
        ([Enforced("f", {"type": "array"}, "tools.0.function.parameters")], "object"),
        ([Enforced("f", {"type": "object", "required": "v"}, "tools.0.function.parameters")], "required"),
    ],
)
def test_what_plain_values_cannot_be_held_to_is_refused(functions: list[Enforced], word: str) -> None:
    with pytest.raises(RequestError, match=word.replace("$", r"\$")) as refusal:
        calls_grammar(functions, QWEN, PLAIN.tokenizer, several=False)
    error = refusal.value
    assert (error.status, error.code, error.param) == (400, "invalid_schema", "tools.0.function.parameters")


def test_references_that_multiply_are_given_up() -> None:
    twice: Any = {"anyOf": [{"$ref": "#/$defs/d"}] * 50}
    with pytest.raises(RequestError, match="so many values"):
        calls_grammar(one_parameter(twice, more={"$defs": {"d": twice}}), QWEN, PLAIN.tokenizer, several=False)


def test_python_has_no_name_for_some_parameters() -> None:
    with pytest.raises(RequestError, match="a b"):
        calls_grammar(one_parameter({"type": "string"}, "a b"), PYTHON, PLAIN.tokenizer, several=False)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("[f(a=1)]", True),
        ("[f(b=True)]", True),
        ("[f(a=1, b=False)]", True),
        ("[f(a=1, c=None)]", True),
        ('[f(b=True, d="x")]', True),
        ("[f()]", True),
        ("[f(, a=1)]", False),
        ("[f(a=1,)]", False),
        ("[f(b=True, a=1)]", False),
        ("[f(b=true)]", False),
    ],
)
def test_optional_arguments_of_python_have_commas_between_them(text: str, allowed: bool) -> None:
    properties = {"a": {"type": "integer"}, "b": {"type": "boolean"}, "c": {"type": "null"}, "d": {"type": "string"}}
    functions = [Enforced("f", {"type": "object", "properties": properties}, "")]
    assert PLAIN.accepts(calls_grammar(functions, PYTHON, PLAIN.tokenizer, several=True), text) == allowed
