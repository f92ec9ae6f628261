"""POST /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mesh.errors import RequestError
from mesh.tokenizer import Tokenizer
from proxy.api.answer import Usage
from proxy.api.errors import unsupported
from proxy.api.frames import Envelope, Frames
from proxy.api.logprobs import chat_entry
from proxy.api.messages import template_messages
from proxy.api.sampling import (
    check_min_tokens,
    check_stream_options,
    sampling_params,
    text_options,
    token_budget,
)
from proxy.api.schemas import ChatBody, openapi_body, validate
from proxy.api.service import Service, new_id, unix_now
from proxy.api.sse import compact
from proxy.api.submit import answer, submit
from proxy.generation import Chunk, Route
from proxy.text.choice import Piece

RESERVED_TEMPLATE_NAMES = frozenset({"self", "messages", "tools"})
ROUTE_HEADER = "x-kvmesh-route"
"""`1`: a stream's last frame tells which workers served."""


def chat_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", openapi_extra=openapi_body(ChatBody))
    async def create_chat_completion(request: Request) -> Response:
        """Answers a conversation, whole or as a stream of server-sent events."""
        arrived = perf_counter()
        body = validate(ChatBody, await service.read_json(request))
        service.check_model(body.model)
        check_chat(body)
        tokens = await _prompt_tokens(service, body)
        asked = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
        budget = token_budget(asked, len(tokens), service.facts().max_model_len, "messages")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        params = sampling_params(body, service.tokenizer, budget, logprobs, None, await service.grammar(body))
        options = text_options(body)
        n = body.n or 1
        choices = [options.choice(service.tokenizer, tokens) for _ in range(n)]
        envelope = Envelope(new_id("chatcmpl"), unix_now(), service.model_name)
        usage = Usage(prompt_tokens=len(tokens))
        generations = submit(service, body, envelope.id, [tokens], params, [budget])
        sink: ChatStream | ChatDocument
        if body.stream:
            show_route = request.headers.get(ROUTE_HEADER) == "1"
            frames = Frames(envelope, "chat.completion.chunk", body, usage, show_route=show_route)
            sink = ChatStream(frames, n, service.tokenizer, logprobs=logprobs is not None)
        else:
            sink = ChatDocument(envelope, n, usage, service.tokenizer, logprobs=logprobs is not None)
        return answer(
            service,
            body,
            envelope.id,
            arrived,
            generations,
            [tokens],
            choices,
            sink,
            usage,
            max_tokens=budget,
        )

    return router


def check_chat(body: ChatBody) -> None:
    """What pydantic cannot say of one field alone. Raises `RequestError` 400."""
    check_stream_options(body)
    name = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    limit = getattr(body, name)
    if limit == 0:
        raise RequestError(400, f"{name} must be at least 1.", param=name)
    check_min_tokens(body.min_tokens, limit)
    if body.top_logprobs is not None and not body.logprobs:
        raise RequestError(400, "top_logprobs needs logprobs to be true.", param="top_logprobs")
    if body.tools and body.tool_choice != "none":
        raise unsupported("tools", 'only tool_choice "none" is served')
    if not body.tools and body.tool_choice not in (None, "none", "auto"):
        raise RequestError(400, "tool_choice is only allowed when tools are given.", param="tool_choice")
    if body.continue_final_message and body.add_generation_prompt:
        raise RequestError(
            400,
            "continue_final_message and add_generation_prompt exclude each other.",
            param="continue_final_message",
        )
    if (body.model_extra or {}).get("echo"):
        raise unsupported("echo", "it is a parameter of /v1/completions")


async def _prompt_tokens(service: Service, body: ChatBody) -> list[int]:
    chat = service.tokenizer.chat
    messages = template_messages(body.messages, knows_developer_role=chat is not None and chat.knows_developer_role)
    variables = _template_variables(body)

    def encoded() -> list[int]:
        text = service.tokenizer.render_chat(messages, body.tools, **variables)
        return service.encode(text, special=bool(body.add_special_tokens), param="messages")

    return await service.beside(encoded, sum(len(message["content"]) for message in messages))


def _template_variables(body: ChatBody) -> dict[str, Any]:
    variables = dict(body.chat_template_kwargs or {})
    for name in RESERVED_TEMPLATE_NAMES & variables.keys():
        raise RequestError(400, f"chat_template_kwargs must not set {name}.", param=f"chat_template_kwargs.{name}")
    if body.reasoning_effort is not None:
        variables["reasoning_effort"] = body.reasoning_effort
    if body.add_generation_prompt is not None:
        variables["add_generation_prompt"] = body.add_generation_prompt
    if body.continue_final_message is not None:
        variables["continue_final_message"] = body.continue_final_message
    return variables


class ChatStream:
    """Frames: the role, text as it comes, the finish reason; for each choice."""

    def __init__(self, frames: Frames, n: int, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._frames = frames
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._heads = [frames.head(i, '"delta":{"content":') for i in range(n)]
        self._begun = [False] * n

    def take(self, choice: int, chunk: Chunk, piece: Piece) -> bytes:
        frames = b""
        if not self._begun[choice]:
            self._begun[choice] = True
            head = self._frames.head(choice, '"delta":{"role":"assistant","content":')
            frames = self._frames.text(head, "", '},"logprobs":null,"finish_reason":null}')
        if piece.text or (self._logprobs and piece.num_tokens):
            rest = '},"logprobs":null,"finish_reason":null}'
            if self._logprobs:
                entries = [chat_entry(self._tokenizer, t) for t in chunk.logprobs[: piece.num_tokens]]
                logprobs = compact({"content": entries, "refusal": None})
                rest = f'}},"logprobs":{logprobs},"finish_reason":null}}'
            frames += self._frames.text(self._heads[choice], piece.text, rest)
        if piece.finish is not None:
            head = self._frames.head(choice, '"delta":{},"logprobs":null,"finish_reason":')
            frames += self._frames.text(head, piece.finish, "}")
        return frames

    def end(self, routes: Sequence[Route]) -> bytes:
        return self._frames.end(routes)


class ChatDocument:
    """Collects every choice for one JSON answer."""

    def __init__(self, envelope: Envelope, n: int, usage: Usage, tokenizer: Tokenizer, *, logprobs: bool) -> None:
        self._envelope = envelope
        self._usage = usage
        self._tokenizer = tokenizer
        self._logprobs = logprobs
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._entries: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        self._finishes: list[str | None] = [None] * n

    def take(self, choice: int, chunk: Chunk, piece: Piece) -> bytes:
        self._texts[choice].append(piece.text)
        self._finishes[choice] = piece.finish
        if self._logprobs:
            tokens = chunk.logprobs[: piece.num_tokens]
            self._entries[choice].extend(chat_entry(self._tokenizer, token) for token in tokens)
        return b""

    def end(self, routes: Sequence[Route]) -> bytes:
        document = {
            **self._envelope.object("chat.completion"),
            "choices": [self._choice(i) for i in range(len(self._texts))],
            "usage": self._usage.object(),
        }
        return compact(document).encode()

    def _choice(self, choice: int) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(self._texts[choice]), "refusal": None}
        logprobs = {"content": self._entries[choice], "refusal": None} if self._logprobs else None
        return {
            "index": choice,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._finishes[choice],
        }
