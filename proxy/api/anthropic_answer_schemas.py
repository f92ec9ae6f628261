"""Schemas of what the Messages API answers, for /openapi.json."""

from __future__ import annotations

from typing import Any

from proxy.api.answer_schemas import COUNT, STRING, listing, nullable, record

ERROR = record(
    {
        "type": {"const": "error"},
        "error": record({"type": STRING, "message": STRING}),
        "request_id": STRING,
    }
)
COUNTED = record({"input_tokens": COUNT})
USAGE = record(
    {
        "input_tokens": COUNT,
        "cache_creation_input_tokens": COUNT,
        "cache_read_input_tokens": COUNT,
        "output_tokens": COUNT,
    },
    {"output_tokens_details": record({"thinking_tokens": COUNT})},
)
ENDING = {
    "stop_reason": nullable(
        {"enum": ["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]}
    ),
    "stop_sequence": nullable(STRING),
    "stop_details": {"type": "null"},
}
BLOCK = {
    "anyOf": [
        record({"type": {"const": "text"}, "text": STRING, "citations": {"type": "null"}}),
        record({"type": {"const": "thinking"}, "thinking": STRING, "signature": STRING}),
        record({"type": {"const": "tool_use"}, "id": STRING, "name": STRING, "input": {"type": "object"}}),
    ]
}
MESSAGE = record(
    {
        "id": STRING,
        "type": {"const": "message"},
        "role": {"const": "assistant"},
        "model": STRING,
        "content": listing(BLOCK),
        **ENDING,
        "usage": USAGE,
    }
)
DELTA = {
    "anyOf": [
        record({"type": {"const": "text_delta"}, "text": STRING}),
        record({"type": {"const": "thinking_delta"}, "thinking": STRING}),
        record({"type": {"const": "signature_delta"}, "signature": STRING}),
        record({"type": {"const": "input_json_delta"}, "partial_json": STRING}),
    ]
}


def _event(kind: str, **fields: Any) -> dict[str, Any]:
    return record({"type": {"const": kind}, **fields})


EVENT = {
    "anyOf": [
        _event("message_start", message=MESSAGE),
        _event("content_block_start", index=COUNT, content_block=BLOCK),
        _event("content_block_delta", index=COUNT, delta=DELTA),
        _event("content_block_stop", index=COUNT),
        _event("message_delta", delta=record(ENDING), usage=USAGE),
        _event("message_stop"),
        _event("ping"),
        ERROR,
    ]
}
