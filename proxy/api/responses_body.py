"""The body of `POST /v1/responses`, and what of it is refused."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from mesh.errors import RequestError
from proxy.api.errors import unsupported
from proxy.api.schemas import MAX_TOP_LOGPROBS, ChatBody, Count, SamplingBody

MAX_METADATA = 16
MAX_LABEL_CHARS = 512
"""Labels of the client's are repeated in every answer and kept with it."""
LOGPROBS = "message.output_text.logprobs"

TEXT = {"type": "string"}
PARTS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["type", "text"],
        "properties": {"type": {"enum": ["input_text", "output_text"]}, "text": TEXT},
    },
}
MESSAGE_SCHEMA = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "type": {"const": "message"},
        "role": {"enum": ["user", "assistant", "system", "developer"]},
        "content": {"anyOf": [TEXT, PARTS]},
    },
}
CALL_SCHEMA = {
    "type": "object",
    "required": ["type", "call_id", "name", "arguments"],
    "properties": {"type": {"const": "function_call"}, "call_id": TEXT, "name": TEXT, "arguments": TEXT},
}
OUTPUT_SCHEMA = {
    "type": "object",
    "required": ["type", "call_id", "output"],
    "properties": {"type": {"const": "function_call_output"}, "call_id": TEXT, "output": {"anyOf": [TEXT, PARTS]}},
}
OTHER_SCHEMA = {
    "type": "object",
    "required": ["type"],
    "properties": {"type": {"enum": ["reasoning", "item_reference"]}, "id": TEXT},
}
ITEM_SCHEMA = {"anyOf": [MESSAGE_SCHEMA, CALL_SCHEMA, OUTPUT_SCHEMA, OTHER_SCHEMA]}
INPUT_SCHEMA = {"anyOf": [TEXT, {"type": "array", "items": ITEM_SCHEMA}, {"type": "null"}]}

UNSUPPORTED = ("background_options", "context_management", "conversation", "moderation", "prompt")
OF_CHAT = {"n": 1, "best_of": 1}
"""Chat's parameters are refused here, but for these values."""

Refused = Annotated[Any, WithJsonSchema({"type": "null"})]
Label = Annotated[str, Field(max_length=MAX_LABEL_CHARS)]
Includable = Literal[
    "message.output_text.logprobs",
    "reasoning.encrypted_content",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
]
"""The first changes the answer; the others ask for parts that no answer of this server has."""
Summary = Literal["auto", "concise", "detailed"]


class Part(BaseModel):
    """A member of the body that is an object."""

    model_config = ConfigDict(strict=True, extra="forbid")


class TextConfig(Part):
    format: Any = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ReasoningConfig(Part):
    """Thinking is given in full, so that a summary is not needed."""

    effort: str | None = Field(None, max_length=32)
    summary: Summary | None = None
    generate_summary: Summary | None = None
    context: Literal["auto"] | None = None
    mode: Literal["standard"] | None = None


class StreamOptions(Part):
    include_obfuscation: bool | None = None


class CacheOptions(Part):
    """Hints for a cache that needs none."""

    comparison_response_id: str | None = None
    mode: str | None = None
    prewarm: Literal[False] | None = None
    ttl: str | None = None


class ResponsesBody(SamplingBody):
    """`POST /v1/responses`."""

    input: Annotated[Any, WithJsonSchema(INPUT_SCHEMA)] = None
    instructions: str | None = None
    previous_response_id: str | None = Field(None, max_length=128)
    max_output_tokens: Count | None = None
    max_tool_calls: Count | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    include: list[Includable] | None = None
    truncation: Literal["auto", "disabled"] | None = None
    store: bool | None = None
    background: bool | None = None
    stream_options: StreamOptions | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Label] | None = Field(None, max_length=MAX_METADATA)
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_options: CacheOptions | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = None
    service_tier: Label | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    thinking_token_budget: Count | None = None
    background_options: Refused = None
    context_management: Refused = None
    conversation: Refused = None
    moderation: Refused = None
    prompt: Refused = None

    @property
    def stored(self) -> bool:
        return self.store is not False

    @property
    def logprobs(self) -> int | None:
        """How many alternatives of every token the answer lists; None: no log-probabilities."""
        return (self.top_logprobs or 0) if LOGPROBS in (self.include or ()) else None


def check_responses(body: ResponsesBody) -> None:
    """What pydantic cannot say of one field alone. Raises `RequestError` 400."""
    _refuse_unserved(body)
    if body.input is None and body.previous_response_id is None:
        raise RequestError(400, "input or previous_response_id must be given.", param="input")
    for name in ("max_output_tokens", "max_tool_calls"):
        if getattr(body, name) == 0:
            raise RequestError(400, f"{name} must be at least 1.", param=name)
    limit, least = body.max_output_tokens, body.min_tokens
    if limit is not None and least is not None and least > limit:
        raise RequestError(400, "min_tokens must not be above max_output_tokens.", param="min_tokens")
    if body.stream_options is not None and not body.stream:
        raise RequestError(400, "stream_options is only allowed when stream is true.", param="stream_options")
    if body.top_logprobs and body.logprobs is None:
        raise RequestError(400, f"top_logprobs needs include to hold {LOGPROBS}.", param="top_logprobs")
    if body.background and not body.stored:
        raise RequestError(400, "A response in the background must be stored.", param="background")


def _refuse_unserved(body: ResponsesBody) -> None:
    for name in UNSUPPORTED:
        if getattr(body, name) not in (None, [], {}):
            raise unsupported(name)
    extra = body.model_extra or {}
    for name in ChatBody.model_fields.keys() & extra.keys():
        value = extra[name]
        if value is not None and value is not False and value != OF_CHAT.get(name):
            raise unsupported(name, "it is a parameter of /v1/chat/completions")
