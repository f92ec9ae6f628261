"""The request bodies: simple fields by pydantic, in strict mode; what may have several shapes is checked by hand.

Fields that OpenAI defines and that change nothing here (user, metadata, store, service_tier, ...) are extras, accepted
and ignored. Extras that would change the answer are refused by `refuse_unsupported`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WithJsonSchema

from proxy.api.errors import unsupported, validation_error

MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5
MAX_COUNT = 2**31 - 1
"""Token counts beyond this are a mistake; ids and counts travel as 32 bits."""

INTERNAL_PARAMETERS = (
    "kv_transfer_params",
    "ec_transfer_params",
    "disaggregated_params",
    "bootstrap_host",
    "bootstrap_port",
    "bootstrap_room",
    "data_parallel_rank",
    "disagg_prefill_dp_rank",
)
"""How other systems hand a transfer around: a client that could write these could read other tenants' blocks."""

UNSUPPORTED_PARAMETERS = (
    "audio",
    "chat_template",
    "custom_logit_processor",
    "custom_params",
    "documents",
    "extra_key",
    "functions",
    "grammar",
    "guided_choice",
    "guided_grammar",
    "guided_json",
    "guided_regex",
    "input_embeds",
    "input_ids",
    "json_schema",
    "logits_processors",
    "logprob_token_ids",
    "lora_path",
    "mm_processor_kwargs",
    "no_stop_trim",
    "prompt_embeds",
    "prompt_token_ids",
    "repetition_detection",
    "return_hidden_states",
    "return_prompt_text",
    "stop_regex",
    "structural_tag",
    "suffix",
    "thinking_token_budget",
    "use_beam_search",
    "vllm_xargs",
    "web_search_options",
)
SCHEMAS = ("guided_json", "json_schema")
"""Of those: an empty object asks for something too, any JSON."""

HARMLESS: dict[str, tuple[Any, ...]] = {
    "detokenize": (True,),
    "function_call": ("none",),
    "length_penalty": (1, 1.0),
    "modalities": (["text"],),
    "spaces_between_special_tokens": (True,),
}
"""Parameters that may be given with these values only."""

IGNORED = frozenset(
    {
        "include_obfuscation",
        "metadata",
        "moderation",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "stream_interval",
        "user",
        "verbosity",
    }
)
"""Defined by OpenAI or vLLM; they change nothing here."""

ANY_TOKEN_LIST = {"type": "array", "items": {"type": "integer", "minimum": 0}}
STOP_SCHEMA = {
    "anyOf": [
        {"type": "string", "minLength": 1},
        {"type": "array", "items": {"type": "string", "minLength": 1}, "maxItems": 4},
        {"type": "null"},
    ],
    "default": None,
}
LOGIT_BIAS_SCHEMA = {
    "anyOf": [
        {"type": "object", "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100}},
        {"type": "null"},
    ],
    "default": None,
}
RESPONSE_FORMAT_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "required": ["type"],
            "properties": {
                "type": {"enum": ["text", "json_object", "json_schema"]},
                "json_schema": {
                    "type": "object",
                    "required": ["name", "schema"],
                    "properties": {
                        "name": {"type": "string"},
                        "description": {"type": "string"},
                        "schema": {"type": "object"},
                        "strict": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                    },
                },
            },
        },
        {"type": "null"},
    ],
    "default": None,
}
STRUCTURED_OUTPUTS_SCHEMA = {
    "anyOf": [
        {
            "type": "object",
            "minProperties": 1,
            "maxProperties": 1,
            "properties": {
                "json": {"anyOf": [{"type": "object"}, {"type": "string"}]},
                "json_object": {"const": True},
                "regex": {"type": "string", "minLength": 1},
                "choice": {"type": "array", "items": {"type": "string"}, "minItems": 1},
                "grammar": {"type": "string", "minLength": 1},
            },
        },
        {"type": "null"},
    ],
    "default": None,
}
TEXT_PARTS_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    },
}
CALLS_SCHEMA = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["function"],
        "properties": {
            "id": {"type": "string"},
            "type": {"const": "function"},
            "function": {
                "type": "object",
                "required": ["name", "arguments"],
                "properties": {"name": {"type": "string"}, "arguments": {"type": "string"}},
            },
        },
    },
}
MESSAGES_SCHEMA = {
    "type": "array",
    "minItems": 1,
    "items": {
        "anyOf": [
            {
                "type": "object",
                "required": ["role", "content"],
                "properties": {
                    "role": {"enum": ["system", "developer", "user", "tool", "function"]},
                    "content": {"anyOf": [{"type": "string"}, TEXT_PARTS_SCHEMA]},
                    "tool_call_id": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                },
            },
            {
                "type": "object",
                "required": ["role"],
                "properties": {
                    "role": {"const": "assistant"},
                    "content": {"anyOf": [{"type": "string"}, TEXT_PARTS_SCHEMA, {"type": "null"}]},
                    "tool_calls": {"anyOf": [CALLS_SCHEMA, {"type": "null"}]},
                },
            },
        ]
    },
}
TOOLS_SCHEMA = {
    "anyOf": [
        {
            "type": "array",
            "maxItems": 128,
            "items": {
                "type": "object",
                "required": ["type", "function"],
                "properties": {
                    "type": {"const": "function"},
                    "function": {
                        "type": "object",
                        "required": ["name"],
                        "properties": {
                            "name": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"},
                            "description": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                            "parameters": {"anyOf": [{"type": "object"}, {"type": "null"}]},
                            "strict": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
                        },
                    },
                },
            },
        },
        {"type": "null"},
    ],
    "default": None,
}
TOOL_CHOICE_SCHEMA = {
    "anyOf": [
        {"enum": ["none", "auto", "required"]},
        {
            "type": "object",
            "required": ["type", "function"],
            "properties": {
                "type": {"const": "function"},
                "function": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            },
        },
        {"type": "null"},
    ],
    "default": None,
}
PROMPT_SCHEMA = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "items": {"type": "string"}, "minItems": 1},
        {**ANY_TOKEN_LIST, "minItems": 1},
        {"type": "array", "items": {**ANY_TOKEN_LIST, "minItems": 1}, "minItems": 1},
    ]
}

