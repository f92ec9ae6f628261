"""The order that the events of a response must have, as a check for tests."""

from __future__ import annotations

import json
from typing import Any

TEXTS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}
ARGUMENTS = "response.function_call_arguments"
LAST = {
    "completed": "response.completed",
    "incomplete": "response.incomplete",
    "failed": "response.failed",
    "cancelled": "response.failed",
}


def parsed(body: bytes) -> list[dict[str, Any]]:
    """The events of a stream; fails unless it consists of whole frames with matching names."""
    assert body.endswith(b"\n\n")
    found = []
    for frame in body.decode().split("\n\n")[:-1]:
        if frame.startswith(":"):
            continue
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        found.append(event)
    return found


def checked(events: list[dict[str, Any]], *, background: bool = False) -> dict[str, Any]:
    """The response of the last event; fails unless every event is where it may be and they agree."""
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    names = ["response.created", *(["response.queued"] if background else []), "response.in_progress"]
    assert [event["type"] for event in events[: len(names)]] == names
    assert [e["response"]["status"] for e in events[: len(names)]][-1] == "in_progress"
    assert all(e["response"]["output"] == [] for e in events[: len(names)])
    last = events[-1]
    response: dict[str, Any] = last["response"]
    assert last["type"] == LAST[response["status"]]
    rest = events[len(names) : -1]
    items: list[dict[str, Any] | None] = []
    while rest:
        index = len(items)
        taken = [event for event in rest if event["output_index"] == index]
        assert rest[: len(taken)] == taken
        rest = rest[len(taken) :]
        whole = taken[-1]["type"] == "response.output_item.done"
        assert whole or response["status"] in ("failed", "cancelled")
        items.append(_item(taken) if whole else None)
    done = [item for item in items if item is not None]
    assert done == response["output"][: len(done)]
    assert len(response["output"]) == len(items)
    return response


def _item(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The item that these events tell of, from added to done."""
    added, done = events[0]["item"], events[-1]["item"]
    assert events[0]["type"] == "response.output_item.added"
    assert (added["id"], added["type"], added["status"]) == (done["id"], done["type"], "in_progress")
    assert done["status"] in ("completed", "incomplete")
    inner = events[1:-1]
    assert {event["item_id"] for event in inner} == {done["id"]}
    if done["type"] == "function_call":
        assert added["arguments"] == ""
        assert [event["type"] for event in inner[:-1]] == [f"{ARGUMENTS}.delta"] * (len(inner) - 1)
        assert inner[-1]["type"] == f"{ARGUMENTS}.done"
        assert "".join(e["delta"] for e in inner[:-1]) == inner[-1]["arguments"] == done["arguments"]
        return dict(done)
    name = TEXTS[done["type"]]
    assert {event["content_index"] for event in inner} == {0}
    assert added["content"] == []
    begin, *deltas, text, end = inner
    assert (begin["type"], begin["part"]["text"]) == ("response.content_part.added", "")
    assert [event["type"] for event in deltas] == [f"{name}.delta"] * len(deltas)
    assert text["type"] == f"{name}.done"
    assert (end["type"], end["part"]) == ("response.content_part.done", done["content"][0])
    assert "".join(event["delta"] for event in deltas) == text["text"] == done["content"][0]["text"]
    return dict(done)
