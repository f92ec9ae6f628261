"""Requests drawn from the schemas of /openapi.json: valid ones, and ones with something wrong; the same for a seed."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from tests.fuzz.description import Description

JSON = "application/json"
TEXTS = ("", "a", "hi there", "é😀", "\x00", "\u202e", "a" * 300, "\n\n", "{}", "<|im_end|>", "<tool_call>", "%s{0}")
NUMBERS = (0, 1, -1, 2, 0.5, 1e308, -1e308, 5e-324, 2**31 - 1, 2**31, 2**63, -(2**63) - 1, 10**30)
WRONG: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"a": 1}, {"": {}}, *TEXTS, *NUMBERS)
NAMES = ("unheard_of", "", "kv_transfer_params", "suffix", "chat_template", "guided_json", "__proto__", "é")
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE", "BREW")
MEDIA_TYPES = ("", "text/plain", "application/xml", "multipart/form-data", "application/x-www-form-urlencoded", "é")
HEADERS = (
    ("x-request-id", "mine"),
    ("x-request-id", "é" * 300),
    ("x-kvmesh-route", "1"),
    ("accept", "application/openmetrics-text"),
    ("content-length", "999999999"),
    ("content-length", "many"),
    ("anthropic-version", "2023-06-01"),
    ("authorization", "Bearer x"),
)
QUERIES = (
    "stream=true",
    "stream=true&starting_after=2",
    "stream=no",
    "starting_after=1",
    "limit=1&order=asc",
    "limit=0",
    "limit=%D9%A1",
    "order=up",
    "after=msg_x",
    "after=%00&after=1",
    "&&=",
)
RESPONSE_ID = "{response_id}"
OPTIONAL = 0.06
"""How often at least an object has an optional field: with all of a body's nothing is accepted."""
FEW = 3
"""So many of them, where there are not many."""
STREAMED = 0.3
ODD = 0.15
"""How often a value without bounds is a strange one."""


@dataclass(frozen=True, slots=True)
class Request:
    method: str
    path: str
    """As declared, or one that is not."""
    url: str
    body: bytes = b""
    media_type: str = JSON
    valid: bool = False
    """By its schema."""
    headers: tuple[tuple[str, str], ...] = ()
    """Beside the media type's."""


