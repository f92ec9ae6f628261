"""Structured output at the API: which grammar the workers get, and what is refused before any of them hears of it."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import Any

import pytest

from mesh.errors import GrammarError, RequestError
from mesh.grammar import MAX_GRAMMAR_BYTES, Vocabulary, compile_grammar
from proxy.grammars import MAX_WAITING, GrammarCheck
from tests.proxy.api_client import Api, chat_texts
from tests.proxy.tiny_tokenizer import byte_level

PERSON = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
RECURSIVE = {"$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"}


@pytest.fixture(scope="module")
def api() -> Api:
    """One for all: the process that tries grammars starts once."""
    return Api('{"name": "x"}')


def accepts(grammar: str, text: str) -> bool:
    """Whether `text` is exactly what the grammar allows, by the tokens of the tiny tokenizer."""
    tokenizer = byte_level()
    matcher = compile_grammar(Vocabulary.of(tokenizer).tokenizer(), grammar)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


CASES: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": RESPONSE_FORMAT}, '{"name": "hello"}', '{"name": 5}'),
    ({"response_format": {"type": "json_object"}}, '{"a": [1, null]}', "[1]"),
    ({"structured_outputs": {"json": PERSON}}, '{"name":"é"}', "{}"),
    ({"structured_outputs": {"json": json.dumps(PERSON)}}, '{"name": ""}', "{}"),
    ({"structured_outputs": {"json": RECURSIVE}}, '{"n":{"n":{}}}', '{"n":1}'),
    ({"structured_outputs": {"json_object": True, "regex": None}}, "{}", "1"),
    ({"structured_outputs": {"regex": r"^\d{3}/[a-c]\n$"}}, "123/b\n", "123"),
    ({"structured_outputs": {"regex": "a\nb|(é)"}}, "a\nb", "a"),
    ({"structured_outputs": {"choice": ['a"b\\', "\n😀", "a"]}}, 'a"b\\', "ab"),
    ({"structured_outputs": {"choice": ['a"b\\', "\n😀", "a"]}}, "\n😀", ""),
    ({"structured_outputs": {"grammar": 'start: "x"+ end\nend: "." | "!"'}}, "xxx!", "!"),
    ({"structured_outputs": {"grammar": '%llguidance {}\nstart: "x" %json {"type": "integer"}'}}, "x-5", "x"),
    ({"regex": "(yes|no)"}, "no", "maybe"),
    ({"ebnf": 'root ::= "a" tail\ntail ::= [0-9]+'}, "a42", "a"),
    ({"ebnf": 'start: "lark"'}, "lark", "bark"),
    ({"response_format": {"type": "text"}, "structured_outputs": {"regex": "a"}}, "a", "b"),
]


@pytest.mark.parametrize(("fields", "right", "wrong"), CASES)
def test_the_workers_get_a_grammar(api: Api, fields: dict[str, Any], right: str, wrong: str) -> None:
    api.chat(**fields)
    grammar = api.sent.params.grammar
    assert grammar is not None
    assert accepts(grammar, right)
    assert not accepts(grammar, wrong)
    api.complete(**fields)
    assert api.sent.params.grammar == grammar


def test_without_a_constraint_there_is_no_grammar_and_no_process(api: Api) -> None:
    for fields in ({}, {"response_format": {"type": "text"}}, {"response_format": None, "structured_outputs": None}):
        other = Api("x")
        other.chat(**fields)
        assert other.sent.params.grammar is None


def test_a_stream_is_constrained_too(api: Api) -> None:
    assert chat_texts(api.chat_stream(response_format=RESPONSE_FORMAT)) == ['{"name": "x"}']
    assert api.sent.params.grammar is not None


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"response_format": "json"}, "response_format"),
    ({"response_format": {}}, "response_format.type"),
    ({"response_format": {"type": 5}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format.json_schema.schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}, "strict": "yes"}}},
        "response_format.json_schema.strict",
    ),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": False}}, "structured_outputs"),
    ({"structured_outputs": {"json_object": 1}}, "structured_outputs.json_object"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": '{"items":' * 300 + "{}" + "}" * 300}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": '{"const": "\\ud800"}'}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": '{"const": NaN}'}}, "structured_outputs.json"),
    ({"structured_outputs": {"json": True}}, "structured_outputs.json"),
    ({"structured_outputs": {"regex": ""}}, "structured_outputs.regex"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"choice": ["a", 1]}}, "structured_outputs.choice"),
    ({"structured_outputs": {"grammar": 1}}, "structured_outputs.grammar"),
    ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs.choice"),
    ({"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "a"}, "ebnf": "start: /a/"}, "ebnf"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG)
def test_what_is_no_constraint_is_refused(api: Api, fields: dict[str, Any], param: str) -> None:
    error = api.chat_error(**fields)
    assert (error["param"], error["code"]) == (param, None)


INVALID: list[tuple[dict[str, Any], str, str]] = [
    ({"structured_outputs": {"regex": "(?=a)b"}}, "structured_outputs.regex", "look-around"),
    ({"structured_outputs": {"regex": r"(a)\1"}}, "structured_outputs.regex", "backreferences"),
    ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed group"),
    ({"structured_outputs": {"regex": "a\\"}}, "structured_outputs.regex", "escape"),
    ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar", "nothing"),
    ({"ebnf": "not a grammar"}, "ebnf", "neither Lark nor EBNF"),
    ({"structured_outputs": {"json": {"enum": []}}}, "structured_outputs.json", "Unsatisfiable"),
    ({"structured_outputs": {"json": {"$ref": "#"}}}, "structured_outputs.json", "no text"),
    ({"structured_outputs": {"json": {"$ref": "http://a/b"}}}, "structured_outputs.json", "retrieving it failed"),
    ({"structured_outputs": {"choice": ["x" * MAX_GRAMMAR_BYTES]}}, "structured_outputs.choice", "larger than"),
]


@pytest.mark.parametrize(("fields", "param", "reason"), INVALID)
def test_a_grammar_that_does_not_compile_is_refused(api: Api, fields: dict[str, Any], param: str, reason: str) -> None:
    error = api.chat_error(**fields)
    assert (error["param"], error["code"]) == (param, "invalid_schema")
    assert reason in error["message"]


OBJECT = {"type": "object"}
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"maxLength": 2}},
    "else": {"if": {"type": "string"}, "else": {"maximum": 2}},
    "propertyNames": {**OBJECT, "propertyNames": {"pattern": "^a"}},
    "dependentRequired": {**OBJECT, "dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {**OBJECT, "dependentSchemas": {"a": {"required": ["b"]}}},
    "dependencies": {**OBJECT, "dependencies": {"a": ["b"]}},
    "unevaluatedProperties": {**OBJECT, "unevaluatedProperties": False},
    "unevaluatedItems": {"type": "array", "unevaluatedItems": False},
    "$dynamicRef": {"$dynamicRef": "#node"},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "minProperties": {**OBJECT, "minProperties": 2},
    "format": {"type": "string", "format": "phone"},
    "look-around": {"type": "string", "pattern": "^(?!a)"},
    "type": {"type": "text"},
}


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_an_unsupported_keyword_is_named_and_never_dropped(api: Api, keyword: str, nested: bool) -> None:
    schema = UNSUPPORTED[keyword]
    if nested:
        schema = {"type": "array", "items": {"anyOf": [{"type": "null"}, {**OBJECT, "properties": {"x": schema}}]}}
    error = api.chat_error(response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert (error["param"], error["code"]) == ("response_format.json_schema.schema", "invalid_schema")
    assert keyword in error["message"]


CHAIN = {f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(800)}
HOSTILE: dict[str, dict[str, Any]] = {
    "regex that takes seconds": {"regex": "a?" * 20_000},
    "grammar whose compiler runs out of stack": {
        "grammar": "start: r0\n" + "\n".join(f'r{i}: "x" r{i + 1}?' for i in range(2500)) + '\nr2500: "y"'
    },
    "schema whose compiler runs out of stack": {"json": {"$defs": CHAIN | {"d800": {}}, "$ref": "#/$defs/d0"}},
    "conversion that takes seconds": {
        "grammar": "\n".join(f"r{i} ::= r{i + 1}" for i in range(3500)) + '\nroot ::= r0\nr3500 ::= "x"'
    },
    "schema that multiplies": {
        "json": {"allOf": [{"anyOf": [{"properties": {f"{i}{j}": {}}} for j in range(3)]} for i in range(20)]}
    },
    "too many optional properties": {
        "json": {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(300)}}
    },
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_grammar_is_refused_soon_and_harms_nobody(api: Api, case: str) -> None:
    api.chat(response_format={"type": "json_object"})
    began = time.perf_counter()
    error = api.chat_error(structured_outputs=HOSTILE[case])
    assert time.perf_counter() - began < 10  # half a second of a processor that may be shared
    assert error["code"] == "invalid_schema"
    api.chat(structured_outputs={"regex": f"after {re.escape(case)}"})


def test_repetitions_that_would_force_a_million_tokens_cost_no_more_than_others(api: Api) -> None:
    api.chat(structured_outputs={"regex": "a{1000000000}"})


def test_streams_go_on_while_a_hostile_grammar_is_tried() -> None:
    async def ticks() -> int:
        trial = asyncio.create_task(GrammarCheck(byte_level()).check("start: /" + "a?" * 20_000 + "/"))
        count = 0
        while not trial.done():
            await asyncio.sleep(0.005)
            count += 1
        with pytest.raises(GrammarError):
            trial.result()
        return count

    assert asyncio.run(ticks()) > 30


def test_only_so_many_grammars_wait_to_be_tried() -> None:
    async def outcomes() -> list[Any]:
        check = GrammarCheck(byte_level())
        trials = (check.check(f'start: "{i}"') for i in range(MAX_WAITING + 3))
        return await asyncio.gather(*trials, return_exceptions=True)

    refused = [o for o in asyncio.run(outcomes()) if isinstance(o, RequestError)]
    assert [(r.status, r.code) for r in refused] == [(503, "overloaded")] * 3


def test_the_process_is_started_again_after_it_died() -> None:
    async def twice() -> None:
        check = GrammarCheck(byte_level())
        await check.check('start: "a"')
        assert check._process is not None
        check._process.kill()
        check._process.wait()
        assert await check.check('start: "b"') == 'start: "b"'

    asyncio.run(twice())
