"""A request body as JSON, strictly: what is ambiguous or cannot be answered in JSON is refused with 400."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from mesh.errors import RequestError

MAX_DEPTH = 100
"""Nested tool schemas reach about 20; far below the recursion limit of whatever renders the value later."""


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in `body`. Raises `RequestError` 400.

    Refused: bytes that are not UTF-8, duplicate keys, NaN and infinities (also as 1e999), lone surrogates in strings,
    nesting beyond `MAX_DEPTH`. NUL is a character like any other: a model may write one, and its answer comes back
    with the conversation's next turn.
    """
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_constant,
            parse_float=_float,
        )
    except UnicodeDecodeError:
        raise _refusal("it is not UTF-8") from None
    except RecursionError:
        raise _refusal("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise _refusal(f"{error.msg} at line {error.lineno} column {error.colno}") from None
    except ValueError:  # an integer of thousands of digits
        raise _refusal("a number in it is too large") from None
    if not isinstance(value, dict):
        raise RequestError(400, "The request body must be a JSON object.")
    _check(value, strings=b"\\u" in body)
    return value


def _refusal(reason: str) -> RequestError:
    return RequestError(400, f"The request body is not valid JSON: {reason}.")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                # Escaped, for a key may hold what no answer can.
                raise _refusal(f"the key {json.dumps(key[:100])} is given twice")
            seen.add(key)
    return value


def _constant(name: str) -> NoReturn:
    raise _refusal(f"{name} is no JSON number")


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _refusal("a number in it is too large")
    return value


def _check(value: dict[str, Any], *, strings: bool) -> None:
    """Depth of everything; text of every string where an escape may have made it unusable."""
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for container in level:
            members = container.values() if isinstance(container, dict) else container
            below.extend(m for m in members if isinstance(m, dict | list))
            if strings:
                keys = container if isinstance(container, dict) else ()
                for text in (*keys, *(m for m in members if isinstance(m, str))):
                    _check_text(text)
        if not below:
            return
        level = below
    raise _refusal("it is nested too deeply")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise _refusal("a string in it holds half of a surrogate pair") from None
