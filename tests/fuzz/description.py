"""Whether an answer is one that /openapi.json declares."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from jsonschema import Draft202012Validator

EVENTS = "text/event-stream"
RESPONSE_ENDS = tuple(f"response.{status}" for status in ("completed", "incomplete", "failed"))
LAST_EVENTS = {
    "/v1/messages": ("message_stop", "error"),
    "/v1/responses": RESPONSE_ENDS,
    "/v1/responses/{response_id}": RESPONSE_ENDS,
}
"""What ends a stream that does not end with `[DONE]`."""
ERROR_KEYS = {"message", "type", "param", "code"}


@dataclass(frozen=True, slots=True)
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes


class Description:
    """The document, with its schemas ready to check."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.paths: dict[str, dict[str, Any]] = document["paths"]
        self._validators = cache(self._validator)

    def operations(self) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """Method, path and body schema ({} where there is none) of each."""
        for path, item in self.paths.items():
            for method, operation in item.items():
                content = operation.get("requestBody", {}).get("content", {})
                yield method.upper(), path, content.get("application/json", {}).get("schema", {})

    def is_of_another(self, method: str, path: str) -> bool:
        """Whether another operation takes the path for one of its own, with a name in it."""
        return any(
            method.lower() in item and re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", other), path)
            for other, item in self.paths.items()
            if "{" in other
        )

    def complaint(self, method: str, path: str, answer: Answer) -> str | None:
        """What is wrong with the answer of a declared operation; None if nothing is. `path`: as it is declared."""
        responses = self.paths[path][method.lower()]["responses"]
        declared = responses.get(str(answer.status))
        if declared is None:
            return f"the status {answer.status} is not declared"
        media_type = answer.headers.get("content-type", "")
        plain = media_type.partition(";")[0]
        known = next((kind for kind in (media_type, plain) if kind in declared["content"]), None)
        if known is None:
            return f"the media type {media_type!r} is not declared for {answer.status}"
        where = (method.lower(), path, str(answer.status), known)
        if plain == EVENTS:
            return self._events_complaint(where, answer.body)
        if plain != "application/json":
            return None
        document = json.loads(answer.body)
        return self._mismatch(where, "schema", document) or keys_complaint(answer.status, path, document)

    def _events_complaint(self, where: tuple[str, ...], body: bytes) -> str | None:
        if not body.endswith(b"\n\n"):
            return "the stream ends within an event"
        lines = body.decode().split("\n")
        data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
        last = LAST_EVENTS.get(where[1])
        if last is None and data.pop() != "[DONE]":
            return "the stream does not end with [DONE]"
        events = [json.loads(line) for line in data]
        if last is not None and events[-1]["type"] not in last:
            return f"the stream does not end with {' or '.join(last)}"
        return next((found for e in events if (found := self._mismatch(where, "x-itemSchema", e))), None)

    def _mismatch(self, where: tuple[str, ...], key: str, value: Any) -> str | None:
        error = next(self._validators(*where, key).iter_errors(value), None)
        return None if error is None else f"{error.json_path}: {error.message[:300]}"

    def _validator(self, method: str, path: str, status: str, media_type: str, key: str) -> Draft202012Validator:
        content = self.paths[path][method]["responses"][status]["content"]
        return Draft202012Validator(content[media_type][key])


def keys_complaint(status: int, path: str, document: Any) -> str | None:
    """What is wrong with the form of an error."""
    if status < 400 or path == "/ready":
        return None
    wanted = {"type", "message"} if path.startswith("/v1/messages") else ERROR_KEYS
    if set(document["error"]) != wanted:
        return f"the error has the keys {sorted(document['error'])}"
    if not re.search(r"\S", document["error"]["message"]):
        return "the error has no message"
    return None
