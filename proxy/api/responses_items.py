"""The items of a response's input: checked, and completed as they are kept and listed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from mesh.errors import RequestError
from proxy.api.errors import unsupported
from proxy.api.messages import TEXT_PARTS

Item = dict[str, Any]

ROLES = ("user", "system", "developer", "assistant")
MAX_ID_CHARS = 128
ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{48})[0-9a-f]{4,8}")


class ItemIds:
    """Ids for the items of one response. They begin with its own, so that a reference says where its item is."""

    def __init__(self, response_id: str) -> None:
        self._stem = response_id.removeprefix("resp_")
        self._count = 0

    def new(self, prefix: str) -> str:
        self._count += 1
        return f"{prefix}_{self._stem}{self._count:04x}"


def response_of(item_id: str) -> str | None:
    """The response that an item belongs to; None for an id that is not of this server."""
    found = ITEM_ID.fullmatch(item_id)
    return f"resp_{found.group(1)}" if found else None


def references(given: Any) -> dict[str, str]:
    """Ids of the items that the input only names, each with the path of its field."""
    items = given if isinstance(given, list) else []
    found: dict[str, str] = {}
    for i, item in enumerate(items):
        if isinstance(item, dict) and _is_reference(item):
            where = f"input.{i}.id"
            if not isinstance(item.get("id"), str):
                raise RequestError(400, f"{where} must be the id of an item.", param=where)
            found[item["id"]] = where
    return found


def input_items(given: Any, ids: ItemIds, *, before: Iterable[Item], found: Mapping[str, Item]) -> list[Item]:
    """`given` as complete items. `before`: what the conversation already holds; `found`: the items that `references`
    named. Raises `RequestError` 400 naming what is wrong."""
    if given is None:
        return []
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list):
        raise RequestError(400, "input must be a string or a list of items.", param="input")
    calls = {item["call_id"] for item in before if item["type"] == "function_call"}
    items = []
    for i, value in enumerate(given):
        where = f"input.{i}"
        if not isinstance(value, dict):
            raise RequestError(400, f"{where} must be an object.", param=where)
        item = found[value["id"]] if _is_reference(value) else _item(value, where, ids)
        if item["type"] == "function_call":
            calls.add(item["call_id"])
        elif item["type"] == "function_call_output" and item["call_id"] not in calls:
            raise RequestError(
                400, f"{where}: there is no function call with this call_id before it.", param=f"{where}.call_id"
            )
        items.append(item)
    return items


def _is_reference(value: Item) -> bool:
    kind = value.get("type")
    return kind == "item_reference" or (kind is None and "role" not in value and "id" in value)


def _item(value: Item, where: str, ids: ItemIds) -> Item:
    kind = "message" if value.get("type") is None else value["type"]
    if not isinstance(kind, str):
        raise RequestError(400, f"{where}.type must be a string.", param=f"{where}.type")
    if kind not in KINDS:
        raise unsupported(f"{where}.type", f"only {', '.join(KINDS)} and item_reference are served")
    prefix, complete = KINDS[kind]
    id = value.get("id")
    if id is None:
        id = ids.new(prefix)
    elif not isinstance(id, str) or not 0 < len(id) <= MAX_ID_CHARS:
        raise RequestError(400, f"{where}.id must be a string of 1 to {MAX_ID_CHARS} characters.", param=f"{where}.id")
    return {"id": id, "type": kind, **complete(value, where), "status": "completed"}


def _message(value: Item, where: str) -> Item:
    role = value.get("role")
    if role not in ROLES:
        raise RequestError(400, f"{where}.role must be one of {', '.join(ROLES)}.", param=f"{where}.role")
    content = value.get("content")
    if isinstance(content, str):
        content = [{"type": "input_text", "text": content}]
    return {"role": role, "content": _parts(content, f"{where}.content", said=role == "assistant")}


def _function_call(value: Item, where: str) -> Item:
    return {name: _string(value, name, where) for name in ("call_id", "name", "arguments")}


def _function_call_output(value: Item, where: str) -> Item:
    output = value.get("output")
    if not isinstance(output, str):
        output = _parts(output, f"{where}.output", said=False)
    return {"call_id": _string(value, "call_id", where), "output": output}


def _reasoning(value: Item, where: str) -> Item:
    item: Item = {}
    for name, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        parts = value.get(name) or []
        if not isinstance(parts, list) or not all(isinstance(p, dict) and p.get("type") == kind for p in parts):
            raise RequestError(400, f"{where}.{name} must be a list of {kind} parts.", param=f"{where}.{name}")
        texts = [_string(part, "text", f"{where}.{name}.{i}") for i, part in enumerate(parts)]
        item[name] = [{"type": kind, "text": text} for text in texts]
    if value.get("encrypted_content") is not None and not item["content"]:
        raise unsupported(f"{where}.encrypted_content", "reasoning is only read as text")
    return {**item, "encrypted_content": None}


KINDS: Mapping[str, tuple[str, Callable[[Item, str], Item]]] = {
    "message": ("msg", _message),
    "function_call": ("fc", _function_call),
    "function_call_output": ("fco", _function_call_output),
    "reasoning": ("rs", _reasoning),
}
"""What may be in an input: how its ids begin, and how an item is completed."""


def _parts(parts: Any, where: str, *, said: bool) -> list[Item]:
    """Text parts; `said` by the assistant, they are the parts of an output."""
    if not isinstance(parts, list):
        raise RequestError(400, f"{where} must be a string or a list of parts.", param=where)
    return [_part(part, f"{where}.{i}", said=said) for i, part in enumerate(parts)]


def _part(part: Any, where: str, *, said: bool) -> Item:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise RequestError(400, f"{where} must be an object with a type.", param=f"{where}.type")
    if said and kind == "refusal":
        return {"type": "refusal", "refusal": _string(part, "refusal", where)}
    if kind not in TEXT_PARTS:
        raise unsupported(f"{where}.type", "this model reads text parts only")
    text = _string(part, "text", where)
    return {"type": "output_text", "text": text, "annotations": []} if said else {"type": "input_text", "text": text}


def _string(value: Item, name: str, where: str) -> str:
    text = value.get(name)
    if not isinstance(text, str):
        raise RequestError(400, f"{where}.{name} must be a string.", param=f"{where}.{name}")
    return text