NULLABLE_STRING = {"anyOf": [{"type": "string"}, {"type": "null"}]}
ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": NULLABLE_STRING,
                "code": NULLABLE_STRING,
            },
        }
    },
}

Count = Annotated[int, Field(ge=0, le=MAX_COUNT)]
Body = TypeVar("Body", bound=BaseModel)


class StreamOptions(BaseModel):
    """`stream_options`; others OpenAI defines (include_obfuscation) change nothing here."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class RequestBody(BaseModel):
    """What every body has. None always means: as if not given."""

    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())

    model: str | None = None


class ConversationBody(RequestBody):
    """What becomes a prompt by the chat template."""

    messages: Annotated[Any, WithJsonSchema(MESSAGES_SCHEMA)] = None
    tools: Annotated[list[dict[str, Any]] | None, WithJsonSchema(TOOLS_SCHEMA)] = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = Field(None, max_length=32)


class SamplingBody(RequestBody):
    """What every endpoint that generates has: how tokens are drawn, and where they end."""

    model: str
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_COUNT)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: Annotated[Any, WithJsonSchema(LOGIT_BIAS_SCHEMA)] = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[Any, WithJsonSchema(STOP_SCHEMA)] = None
    stop_token_ids: list[Count] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: list[Count] | None = None
    bad_words: list[str] | None = None
    min_tokens: Count | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    priority: int | None = Field(None, ge=-(2**31), le=MAX_COUNT)
    structured_outputs: Annotated[Any, WithJsonSchema(STRUCTURED_OUTPUTS_SCHEMA)] = None
    regex: str | None = None
    ebnf: str | None = None
    cache_salt: str | None = Field(None, min_length=1, max_length=128, pattern=r"^[^@/\\]*$")


class GenerationBody(SamplingBody):
    """What chat and plain completions share."""

    max_tokens: Count | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    best_of: int | None = Field(None, ge=0, le=20)
    stream_options: StreamOptions | None = None
    prompt_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=MAX_COUNT)
    truncation_side: Literal["left", "right"] | None = None
    response_format: Annotated[Any, WithJsonSchema(RESPONSE_FORMAT_SCHEMA)] = None


class ChatBody(GenerationBody, ConversationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[Any, WithJsonSchema(MESSAGES_SCHEMA)]
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    tool_choice: Annotated[Any, WithJsonSchema(TOOL_CHOICE_SCHEMA)] = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None
    separate_reasoning: bool | None = None
    stream_reasoning: bool | None = None
    thinking_token_budget: Count | None = None


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    prompt: Annotated[Any, WithJsonSchema(PROMPT_SCHEMA)]
    logprobs: int | None = Field(None, ge=0, le=MAX_COMPLETION_LOGPROBS)
    echo: bool | None = None
    add_special_tokens: bool | None = None


class TokenizeBody(ConversationBody):
    """`POST /tokenize`: a text or a conversation."""

    prompt: str | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(RequestBody):
    """`POST /detokenize`."""

    tokens: list[Count]


KNOWN = frozenset(
    {
        *IGNORED,
        *INTERNAL_PARAMETERS,
        *UNSUPPORTED_PARAMETERS,
        *HARMLESS,
        *ChatBody.model_fields,
        *CompletionBody.model_fields,
    }
)


def validate(kind: type[Body], fields: dict[str, Any]) -> Body:
    """The body as `kind`; raises `RequestError` 400 with the wrong field's dotted name."""
    try:
        body = kind.model_validate(fields)
    except ValidationError as error:
        raise validation_error(error) from None
    refuse_unsupported(body.model_extra or {})
    return body


def refuse_unsupported(extra: dict[str, Any]) -> None:
    """Raises `RequestError` 400 `unsupported_parameter` for what would have to change the answer."""
    for name in INTERNAL_PARAMETERS:
        if extra.get(name) is not None:
            raise unsupported(name, "it is not part of the public API")
    for name in UNSUPPORTED_PARAMETERS:
        value = extra.get(name)
        if not _is_off(value) or (name in SCHEMAS and value == {}):
            raise unsupported(name)
    for name, harmless in HARMLESS.items():
        value = extra.get(name)
        if value is not None and value not in harmless:
            raise unsupported(name)


def unknown_fields(extra: Iterable[str]) -> list[str]:
    """Names that mean nothing at any endpoint."""
    return [name for name in extra if name not in KNOWN]


def _is_off(value: Any) -> bool:
    """Null, false or empty; 0 is a number and asks for something."""
    return value is None or value is False or value in ("", [], {})
