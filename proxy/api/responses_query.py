"""The query strings of /v1/responses, and a page of items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mesh.errors import RequestError
from proxy.api.responses_items import Item

DEFAULT_LIMIT, MAX_LIMIT = 20, 100
MAX_DIGITS = 9


@dataclass(frozen=True, slots=True)
class StreamQuery:
    """Of a response that is retrieved."""

    stream: bool
    first: int
    """Number of the first event."""

    @classmethod
    def of(cls, query: Mapping[str, str]) -> StreamQuery:
        stream = query.get("stream", "false")
        if stream not in ("true", "false"):
            raise RequestError(400, "stream must be true or false.", param="stream")
        after = query.get("starting_after")
        if after is None:
            return cls(stream == "true", 0)
        if stream == "false":
            raise RequestError(400, "starting_after is only allowed with stream=true.", param="starting_after")
        return cls(True, _whole(after, "starting_after") + 1)


@dataclass(frozen=True, slots=True)
class ItemQuery:
    """Of a page of items."""

    limit: int
    descending: bool
    after: str | None

    @classmethod
    def of(cls, query: Mapping[str, str]) -> ItemQuery:
        limit = _whole(query.get("limit", str(DEFAULT_LIMIT)), "limit")
        if not 1 <= limit <= MAX_LIMIT:
            raise RequestError(400, f"limit must be from 1 to {MAX_LIMIT}.", param="limit")
        order = query.get("order", "desc")
        if order not in ("asc", "desc"):
            raise RequestError(400, "order must be asc or desc.", param="order")
        return cls(limit, order == "desc", query.get("after"))


def item_page(items: Sequence[Item], query: ItemQuery) -> dict[str, Any]:
    """Raises `RequestError` 400 when no item is the one to start after."""
    ordered = list(reversed(items)) if query.descending else list(items)
    first = 0
    if query.after is not None:
        first = next((i + 1 for i, item in enumerate(ordered) if item["id"] == query.after), 0)
        if not first:
            raise RequestError(400, f"after: there is no item {query.after[:100]!r}.", param="after")
    page = ordered[first : first + query.limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": first + query.limit < len(ordered),
    }


def _whole(digits: str, name: str) -> int:
    if not (digits.isascii() and digits.isdigit() and len(digits) <= MAX_DIGITS):
        raise RequestError(400, f"{name} must be a whole number.", param=name)
    return int(digits)
