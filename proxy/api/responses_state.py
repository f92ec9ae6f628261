"""What a request for a response, or about one, needs from the store."""

from __future__ import annotations

from dataclasses import replace
from time import time
from typing import Any

from mesh.errors import RequestError
from proxy.api.responses_body import ResponsesBody
from proxy.api.responses_items import Item, ItemIds, input_items, references, response_of
from proxy.api.responses_object import failure
from proxy.api.responses_store import LOST_GRACE_S, RESPONSE_ID, UNFINISHED, Record, ResponseStore
from proxy.api.tenants import current

MAX_REFERENCES = 64
"""Each is a question to the store."""


async def kept(store: ResponseStore, id: str) -> Record:
    """The response of that id. Raises `RequestError` 404 or 503."""
    record = await _found(store, id)
    if record is None:
        raise RequestError(404, f"There is no response {id[:100]!r}.", code="response_not_found", param="response_id")
    return record


async def conversation_items(store: ResponseStore, body: ResponsesBody, ids: ItemIds) -> list[Item]:
    """All that the model is to be given: what was said up to the previous response, and the input."""
    before: list[Item] = []
    if body.previous_response_id is not None:
        before = (await _previous(store, body.previous_response_id)).conversation
    found = await _referenced(store, references(body.input))
    return [*before, *input_items(body.input, ids, before=before, found=found)]


async def _previous(store: ResponseStore, id: str) -> Record:
    param = "previous_response_id"
    record = await _found(store, id)
    if record is None:
        raise RequestError(
            404, f"There is no previous response {id[:100]!r}.", code="previous_response_not_found", param=param
        )
    status = record.response["status"]
    if record.alive or status == "failed":
        raise RequestError(400, f"The previous response is {status}; it has no answer to go on from.", param=param)
    return record


async def _referenced(store: ResponseStore, wanted: dict[str, str]) -> dict[str, Item]:
    """The items of these ids; `wanted` has the path of each."""
    if len(wanted) > MAX_REFERENCES:
        raise RequestError(400, f"input may name at most {MAX_REFERENCES} items by their ids.", param="input")
    found: dict[str, Item] = {}
    for id, where in wanted.items():
        response_id = response_of(id)
        record = None if response_id is None else await _found(store, response_id)
        items = [] if record is None else [item for item in record.conversation if item["id"] == id]
        if not items:
            raise RequestError(404, f"{where}: there is no item {id[:100]!r}.", code="item_not_found", param=where)
        found[id] = items[0]
    return found


async def _found(store: ResponseStore, id: str) -> Record | None:
    record = await store.get(id) if RESPONSE_ID.fullmatch(id) else None
    if record is not None and record.tenant != current.get().name:
        return None
    if record is not None and record.alive and time() > record.deadline + LOST_GRACE_S:
        lost: dict[str, Any] = {**record.response, "status": "failed", "error": failure(UNFINISHED)}
        return replace(record, response=lost)
    return record
