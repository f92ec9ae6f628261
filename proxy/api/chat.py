"""POST /v1/chat/completions, and /render: the tokens of its prompt alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from proxy.api.answer import Sink, Usage
from proxy.api.answer_schemas import CHAT_CHUNK, CHAT_COMPLETION, RENDERED
from proxy.api.conversation import prepare, respond
from proxy.api.frames import Envelope, Frames, json_response, rendered
from proxy.api.logprobs import Spelling, chat_entry, prompt_entry, prompt_logprobs_of
from proxy.api.openapi import GENERATES, READS_BODY, operation
from proxy.api.schemas import ChatBody
from proxy.api.service import Service, new_id, unix_now
from proxy.api.sse import compact, quoted
from proxy.generation import Chunk, Route
from proxy.text.choice import Piece
from proxy.text.toolcalls import ToolCall

PLAIN_END = '},"logprobs":null,"finish_reason":null}'
ROUTE_HEADER = "x-kvmesh-route"
"""`1`: a stream's last frame tells which workers served."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the answer shows of every choice."""

    n: int
    prompt: list[int]
    spelling: Spelling
    logprobs: bool
    prompt_logprobs: int | None
    token_ids: bool


def chat_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/chat/completions",
        openapi_extra=operation(ChatBody, answer=CHAT_COMPLETION, events=CHAT_CHUNK, errors=GENERATES),
    )
    async def create_chat_completion(request: Request) -> Response:
        """Answers a conversation, whole or as a stream of server-sent events."""
        arrived = perf_counter()
        asked = await prepare(service, await service.read(ChatBody, request))
        body = asked.body
        shape = Shape(
            n=body.n or 1,
            prompt=asked.tokens,
            spelling=Spelling(service.tokenizer, bool(body.return_tokens_as_token_ids)),
            logprobs=bool(body.logprobs),
            prompt_logprobs=body.prompt_logprobs,
            token_ids=bool(body.return_token_ids),
        )
        envelope = Envelope(new_id("chatcmpl"), unix_now(), body.model, service.facts().fingerprint)
        usage = asked.usage()
        sink: Sink
        if body.stream:
            show_route = request.headers.get(ROUTE_HEADER) == "1"
            frames = Frames(envelope, "chat.completion.chunk", body, usage, show_route=show_route)
            sink = ChatStream(frames, shape)
        else:
            sink = ChatDocument(envelope, shape, usage)
        return await respond(service, asked, envelope.id, arrived, sink, usage)

    @router.post("/v1/chat/completions/render", openapi_extra=operation(ChatBody, answer=RENDERED, errors=READS_BODY))
    async def render_chat_completion(request: Request) -> Response:
        """The prompt that a completion of this body would get, as token ids; nothing is generated."""
        asked = await prepare(service, await service.read(ChatBody, request))
        return json_response(rendered(new_id("chatcmpl"), asked.body.model, asked.tokens))

    return router


