"""POST /v1/completions, and /render: the tokens of its prompts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from mesh.errors import RequestError
from proxy.api.answer import Sink, Usage
from proxy.api.answer_schemas import COMPLETION, COMPLETION_CHUNK, RENDERED, listing
from proxy.api.chat import ROUTE_HEADER
from proxy.api.errors import unsupported
from proxy.api.frames import Envelope, Frames, json_response, rendered
from proxy.api.logprobs import (
    CompletionLogprobs,
    Spelling,
    add_prompt,
    add_tokens,
    no_logprobs,
    prompt_entry,
    prompt_logprobs_of,
    prompt_offsets,
)
from proxy.api.openapi import GENERATES, READS_BODY, operation
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
from proxy.api.schemas import CompletionBody
from proxy.api.service import Service, new_id, unix_now
from proxy.api.sse import compact
from proxy.api.structured import output_constraint
from proxy.api.submit import answer, submit
from proxy.generation import Chunk, Route
from proxy.text.choice import Piece

MAX_CHOICES_IN_ALL = 1024
"""Prompts times n: what one request may put into the workers' queues at once."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt of a request."""

    tokens: list[int]
    echo: str
    """What the choices' texts begin with; empty without `echo`."""
    offsets: tuple[int, ...]
    """Of each token in `echo`; empty without `echo`."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What every choice of the answer shows."""

    prompts: tuple[Prompt, ...]
    n: int
    echo: bool
    logprobs: int | None
    prompt_logprobs: int | None
    token_ids: bool
    spelling: Spelling

    def prompt(self, choice: int) -> Prompt:
        return self.prompts[choice // self.n]


def completions_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post(
        "/v1/completions",
        openapi_extra=operation(CompletionBody, answer=COMPLETION, events=COMPLETION_CHUNK, errors=GENERATES),
    )
    async def create_completion(request: Request) -> Response:
        """Continues one or several prompts, whole or as a stream of server-sent events."""
        arrived = perf_counter()
        body, prompts, budgets = await _read(service, request)
        n, echo, discard = body.n or 1, bool(body.echo), body.max_tokens == 0
        about_prompt = [top for top in (body.prompt_logprobs, body.logprobs if echo else None) if top is not None]
        grammar = await service.grammar(output_constraint(body))
        prompt_logprobs = max(about_prompt, default=None)
        params = sampling_params(body, service.tokenizer, max(budgets), body.logprobs, prompt_logprobs, grammar)
        options = text_options(body)
        choices = [options.choice(service.tokenizer, p.tokens, len(p.echo)) for p in prompts for _ in range(n)]
        envelope = Envelope(new_id("cmpl"), unix_now(), body.model, service.facts().fingerprint)
        usage = Usage(prompt_tokens=sum(len(p.tokens) for p in prompts))
        spelling = Spelling(service.tokenizer, bool(body.return_tokens_as_token_ids))
        shape = Shape(
            tuple(prompts), n, echo, body.logprobs, body.prompt_logprobs, bool(body.return_token_ids), spelling
        )
        ids = [p.tokens for p in prompts]
        generations = submit(service, body, envelope.id, ids, params, budgets)
        sink: CompletionStream | CompletionDocument
        if body.stream:
            show_route = request.headers.get(ROUTE_HEADER) == "1"
            frames = Frames(envelope, "text_completion", body, usage, show_route=show_route)
            sink = CompletionStream(frames, shape)
        else:
            sink = CompletionDocument(envelope, shape, usage)
        return answer(
            service,
            body,
            envelope.id,
            arrived,
            generations,
            ids,
            choices,
            sink,
            usage,
            max_tokens=max(budgets),
            discard_output=discard,
        )

    @router.post(
        "/v1/completions/render",
        openapi_extra=operation(CompletionBody, answer=listing(RENDERED), errors=READS_BODY),
    )
    async def render_completion(request: Request) -> Response:
        """The prompts that a completion of this body would get, as token ids; nothing is generated."""
        body, prompts, _ = await _read(service, request)
        return json_response([rendered(new_id("cmpl"), body.model, p.tokens) for p in prompts])

    return router


async def _read(service: Service, request: Request) -> tuple[CompletionBody, list[Prompt], list[int]]:
    """The checked body, its prompts, and how many tokens may follow each."""
    body = await service.read(CompletionBody, request)
    check_completion(body)
    service.check_priority(body.priority)
    max_model_len = service.facts().max_model_len
    given = given_prompts(body.prompt, body.n or 1)
    asked = 1 if body.max_tokens == 0 else body.max_tokens
    prompts = await service.beside(
        lambda: [_prompt(service, body, p, asked, max_model_len) for p in given], sum(map(len, given))
    )
    check_prompt_logprobs(body, sum(len(p.tokens) for p in prompts))
    return body, prompts, [token_budget(asked, len(p.tokens), max_model_len, "prompt") for p in prompts]


def check_completion(body: CompletionBody) -> None:
    """What pydantic cannot say of one field alone. Raises `RequestError` 400."""
    check_stream_options(body)
    check_min_tokens(body.min_tokens, body.max_tokens)
    refuse_extra_choices(body.best_of, body.n or 1)
    if body.max_tokens == 0 and not body.echo:
        raise RequestError(400, "max_tokens may be 0 only with echo.", param="max_tokens")
    extra = body.model_extra or {}
    for name in ("messages", "tools", "tool_choice", "max_completion_tokens", "top_logprobs"):
        if extra.get(name) not in (None, [], "none"):
            raise unsupported(name, "it is a parameter of /v1/chat/completions")


def given_prompts(prompt: Any, n: int) -> list[str | list[int]]:
    """The prompts in any of the four forms: text, token ids, or a list of either."""
    if isinstance(prompt, str):
        return [prompt]
    if not isinstance(prompt, list) or not prompt:
        raise RequestError(400, "prompt must be a text, a list of token ids, or a list of either.", param="prompt")
    if type(prompt[0]) is int:
        return [_token_ids(prompt, "prompt")]
    if len(prompt) * n > MAX_CHOICES_IN_ALL:
        raise RequestError(
            400, f"prompt: at most {MAX_CHOICES_IN_ALL} choices (prompts times n) are served.", param="prompt"
        )
    if all(isinstance(p, str) for p in prompt):
        return list(prompt)
    return [_token_ids(p, f"prompt.{i}") for i, p in enumerate(prompt)]


def _token_ids(ids: Any, where: str) -> list[int]:
    if not isinstance(ids, list) or not all(type(i) is int for i in ids):
        raise RequestError(400, f"{where} must be a list of token ids.", param=where)
    return ids


def _prompt(
    service: Service, body: CompletionBody, given: str | list[int], asked: int | None, max_model_len: int
) -> Prompt:
    tokenizer, skip = service.tokenizer, body.skip_special_tokens is not False
    if isinstance(given, str):
        special = body.add_special_tokens is not False
        bounded = body.truncate_prompt_tokens is None
        whole = service.encode(given, special=special, param="prompt", bounded=bounded)
    else:
        whole = given
        service.check_ids(whole, "prompt")
    tokens = truncated(body, whole, asked, max_model_len)
    if not body.echo:
        return Prompt(tokens, "", ())
    if isinstance(given, str) and len(tokens) == len(whole):
        return Prompt(tokens, given, prompt_offsets(tokenizer, tokens, given, skip_special_tokens=False))
    text = tokenizer.decode(tokens, skip_special_tokens=skip)
    return Prompt(tokens, text, prompt_offsets(tokenizer, tokens, text, skip_special_tokens=skip))


def token_logprobs(
    shape: Shape, top: int, choice: int, chunk: Chunk, piece: Piece, *, first: bool
) -> CompletionLogprobs:
    """Of a chunk's tokens, and with an echoing choice's first chunk those of its prompt, `top` alternatives each."""
    lists = no_logprobs()
    prompt = shape.prompt(choice)
    if first and shape.echo:
        found = prompt_logprobs_of(chunk, len(prompt.tokens), top)
        add_prompt(lists, shape.spelling, prompt.tokens, found, prompt.offsets)
    add_tokens(lists, shape.spelling, chunk.logprobs[: piece.num_tokens], piece.offsets)
    return lists


class CompletionStream(Sink):
    """Frames: the echoed prompt, text as it comes, the finish reason; for each choice."""

    def __init__(self, frames: Frames, shape: Shape) -> None:
        self._frames = frames
        self._shape = shape
        choices = len(shape.prompts) * shape.n
        self._heads = [frames.head(i, '"text":') for i in range(choices)]
        self._begun = [False] * choices

    def take(self, choice: int, chunk: Chunk, piece: Piece) -> bytes:
        frames = b""
        text = piece.text
        first = not self._begun[choice]
        if first:
            self._begun[choice] = True
            text = self._shape.prompt(choice).echo + text
        logprobs, ids = "null", ""
        show = bool(text)
        if self._shape.logprobs is not None:
            lists = token_logprobs(self._shape, self._shape.logprobs, choice, chunk, piece, first=first)
            show = show or bool(lists["tokens"])
            logprobs = compact(lists)
        if self._shape.token_ids:
            show = show or first or piece.num_tokens > 0
            ids = f',"token_ids":{compact(chunk.tokens[: piece.num_tokens])}'
            if first:
                ids += f',"prompt_token_ids":{compact(self._shape.prompt(choice).tokens)}'
        if show:
            rest = f',"logprobs":{logprobs},"finish_reason":null{ids}}}'
            frames = self._frames.text(self._heads[choice], text, rest)
        if piece.finish is not None:
            rest = f',"logprobs":null,"finish_reason":"{piece.finish}"}}'
            frames += self._frames.text(self._heads[choice], "", rest)
        return frames

    def end(self, routes: Sequence[Route]) -> bytes:
        return self._frames.end(routes)


class CompletionDocument(Sink):
    """Collects every choice for one JSON answer."""

    def __init__(self, envelope: Envelope, shape: Shape, usage: Usage) -> None:
        self._envelope = envelope
        self._shape = shape
        self._usage = usage
        choices = len(shape.prompts) * shape.n
        self._texts: list[list[str]] = [[] for _ in range(choices)]
        self._logprobs: list[CompletionLogprobs] = [no_logprobs() for _ in range(choices)]
        self._prompt_logprobs: list[list[dict[str, Any] | None]] = [[] for _ in range(choices)]
        self._token_ids: list[list[int]] = [[] for _ in range(choices)]
        self._finishes: list[str | None] = [None] * choices

    def take(self, choice: int, chunk: Chunk, piece: Piece) -> bytes:
        first = not self._texts[choice]
        if first:
            self._texts[choice].append(self._shape.prompt(choice).echo)
        self._texts[choice].append(piece.text)
        self._finishes[choice] = piece.finish
        self._token_ids[choice].extend(chunk.tokens[: piece.num_tokens])
        shape = self._shape
        if shape.logprobs is not None:
            new = token_logprobs(shape, shape.logprobs, choice, chunk, piece, first=first)
            for name, values in new.items():
                self._logprobs[choice][name].extend(values)
        if shape.prompt_logprobs is not None and first:
            found = prompt_logprobs_of(chunk, len(shape.prompt(choice).tokens), shape.prompt_logprobs)
            self._prompt_logprobs[choice] = [prompt_entry(shape.spelling.tokenizer, token) for token in found]
        return b""

    def end(self, routes: Sequence[Route]) -> bytes:
        document = {
            **self._envelope.object("text_completion"),
            "choices": [self._choice(i) for i in range(len(self._texts))],
            "usage": self._usage.object(),
        }
        return compact(document).encode()

    def _choice(self, choice: int) -> dict[str, Any]:
        fields = {
            "index": choice,
            "text": "".join(self._texts[choice]),
            "logprobs": self._logprobs[choice] if self._shape.logprobs is not None else None,
            "finish_reason": self._finishes[choice],
        }
        if self._shape.prompt_logprobs is not None:
            fields["prompt_logprobs"] = self._prompt_logprobs[choice]
        if self._shape.token_ids:
            fields["prompt_token_ids"] = self._shape.prompt(choice).tokens
            fields["token_ids"] = self._token_ids[choice]
        return fields
