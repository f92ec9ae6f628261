"""Schemas of what the endpoints answer, for /openapi.json. Objects may get further fields; these they have."""

from __future__ import annotations

from typing import Any

from proxy.api.schemas import ERROR_SCHEMA

STRING = {"type": "string"}
INTEGER = {"type": "integer"}
COUNT = {"type": "integer", "minimum": 0}
NUMBER = {"type": "number"}
BOOLEAN = {"type": "boolean"}


def record(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": {**required, **(optional or {})}}


def listing(items: Any) -> dict[str, Any]:
    return {"type": "array", "items": items}


def mapping(values: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": values}


def nullable(schema: Any) -> dict[str, Any]:
    return {"anyOf": [schema, {"type": "null"}]}


TOKENS = listing(COUNT)
FINISH = {"enum": ["stop", "length", "tool_calls"]}
USAGE = record(
    {
        "prompt_tokens": COUNT,
        "completion_tokens": COUNT,
        "total_tokens": COUNT,
        "prompt_tokens_details": record({"cached_tokens": COUNT}),
    },
    {"completion_tokens_details": record({"reasoning_tokens": COUNT})},
)
ROUTE = record({"prefill": nullable(STRING), "decode": STRING, "attempts": COUNT, "cached_tokens": COUNT})
TOKEN = {"token": STRING, "logprob": NUMBER, "bytes": listing({"type": "integer", "minimum": 0, "maximum": 255})}
CHAT_LOGPROBS = nullable(
    record({"content": listing(record({**TOKEN, "top_logprobs": listing(record(TOKEN))})), "refusal": {"type": "null"}})
)
PROMPT_LOGPROBS = listing(
    nullable(mapping(record({"logprob": NUMBER, "rank": nullable(COUNT), "decoded_token": STRING})))
)
CALL = {
    "id": STRING,
    "type": {"const": "function"},
    "function": record({"name": STRING, "arguments": STRING}),
}


def envelope(kind: str) -> dict[str, Any]:
    return {
        "id": STRING,
        "object": {"const": kind},
        "created": INTEGER,
        "model": STRING,
        "system_fingerprint": STRING,
    }


THOUGHT = {"reasoning": STRING, "reasoning_content": STRING}
CHAT_MESSAGE = record(
    {"role": {"const": "assistant"}, "content": nullable(STRING), "refusal": {"type": "null"}},
    {"tool_calls": listing(record(CALL)), **THOUGHT},
)
CHAT_COMPLETION = record(
    {
        **envelope("chat.completion"),
        "choices": listing(
            record(
                {"index": COUNT, "message": CHAT_MESSAGE, "logprobs": CHAT_LOGPROBS, "finish_reason": FINISH},
                {"token_ids": TOKENS},
            )
        ),
        "usage": USAGE,
    },
    {"prompt_logprobs": PROMPT_LOGPROBS, "prompt_token_ids": TOKENS},
)
CHAT_DELTA = record(
    {},
    {
        "role": {"const": "assistant"},
        "content": STRING,
        "tool_calls": listing(record({"index": COUNT, **CALL})),
        **THOUGHT,
    },
)
CHAT_CHUNK = {
    "anyOf": [
        record(
            {
                **envelope("chat.completion.chunk"),
                "choices": listing(
                    record(
                        {
                            "index": COUNT,
                            "delta": CHAT_DELTA,
                            "logprobs": CHAT_LOGPROBS,
                            "finish_reason": nullable(FINISH),
                        },
                        {"token_ids": TOKENS},
                    )
                ),
            },
            {"usage": nullable(USAGE), "prompt_token_ids": TOKENS, "kvmesh": ROUTE},
        ),
        ERROR_SCHEMA,
    ]
}
"""Before the last event, which is `[DONE]`."""

COMPLETION_LOGPROBS = nullable(
    record(
        {
            "tokens": listing(STRING),
            "token_logprobs": listing(nullable(NUMBER)),
            "top_logprobs": listing(nullable(mapping(NUMBER))),
            "text_offset": listing(COUNT),
        }
    )
)
COMPLETION_CHOICE = {"index": COUNT, "text": STRING, "logprobs": COMPLETION_LOGPROBS}
COMPLETION_TOKENS = {"token_ids": TOKENS, "prompt_token_ids": TOKENS}
COMPLETION = record(
    {
        **envelope("text_completion"),
        "choices": listing(
            record(
                {**COMPLETION_CHOICE, "finish_reason": {"enum": ["stop", "length"]}},
                {**COMPLETION_TOKENS, "prompt_logprobs": PROMPT_LOGPROBS},
            )
        ),
        "usage": USAGE,
    }
)
COMPLETION_CHUNK = {
    "anyOf": [
        record(
            {
                **envelope("text_completion"),
                "choices": listing(
                    record(
                        {**COMPLETION_CHOICE, "finish_reason": nullable({"enum": ["stop", "length"]})},
                        COMPLETION_TOKENS,
                    )
                ),
            },
            {"usage": nullable(USAGE), "kvmesh": ROUTE},
        ),
        ERROR_SCHEMA,
    ]
}
"""Before the last event, which is `[DONE]`."""

RENDERED = record({"request_id": STRING, "model": STRING, "token_ids": TOKENS})
TOKENIZED = record(
    {"count": COUNT, "max_model_len": COUNT, "tokens": TOKENS, "token_strs": nullable(listing(nullable(STRING)))}
)
DETOKENIZED = record({"prompt": STRING})
MODEL = record(
    {
        "id": STRING,
        "object": {"const": "model"},
        "created": INTEGER,
        "owned_by": STRING,
        "root": STRING,
        "parent": {"type": "null"},
        "max_model_len": nullable(COUNT),
        "permission": {"type": "array", "maxItems": 0},
    }
)
MODELS = record({"object": {"const": "list"}, "data": listing(MODEL)})
STATUS = record({"status": STRING})
VERSION = record({"version": STRING})
LOAD = record({"server_load": COUNT})
DESCRIPTION = record({"openapi": STRING, "info": {"type": "object"}, "paths": {"type": "object"}})
