"""The response object: what was asked, as it was understood, and what came of it so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mesh.errors import RequestError
from mesh.tokenizer import Tokenizer
from proxy.api.answer import Usage
from proxy.api.responses_body import ResponsesBody
from proxy.api.responses_items import Item
from proxy.api.service import unix_now

CUT = "max_output_tokens"
"""Why a response is incomplete; also when it is the context that is full."""


@dataclass(frozen=True, slots=True)
class ResponseObject:
    """Makes the object of one response in each of its states."""

    id: str
    asked: dict[str, Any]
    """The fields that stay as they are."""

    def object(
        self,
        status: str,
        output: Sequence[Item] = (),
        usage: Usage | None = None,
        error: RequestError | None = None,
    ) -> dict[str, Any]:
        return {
            **self.asked,
            "status": status,
            "completed_at": unix_now() if status == "completed" else None,
            "error": None if error is None else failure(error),
            "incomplete_details": {"reason": CUT} if status == "incomplete" else None,
            "output": list(output),
            "usage": None if usage is None else usage_of(usage),
        }


def response_object(id: str, created: int, body: ResponsesBody, tokenizer: Tokenizer) -> ResponseObject:
    defaults = tokenizer.sampling
    text, reasoning = body.text, body.reasoning
    return ResponseObject(
        id,
        {
            "id": id,
            "object": "response",
            "created_at": created,
            "background": bool(body.background),
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "metadata": body.metadata or {},
            "model": body.model,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": body.previous_response_id,
            "prompt_cache_key": body.prompt_cache_key,
            "prompt_cache_retention": body.prompt_cache_retention,
            "reasoning": {
                "effort": reasoning.effort if reasoning else None,
                "summary": (reasoning.summary or reasoning.generate_summary) if reasoning else None,
            },
            "safety_identifier": body.safety_identifier,
            "service_tier": "default",
            "store": body.stored,
            "temperature": defaults.temperature if body.temperature is None else body.temperature,
            "presence_penalty": body.presence_penalty or 0.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "text": {
                "format": (text.format if text else None) or {"type": "text"},
                "verbosity": (text.verbosity if text else None) or "medium",
            },
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": [_tool(tool) for tool in body.tools or ()],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": defaults.top_p if body.top_p is None else body.top_p,
            "truncation": body.truncation or "disabled",
            "user": body.user,
        },
    )


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool["name"],
        "description": tool.get("description"),
        "parameters": tool.get("parameters"),
        "strict": bool(tool.get("strict")),
    }


def usage_of(usage: Usage) -> dict[str, Any]:
    """Chat's counts under this API's names."""
    counts = usage.object()
    thought = counts.get("completion_tokens_details", {}).get("reasoning_tokens", 0)
    return {
        "input_tokens": counts["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": usage.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": counts["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": counts["total_tokens"],
    }


def failure(error: RequestError) -> dict[str, Any]:
    """The error of a failed response: OpenAI's code, and ours as its type."""
    code = "invalid_prompt" if error.status < 500 else "server_error"
    return {"code": code, "message": error.message, "param": error.param, "type": error.code or error.type}
