"""The bodies of Anthropic's Messages API: simple fields by pydantic; blocks are checked by `anthropic_messages`.

As at Anthropic, a field that is not known is refused: what it would change is not known either.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from proxy.api.schemas import MAX_COUNT, TEXT_PARTS_SCHEMA, RequestBody

MIN_THINKING = 1024
"""Fewest `budget_tokens`, as at Anthropic."""

TEXT_SCHEMA = {"anyOf": [{"type": "string"}, TEXT_PARTS_SCHEMA]}
TEXT_BLOCK = TEXT_PARTS_SCHEMA["items"]
RESULT_BLOCK = {
    "type": "object",
    "required": ["type", "tool_use_id"],
    "properties": {
        "type": {"const": "tool_result"},
        "tool_use_id": {"type": "string"},
        "content": TEXT_SCHEMA,
        "is_error": {"type": "boolean"},
    },
}
USE_BLOCK = {
    "type": "object",
    "required": ["type", "id", "name", "input"],
    "properties": {
        "type": {"const": "tool_use"},
        "id": {"type": "string"},
        "name": {"type": "string"},
        "input": {"type": "object"},
    },
}
THINKING_BLOCK = {
    "type": "object",
    "required": ["type", "thinking"],
    "properties": {"type": {"const": "thinking"}, "thinking": {"type": "string"}},
}
REDACTED_BLOCK = {"type": "object", "required": ["type"], "properties": {"type": {"const": "redacted_thinking"}}}


def _message_schema(role: str, *blocks: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "required": ["role", "content"],
        "properties": {
            "role": {"const": role},
            "content": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": list(blocks)}}]},
        },
    }


MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            _message_schema("user", TEXT_BLOCK, RESULT_BLOCK),
            _message_schema("assistant", TEXT_BLOCK, USE_BLOCK, THINKING_BLOCK, REDACTED_BLOCK),
            _message_schema("system", TEXT_BLOCK),
        ]
    },
}


class Part(BaseModel):
    """An object of which every field is known."""

    model_config = ConfigDict(strict=True, extra="forbid")


class Thinking(Part):
    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(None, ge=MIN_THINKING, le=MAX_COUNT)
    display: Literal["summarized", "omitted"] | None = None


class ToolChoice(Part):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Part):
    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class OutputConfig(Part):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Tool(Part):
    """One that the client runs; Anthropic's own have other types. Of the rest only `name`, `description`,
    `input_schema` and `strict` mean something here."""

    type: Literal["custom"] | None = None
    name: str
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None
    cache_control: dict[str, Any] | None = None
    eager_input_streaming: bool | None = None
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None


class CountTokensBody(RequestBody):
    """`POST /v1/messages/count_tokens`."""

    model_config = ConfigDict(extra="forbid")

    model: str
    messages: Annotated[Any, WithJsonSchema(MESSAGES_SCHEMA)]
    system: Annotated[Any, WithJsonSchema(TEXT_SCHEMA)] = None
    tools: list[Tool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # These change no answer.
    cache_control: dict[str, Any] | None = None
    speed: Literal["standard", "fast"] | None = None
    user_profile_id: str | None = None
    workspace_id: str | None = None


class MessagesBody(CountTokensBody):
    """`POST /v1/messages`."""

    max_tokens: int = Field(ge=1, le=MAX_COUNT)
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=1)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, le=MAX_COUNT)
    cache_salt: str | None = None
    priority: int | None = None
    seed: int | None = None
    # These change no answer.
    metadata: dict[str, Any] | None = None
    service_tier: Literal["auto", "standard_only"] | None = None
    inference_geo: str | None = None
