"""Schemas of what /v1/responses answers, for /openapi.json."""

from __future__ import annotations

from typing import Any

from proxy.api.answer_schemas import BOOLEAN, COUNT, INTEGER, NUMBER, STRING, TOKEN, listing, nullable, record
from proxy.api.schemas import NULLABLE_STRING

STATUSES = ("queued", "in_progress", "completed", "incomplete", "failed", "cancelled")
ITEM_STATUS = {"enum": ["in_progress", "completed", "incomplete"]}
LOGPROBS = listing(record({**TOKEN, "top_logprobs": listing(record(TOKEN))}))
TEXT_PART = record({"type": {"const": "output_text"}, "text": STRING, "annotations": listing({}), "logprobs": LOGPROBS})
THOUGHT_PART = record({"type": {"const": "reasoning_text"}, "text": STRING})
PART = {"anyOf": [TEXT_PART, THOUGHT_PART]}
ITEM = {
    "anyOf": [
        record(
            {
                "id": STRING,
                "type": {"const": "message"},
                "role": {"const": "assistant"},
                "content": listing(TEXT_PART),
                "status": ITEM_STATUS,
            }
        ),
        record(
            {
                "id": STRING,
                "type": {"const": "reasoning"},
                "summary": listing({}),
                "content": listing(THOUGHT_PART),
                "encrypted_content": {"type": "null"},
                "status": ITEM_STATUS,
            }
        ),
        record(
            {
                "id": STRING,
                "type": {"const": "function_call"},
                "call_id": STRING,
                "name": STRING,
                "arguments": STRING,
                "status": ITEM_STATUS,
            }
        ),
    ]
}
USAGE = record(
    {
        "input_tokens": COUNT,
        "input_tokens_details": record({"cached_tokens": COUNT, "cache_write_tokens": COUNT}),
        "output_tokens": COUNT,
        "output_tokens_details": record({"reasoning_tokens": COUNT}),
        "total_tokens": COUNT,
    }
)
FAILURE = record({"code": STRING, "message": STRING, "param": NULLABLE_STRING, "type": STRING})
RESPONSE = record(
    {
        "id": STRING,
        "object": {"const": "response"},
        "created_at": INTEGER,
        "completed_at": nullable(INTEGER),
        "background": BOOLEAN,
        "instructions": NULLABLE_STRING,
        "metadata": {"type": "object"},
        "model": STRING,
        "parallel_tool_calls": BOOLEAN,
        "previous_response_id": NULLABLE_STRING,
        "reasoning": {"type": "object"},
        "store": BOOLEAN,
        "temperature": NUMBER,
        "text": {"type": "object"},
        "tools": listing({"type": "object"}),
        "top_p": NUMBER,
        "truncation": {"enum": ["auto", "disabled"]},
        "status": {"enum": list(STATUSES)},
        "error": nullable(FAILURE),
        "incomplete_details": nullable(record({"reason": STRING})),
        "output": listing(ITEM),
        "usage": nullable(USAGE),
    }
)


def _event(*kinds: str, **fields: Any) -> dict[str, Any]:
    names = {"enum": [f"response.{kind}" for kind in kinds]}
    return record({"type": names, **fields, "sequence_number": COUNT})


PLACE: dict[str, Any] = {"item_id": STRING, "output_index": COUNT}
CONTENT: dict[str, Any] = {**PLACE, "content_index": COUNT}
EVENT = {
    "anyOf": [
        _event("created", "in_progress", *STATUSES, response=RESPONSE),
        _event("output_item.added", "output_item.done", output_index=COUNT, item=ITEM),
        _event("content_part.added", "content_part.done", part=PART, **CONTENT),
        _event("output_text.delta", delta=STRING, logprobs=LOGPROBS, **CONTENT),
        _event("output_text.done", text=STRING, logprobs=LOGPROBS, **CONTENT),
        _event("reasoning_text.delta", delta=STRING, **CONTENT),
        _event("reasoning_text.done", text=STRING, **CONTENT),
        _event("function_call_arguments.delta", delta=STRING, **PLACE),
        _event("function_call_arguments.done", name=STRING, arguments=STRING, **PLACE),
    ]
}
"""No `[DONE]` follows the last, which is that of the response's end."""
DELETED = record({"id": STRING, "object": {"const": "response"}, "deleted": {"const": True}})
COUNTED = record({"object": {"const": "response.input_tokens"}, "input_tokens": COUNT})
ITEMS = record(
    {
        "object": {"const": "list"},
        "data": listing({"type": "object"}),
        "first_id": NULLABLE_STRING,
        "last_id": NULLABLE_STRING,
        "has_more": BOOLEAN,
    }
)