class Generator:
    """Draws requests to the operations of `description`."""

    def __init__(self, description: Description, seed: int, models: tuple[str, ...]) -> None:
        self._random = random.Random(seed)
        self._operations = list(description.operations())
        self._posts = [operation for operation in self._operations if operation[2]]
        self._bares = [(method, path) for method, path, schema in self._operations if not schema]
        self._models = models
        self.response_ids: list[str] = []
        """Of responses that were made, for requests about them."""

    def request(self) -> Request:
        headers = (self._random.choice(HEADERS),) if self._random.random() < ODD else ()
        return replace(self._request(), headers=headers)

    def _request(self) -> Request:
        chance = self._random.random()
        if chance < 0.15:
            return self._bare()
        method, path, schema = self._random.choice(self._posts)
        body = self.value(schema)
        if self._random.random() < 0.9:
            body["model"] = self._random.choice(self._models)
        if "input" in schema["properties"] and self._random.random() < 0.9:
            body["input"] = self.value(schema["properties"]["input"])
        for name in ("stream", "background"):
            if name in schema["properties"] and self._random.random() < STREAMED:
                body[name] = True
        valid = self._encoded(body)
        if chance < 0.5:
            return Request(method, path, path, valid, valid=True)
        if chance < 0.85:
            for _ in range(self._random.choice((1, 1, 1, 2, 5))):
                self._spoil(body)
            return Request(method, path, path, self._encoded(body))
        if chance < 0.95:
            return Request(method, path, path, self._broken(valid))
        return Request(method, path, path, valid, self._random.choice(MEDIA_TYPES))

    def _bare(self) -> Request:
        """A request without a body, with any method, to a path that may not exist."""
        if self._random.random() < 0.6:
            path = self._random.choice([path for _, path, _ in self._operations] + ["/", "/v1", "/v1/messages/x", "/é"])
            method = self._random.choice(METHODS)
        else:
            method, path = self._random.choice(self._bares)
        name = self._random.choice((*self._models, "x", "a/b", "%00", "..", "é"))
        if RESPONSE_ID in path:
            known = self.response_ids[-5:] if self._random.random() < 0.8 else []
            name = self._random.choice(known or ["x", "%00", "é"])
        query = f"?{self._random.choice(QUERIES)}" if self._random.random() < ODD else ""
        return Request(method, path, re.sub(r"\{\w+\}", name, path) + query, media_type="")

    def value(self, schema: dict[str, Any]) -> Any:
        """One that `schema` allows."""
        draw = self._random
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return draw.choice(schema["enum"])
        if "anyOf" in schema:
            return self.value(draw.choice(schema["anyOf"]))
        makers: dict[str, Callable[[dict[str, Any]], Any]] = {
            "object": self._object,
            "array": self._array,
            "string": self._string,
            "integer": self._integer,
            "number": self._number,
            "boolean": lambda _: draw.random() < 0.5,
            "null": lambda _: None,
        }
        kind = schema.get("type")
        return makers[kind](schema) if kind is not None else copy.deepcopy(draw.choice(WRONG))

    def _object(self, schema: dict[str, Any]) -> dict[str, Any]:
        draw, properties = self._random, schema.get("properties", {})
        often = max(OPTIONAL, min(0.5, FEW / max(1, len(properties))))
        names = [n for n in properties if n in schema.get("required", ()) or draw.random() < often]
        while len(names) < schema.get("minProperties", 0):
            names = [draw.choice(list(properties))]
        names = names[: schema.get("maxProperties", len(names))]
        result = {name: self.value(properties[name]) for name in names}
        free = schema.get("additionalProperties")
        if isinstance(free, dict) or (free is True and not properties):
            result |= {str(draw.randint(0, 9)): self.value(free if isinstance(free, dict) else {}) for _ in range(2)}
        return result

    def _array(self, schema: dict[str, Any]) -> list[Any]:
        least = schema.get("minItems", 0)
        size = self._random.randint(least, min(schema.get("maxItems", least + 3), least + 3))
        return [self.value(schema.get("items", {})) for _ in range(size)]

    def _string(self, schema: dict[str, Any]) -> str:
        least, most = schema.get("minLength", 0), schema.get("maxLength", 1000)
        text = self._random.choice(TEXTS) if self._random.random() < ODD else self._random.choice(("hi", "hello you"))
        if "pattern" in schema:
            text = "salt"
        return text[:most].ljust(least, "x")

    def _integer(self, schema: dict[str, Any]) -> int:
        least, most = int(schema.get("minimum", 0)), int(schema.get("maximum", 300))
        if self._random.random() < ODD:
            return self._random.choice((least, most))
        low = max(least, -5)
        return self._random.randint(low, min(most, low + 8))

    def _number(self, schema: dict[str, Any]) -> float:
        least = schema.get("minimum", schema.get("exclusiveMinimum", -5))
        most = schema.get("maximum", 5)
        if self._random.random() < ODD:
            return float(most)
        return float(self._random.uniform(least + 1e-6 * ("exclusiveMinimum" in schema), most))

    def _spoil(self, body: dict[str, Any]) -> None:
        """Makes one place of `body` something else."""
        draw = self._random
        places: list[tuple[Any, Any]] = []
        _collect(body, places)
        if not places or draw.random() < 0.15:
            body[draw.choice(NAMES)] = copy.deepcopy(draw.choice(WRONG))
            return
        container, key = draw.choice(places)
        change = draw.random()
        if change < 0.2:
            del container[key]
        elif change < 0.3:
            container[key] = _nested(draw.choice((5, 50, 120)), lists=draw.random() < 0.5)
        elif change < 0.4:
            container[key] = [container[key]] * draw.choice((1, 3, 200))
        else:
            container[key] = copy.deepcopy(draw.choice(WRONG))

    def _broken(self, body: bytes) -> bytes:
        """Bytes that are JSON no more, or hardly."""
        draw = self._random
        text = body.decode()
        makers: tuple[Callable[[], bytes], ...] = (
            lambda: body[: draw.randrange(len(body))],
            lambda: b"",
            lambda: body + b" " * 100_000,
            lambda: b"\xff" + body,
            lambda: b"\xef\xbb\xbf" + body,
            lambda: b"[" + body + b"]",
            lambda: draw.choice((b"null", b"1", b'"x"', b"[]", b"{}", b"NaN")),
            lambda: body[:-1] + b',"model":"x"}',
            lambda: body[:-1] + b',"temperature":NaN}',
            lambda: body[:-1] + b',"seed":' + b"9" * 5000 + b"}",
            lambda: body[:-1] + b',"seed":1e999}',
            lambda: body[:-1] + b',"user":"\\ud800"}',
            lambda: body[:-1] + b',"\\udfff":1}',
            lambda: b"[" * 50_000,
            lambda: body[:-1] + b',"tools":' + b'{"a":' * 10_000,
            lambda: text.encode("utf-16"),
            lambda: bytes(draw.randrange(256) for _ in range(50)),
        )
        return draw.choice(makers)()

    def _encoded(self, body: dict[str, Any]) -> bytes:
        return _dumps(body, ascii=self._random.random() < 0.5)


def _dumps(value: Any, *, ascii: bool) -> bytes:
    return json.dumps(value, ensure_ascii=ascii).encode()


def _collect(value: Any, places: list[tuple[Any, Any]]) -> None:
    """Every place in `value`."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, member in items:
        places.append((value, key))
        _collect(member, places)


def _nested(depth: int, *, lists: bool) -> Any:
    value: Any = "x"
    for _ in range(depth):
        value = [value] if lists else {"a": value}
    return value
