"""What a body asks of its output, as a grammar: `response_format`, `structured_outputs`, `regex`, `ebnf`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llguidance import regex_to_lark

from mesh.errors import RequestError
from mesh.tokenizer import Tokenizer
from proxy.api.errors import unsupported
from proxy.api.jsonbody import parse_object
from proxy.api.schemas import GenerationBody

ANY_OBJECT = {"type": "object"}
GUIDANCE = "x-guidance"
"""Where llguidance looks for options inside a schema; some of them drop constraints without a word."""
WHITESPACE = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,64}"}
"""Between the tokens of JSON: room for deep indentation, but not for the endless blanks that some models fall into."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """A grammar that is not yet known to be sound, and the field it is from."""

    param: str
    grammar: str
    converts: bool = False
    """It may be EBNF, not Lark."""
    form: Constraint | None = None
    """What the grammar calls `form`, which is not part of it."""


def invalid_schema(param: str, reason: str) -> RequestError:
    return RequestError(400, f"{param}: {reason}", code="invalid_schema", param=param)


def output_constraint(body: GenerationBody) -> Constraint | None:
    """Raises `RequestError` 400 unless the body asks for nothing, or for one thing that can be a grammar."""
    found = [
        constraint
        for constraint in (
            _response_format(body.response_format),
            *_structured_outputs(body.structured_outputs),
            None if body.regex is None else _regex("regex", body.regex),
            None if body.ebnf is None else _grammar("ebnf", body.ebnf),
        )
        if constraint is not None
    ]
    if len(found) > 1:
        raise _wrong(found[1].param, f"excludes {found[0].param}; give one of them")
    return found[0] if found else None


def with_form(grammar: str, form: str) -> str:
    """A grammar whose `form` is another one."""
    return f"{grammar}\nform: %lark {{\n{form}\n}}"


def json_grammar(schema: Any) -> str:
    return f"start: {json_rule(schema)}"


def _response_format(value: Any) -> Constraint | None:
    if value is None:
        return None
    kind = _object(value, "response_format").get("type")
    if kind == "json_schema":
        _only(value, "response_format", ("type", "json_schema"))
        where = "response_format.json_schema"
        described = _object(value.get("json_schema"), where)
        _only(described, where, ("name", "description", "schema", "strict"))
        _check(isinstance(described.get("name"), str), f"{where}.name", "must be a string")
        _check(isinstance(described.get("description"), str | None), f"{where}.description", "must be a string")
        _check(isinstance(described.get("strict"), bool | None), f"{where}.strict", "must be true or false")
        return _schema(f"{where}.schema", described.get("schema"))
    _only(value, "response_format", ("type",))
    if kind == "json_object":
        return Constraint("response_format", json_grammar(ANY_OBJECT))
    if kind != "text":
        _check(isinstance(kind, str), "response_format.type", "must be text, json_object or json_schema")
        raise unsupported("response_format.type", "only text, json_object and json_schema are served")
    return None


def _structured_outputs(value: Any) -> list[Constraint]:
    if value is None:
        return []
    where = "structured_outputs"
    makers: dict[str, Callable[[str, Any], Constraint]] = {
        "json": _schema_or_text,
        "json_object": _json_object,
        "regex": _regex,
        "choice": _choice,
        "grammar": _grammar,
    }
    given = {name: v for name, v in _object(value, where).items() if v is not None and v is not False}
    _only(given, where, makers)
    _check(bool(given), where, f"must have one of {', '.join(makers)}")
    return [makers[name](f"{where}.{name}", v) for name, v in given.items()]


def check_schema(param: str, schema: Any) -> None:
    """Raises `RequestError` 400 for what a grammar would hold only in part, without a word from the compiler."""
    if GUIDANCE in _object(schema, param):
        raise unsupported(f"{param}.{GUIDANCE}")
    _check_min_properties(param, schema)


def _schema(param: str, schema: Any) -> Constraint:
    check_schema(param, schema)
    return Constraint(param, json_grammar(schema))


def _check_min_properties(param: str, schema: Any) -> None:
    """A grammar lets a free key be written twice, which is one property to whoever reads it."""
    todo = [schema]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        elif isinstance(value, dict):
            todo += value.values()
            least, required = value.get("minProperties"), value.get("required")
            if isinstance(least, int | float) and least > 1 + (len(required) if isinstance(required, list) else 0):
                raise invalid_schema(param, "minProperties is supported up to one more than what is required")


def _schema_or_text(param: str, schema: Any) -> Constraint:
    if isinstance(schema, str):
        try:
            schema = parse_object(schema.encode())
        except RequestError:
            raise _wrong(param, "must be a JSON schema, or its text") from None
    return _schema(param, schema)


def _json_object(param: str, value: Any) -> Constraint:
    _check(value is True, param, "must be true")
    return Constraint(param, json_grammar(ANY_OBJECT))


def _regex(param: str, regex: Any) -> Constraint:
    _check(isinstance(regex, str) and regex, param, "must be a non-empty string")
    if (len(regex) - len(regex.rstrip("\\"))) % 2:  # it would be taken for the end of the pattern
        raise invalid_schema(param, "it ends with an incomplete escape")
    return Constraint(param, f"start: /{regex_to_lark(regex, '')}/")


def _choice(param: str, choices: Any) -> Constraint:
    texts = isinstance(choices, list) and choices and all(isinstance(c, str) for c in choices)
    _check(texts, param, "must be a list of at least one string")
    return Constraint(param, "start: " + " | ".join(literal(c) for c in choices))


def _grammar(param: str, grammar: Any) -> Constraint:
    _check(isinstance(grammar, str) and grammar, param, "must be a non-empty string")
    return Constraint(param, grammar, converts=True)


def json_rule(schema: Any) -> str:
    options = {**schema, GUIDANCE: WHITESPACE} if isinstance(schema, dict) else schema
    return "%json " + json.dumps(options, ensure_ascii=False, separators=(",", ":"))


def literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def spelled(text: str, tokenizer: Tokenizer) -> str:
    """Special tokens that the text spells are those tokens."""
    special = {tokenizer.token_text(i): i for i in tokenizer.special_token_ids}
    if not special:
        return literal(text)
    longest_first = sorted(map(re.escape, special), key=len, reverse=True)
    parts = re.split(f"({'|'.join(longest_first)})", text)
    return " ".join(f"<[{special[part]}]>" if part in special else literal(part) for part in parts if part) or '""'


def _object(value: Any, param: str) -> dict[str, Any]:
    _check(isinstance(value, dict), param, "must be an object")
    return dict(value)


def _only(value: dict[str, Any], param: str, names: Any) -> None:
    for name, given in value.items():
        if name not in names and given is not None:
            raise unsupported(f"{param}.{name}")


def _check(holds: Any, param: str, rule: str) -> None:
    if not holds:
        raise _wrong(param, rule)


def _wrong(param: str, rule: str) -> RequestError:
    return RequestError(400, f"{param} {rule}.", param=param)