class ChatStream(Sink):
    """Frames: the role, text as it comes, calls when they are whole, the finish reason; for each choice."""

    def __init__(self, frames: Frames, shape: Shape) -> None:
        self._frames = frames
        self._shape = shape
        self._heads = [frames.head(i, '"delta":{"content":') for i in range(shape.n)]
        self._begun = [False] * shape.n

    def take(self, choice: int, chunk: Chunk, piece: Piece) -> bytes:
        frames = b""
        if not self._begun[choice]:
            self._begun[choice] = True
            prompt = f',"prompt_token_ids":{compact(self._shape.prompt)}' if self._shape.token_ids else ""
            head = self._frames.head(choice, '"delta":{"role":"assistant","content":', prompt)
            frames = self._frames.text(head, "", PLAIN_END)
        if piece.reasoning:
            # clients are split between the two names
            thought = quoted(piece.reasoning)
            head = self._frames.head(choice, '"delta":{"reasoning":')
            frames += self._frames.whole(head, f'{thought},"reasoning_content":{thought}', PLAIN_END)
        if piece.text or ((self._shape.logprobs or self._shape.token_ids) and piece.num_tokens):
            frames += self._frames.text(self._heads[choice], piece.text, self._after_text(chunk, piece))
        for call in piece.calls:
            head = self._frames.head(choice, '"delta":{"tool_calls":[')
            delta = compact({"index": call.index, **call.object()})
            frames += self._frames.whole(head, delta, ']},"logprobs":null,"finish_reason":null}')
        if piece.finish is not None:
            head = self._frames.head(choice, '"delta":{},"logprobs":null,"finish_reason":')
            frames += self._frames.text(head, piece.finish, "}")
        return frames

    def _after_text(self, chunk: Chunk, piece: Piece) -> str:
        if not (self._shape.logprobs or self._shape.token_ids):
            return PLAIN_END
        logprobs, token_ids = "null", ""
        if self._shape.logprobs:
            entries = [chat_entry(self._shape.spelling, t) for t in chunk.logprobs[: piece.num_tokens]]
            logprobs = compact({"content": entries, "refusal": None})
        if self._shape.token_ids:
            token_ids = f',"token_ids":{compact(chunk.tokens[: piece.num_tokens])}'
        return f'}},"logprobs":{logprobs},"finish_reason":null{token_ids}}}'

    def end(self, routes: Sequence[Route]) -> bytes:
        return self._frames.end(routes)


class ChatDocument(Sink):
    """Collects every choice for one JSON answer."""

    def __init__(self, envelope: Envelope, shape: Shape, usage: Usage) -> None:
        n = shape.n
        self._envelope = envelope
        self._shape = shape
        self._usage = usage
        self._prompt_logprobs: list[dict[str, Any] | None] | None = None
        self._token_ids: list[list[int]] = [[] for _ in range(n)]
        self._texts: list[list[str]] = [[] for _ in range(n)]
        self._thoughts: list[list[str]] = [[] for _ in range(n)]
        self._calls: list[list[ToolCall]] = [[] for _ in range(n)]
        self._entries: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        self._finishes: list[str | None] = [None] * n

    def take(self, choice: int, chunk: Chunk, piece: Piece) -> bytes:
        self._texts[choice].append(piece.text)
        self._thoughts[choice].append(piece.reasoning)
        self._calls[choice].extend(piece.calls)
        self._finishes[choice] = piece.finish
        self._token_ids[choice].extend(chunk.tokens[: piece.num_tokens])
        shape = self._shape
        if shape.logprobs:
            tokens = chunk.logprobs[: piece.num_tokens]
            self._entries[choice].extend(chat_entry(shape.spelling, token) for token in tokens)
        if shape.prompt_logprobs is not None and self._prompt_logprobs is None:
            found = prompt_logprobs_of(chunk, len(shape.prompt), shape.prompt_logprobs)
            self._prompt_logprobs = [prompt_entry(shape.spelling.tokenizer, token) for token in found]
        return b""

    def end(self, routes: Sequence[Route]) -> bytes:
        document = {
            **self._envelope.object("chat.completion"),
            "choices": [self._choice(i) for i in range(len(self._texts))],
            "usage": self._usage.object(),
        }
        if self._shape.prompt_logprobs is not None:
            document["prompt_logprobs"] = self._prompt_logprobs
        if self._shape.token_ids:
            document["prompt_token_ids"] = self._shape.prompt
        return compact(document).encode()

    def _choice(self, choice: int) -> dict[str, Any]:
        text, calls = "".join(self._texts[choice]), self._calls[choice]
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if thought := "".join(self._thoughts[choice]):
            message |= {"content": text or None, "reasoning": thought, "reasoning_content": thought}
        if calls:
            message |= {"content": text or None, "tool_calls": [call.object() for call in calls]}
        logprobs = {"content": self._entries[choice], "refusal": None} if self._shape.logprobs else None
        fields = {
            "index": choice,
            "message": message,
            "logprobs": logprobs,
            "finish_reason": self._finishes[choice],
        }
        if self._shape.token_ids:
            fields["token_ids"] = self._token_ids[choice]
        return fields
