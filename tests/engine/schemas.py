"""JSON schemas of rising difficulty, the same ones in every run."""

from __future__ import annotations

from random import Random
from typing import Any

Schema = dict[str, Any]
FORMATS = ("date", "time", "date-time", "uuid", "ipv4", "email", "duration")
PATTERNS = ("^[a-c]{2,5}$", "^(x|yz)+$", "[0-9]", "^\\d{3}-\\d{2}$", "é|ß")
NAMES = ("id", "name", "größe", 'quo"te', "a b", "x/y", "n\\n", "")
LITERALS: tuple[Any, ...] = (None, True, 0, -7, 2.5, "", 'q"\\', "日本", [1, "a"], {"k": [False]})


def schemas(count: int) -> list[Schema]:
    return [_Maker(Random(i), 1 + 3 * i // count).document() for i in range(count)]


class _Maker:
    """`level` 1: scalars and flat containers; 2: nested, unions; 3: intersections, references, recursion."""

    def __init__(self, choose: Random, level: int) -> None:
        self._choose = choose
        self._level = level

    def document(self) -> Schema:
        schema = self._any(self._level)
        if self._level < 3:
            return schema
        tree = {"type": "object", "properties": {"v": self._scalar(), "next": {"$ref": "#/$defs/tree"}}}
        return {"$defs": {"part": schema, "tree": tree | {"required": ["v"], "additionalProperties": False}}} | (
            self._choose.choice(
                ({"$ref": "#/$defs/part"}, {"anyOf": [{"$ref": "#/$defs/part"}, {"$ref": "#/$defs/tree"}]})
            )
        )

    def _any(self, depth: int) -> Schema:
        makers = [self._scalar]
        if depth > 0:
            makers += [lambda: self._object(depth), lambda: self._array(depth)] * 2
        if depth > 0 and self._level > 1:
            makers += [lambda: self._union(depth)]
        if self._level > 2:
            makers += [self._intersection]
        return self._choose.choice(makers)()

    def _scalar(self) -> Schema:
        choose = self._choose
        low = choose.randint(-50, 50)
        return choose.choice(
            (
                {"type": "null"},
                {"type": "boolean"},
                {"type": "integer", "minimum": low, "maximum": low + choose.randint(0, 2000)},
                {"type": "integer", "exclusiveMinimum": low, "multipleOf": choose.choice((1, 3, 10)), "maximum": 10**4},
                {"type": "number", "minimum": low, "exclusiveMaximum": low + 3.5},
                {"type": "string", "minLength": choose.randint(0, 2), "maxLength": choose.randint(2, 8)},
                {"type": "string", "pattern": choose.choice(PATTERNS), "maxLength": 12},
                {"type": "string", "format": choose.choice(FORMATS)},
                {"enum": choose.sample(LITERALS, 3)},
                {"const": choose.choice(LITERALS)},
                {"type": ["integer", "null"], "maximum": 9, "minimum": 0, "title": "digit", "default": 3},
            )
        )

    def _object(self, depth: int) -> Schema:
        choose = self._choose
        names = choose.sample(NAMES, choose.randint(1, 4))
        schema: Schema = {
            "type": "object",
            "properties": {name: self._any(depth - 1) for name in names},
            "required": choose.sample(names, choose.randint(0, len(names))),
            "additionalProperties": choose.choice((False, {"type": "boolean"})),
        }
        if choose.random() < 0.2:
            schema["patternProperties"] = {"^p[0-9]$": self._scalar()}
        return schema

    def _array(self, depth: int) -> Schema:
        choose = self._choose
        if choose.random() < 0.3:
            return {"type": "array", "prefixItems": [self._any(depth - 1) for _ in range(2)], "items": False}
        least = choose.randint(0, 2)
        return {"type": "array", "items": self._any(depth - 1), "minItems": least, "maxItems": least + 2}

    def _union(self, depth: int) -> Schema:
        if self._choose.random() < 0.3:
            return {"oneOf": [{"type": "integer", "minimum": 0, "maximum": 99}, {"type": "string", "maxLength": 4}]}
        return {"anyOf": [self._any(depth - 1) for _ in range(self._choose.randint(2, 4))]}

    def _intersection(self) -> Schema:
        low = self._choose.randint(0, 20)
        a = {"type": "object", "properties": {"a": {"type": "integer", "minimum": low}}, "required": ["a"]}
        b = {"properties": {"a": {"maximum": low + 70}, "b": {"type": "null"}}, "additionalProperties": False}
        return self._choose.choice(
            (
                {"allOf": [{"type": "integer", "minimum": low}, {"maximum": low + 40, "multipleOf": 2}]},
                {"allOf": [{"type": "string", "maxLength": 6}, {"pattern": "^[ab]*$"}], "minLength": 1},
                {"allOf": [a, b | {"required": ["b"]}]} if low % 2 else {**b, "type": "object"},
            )
        )
