"""From a chat body to its answer: checked, rendered, submitted; for every endpoint that holds a conversation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mesh.errors import RequestError
from proxy.api.answer import Answer, Sink, Usage
from proxy.api.errors import unsupported
from proxy.api.messages import template_messages
from proxy.api.reasoning import Reasoning, check_own_channel, reasoning_of
from proxy.api.sampling import (
    check_min_tokens,
    check_prompt_logprobs,
    check_stream_options,
    refuse_extra_choices,
    sampling_params,
    text_options,
    token_budget,
    truncated,
)
from proxy.api.schemas import ChatBody, ConversationBody
from proxy.api.service import Service
from proxy.api.structured import Constraint, output_constraint
from proxy.api.submit import answer, submit
from proxy.api.tools import Tools, offered_tools

RESERVED_TEMPLATE_NAMES = frozenset({"self", "messages", "tools"})


@dataclass(frozen=True, slots=True)
class Asked:
    """A checked body and what follows from it."""

    body: ChatBody
    tools: Tools | None
    """What the model may call."""
    tokens: list[int]
    """The prompt."""
    budget: int
    """How many tokens may follow it."""
    constraint: Constraint | None
    """What the answer must be."""
    reasoning: Reasoning | None
    """None: no part of the output is thinking."""

    def usage(self) -> Usage:
        counted = thinks_apart(self.tools) or (self.reasoning is not None and self.reasoning.delivery is not None)
        return Usage(prompt_tokens=len(self.tokens), reasoning_tokens=0 if counted else None)


def thinks_apart(tools: Tools | None) -> bool:
    """The format of calls is one that has its own place for what the model thinks."""
    return tools is not None and tools.format.always


async def prepare(service: Service, body: ChatBody) -> Asked:
    """Raises `RequestError` for what cannot be served; nothing is generated yet."""
    check_chat(body)
    service.check_priority(body.priority)
    tools = offered_tools(body, service.tokenizer, service.tool_format)
    constraint = tools.constraint if tools else output_constraint(body)
    max_model_len = service.facts().max_model_len
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    tokens = await prompt_tokens(service, body, bounded=body.truncate_prompt_tokens is None)
    tokens = truncated(body, tokens, limit, max_model_len)
    check_prompt_logprobs(body, len(tokens))
    budget = token_budget(limit, len(tokens), max_model_len, "messages")
    apart = thinks_apart(tools)
    if apart:
        check_own_channel(body)
    format = None if apart else service.reasoning
    reasoning = reasoning_of(body, format, service.tokenizer, tokens, constrained=constraint is not None)
    return Asked(body, tools, tokens, budget, constraint, reasoning)


async def respond(service: Service, asked: Asked, api_id: str, arrived: float, sink: Sink, usage: Usage) -> Answer:
    """The response that generates the answer and has `sink` write it. `arrived`: `perf_counter` at the request's
    arrival. Raises `RequestError` when no worker takes it."""
    body, reasoning = asked.body, asked.reasoning
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    grammar = await service.grammar(asked.constraint)
    thinking = None if reasoning is None else reasoning.thinking
    params = sampling_params(body, service.tokenizer, asked.budget, logprobs, body.prompt_logprobs, grammar, thinking)
    options = text_options(body)
    choices = [
        options.choice(service.tokenizer, asked.tokens, tools=asked.tools, reasoning=reasoning)
        for _ in range(body.n or 1)
    ]
    generations = submit(service, body, api_id, [asked.tokens], params, [asked.budget])
    return answer(
        service,
        body,
        api_id,
        arrived,
        generations,
        [asked.tokens],
        choices,
        sink,
        usage,
        max_tokens=asked.budget,
    )


def check_chat(body: ChatBody) -> None:
    """What pydantic cannot say of one field alone. Raises `RequestError` 400."""
    check_stream_options(body)
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit = getattr(body, name)
    if limit == 0:
        raise RequestError(400, f"{name} must be at least 1.", param=name)
    check_min_tokens(body.min_tokens, limit)
    refuse_extra_choices(body.best_of, body.n or 1)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
    if (body.model_extra or {}).get("echo"):
        raise unsupported("echo", "it is a parameter of /v1/completions")


async def prompt_tokens(service: Service, body: ConversationBody, *, bounded: bool = True) -> list[int]:
    """Token ids of a conversation; see `Service.encode`. Raises `RequestError` 400."""
    chat = service.tokenizer.chat
    messages = template_messages(body.messages, knows_developer_role=chat is not None and chat.knows_developer_role)
    variables = _template_variables(body)

    def encoded() -> list[int]:
        text = service.tokenizer.render_chat(messages, body.tools, **variables)
        return service.encode(text, special=bool(body.add_special_tokens), param="messages", bounded=bounded)

    return await service.beside(encoded, sum(len(message["content"]) for message in messages))


def _template_variables(body: ConversationBody) -> dict[str, Any]:
    if body.continue_final_message and body.add_generation_prompt:
        raise RequestError(
            400,
            "continue_final_message and add_generation_prompt exclude each other.",
            param="continue_final_message",
        )
    variables = dict(body.chat_template_kwargs or {})
    for name in RESERVED_TEMPLATE_NAMES & variables.keys():
        raise RequestError(400, f"chat_template_kwargs must not set {name}.", param=f"chat_template_kwargs.{name}")
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
        if body.reasoning_effort == "none":
            variables.setdefault("enable_thinking", False)
    if body.add_generation_prompt is not None:
        variables["add_generation_prompt"] = body.add_generation_prompt
    if body.continue_final_message is not None:
        variables["continue_final_message"] = body.continue_final_message
    return variables
