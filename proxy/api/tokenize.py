"""POST /tokenize and /detokenize, also under /v1: texts and conversations to token ids, and back."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from mesh.errors import RequestError
from proxy.api.answer_schemas import DETOKENIZED, TOKENIZED
from proxy.api.conversation import prompt_tokens
from proxy.api.frames import json_response
from proxy.api.openapi import READS_BODY, operation
from proxy.api.schemas import DetokenizeBody, TokenizeBody
from proxy.api.service import Service

CHARS_PER_TOKEN = 4
"""In ordinary text; decides what is done beside the event loop."""
TOKENIZE = operation(TokenizeBody, answer=TOKENIZED, errors=READS_BODY)
DETOKENIZE = operation(DetokenizeBody, answer=DETOKENIZED, errors=READS_BODY)


def tokenize_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", openapi_extra=TOKENIZE)
    @router.post("/v1/tokenize", openapi_extra=TOKENIZE)
    async def tokenize(request: Request) -> Response:
        """Token ids as a completion or chat completion would get them, of any length."""
        body = await service.read(TokenizeBody, request)
        tokens = await _tokens(service, body)
        max_model_len, piece = service.facts().max_model_len, service.tokenizer.backend.id_to_token

        def answer() -> Response:
            strings = [piece(token) for token in tokens] if body.return_token_strs else None
            return json_response(
                {"count": len(tokens), "max_model_len": max_model_len, "tokens": tokens, "token_strs": strings}
            )

        return await service.beside(answer, CHARS_PER_TOKEN * len(tokens))

    @router.post("/detokenize", openapi_extra=DETOKENIZE)
    @router.post("/v1/detokenize", openapi_extra=DETOKENIZE)
    async def detokenize(request: Request) -> Response:
        """The text of token ids, special tokens spelled out."""
        body = await service.read(DetokenizeBody, request)
        if body.tokens:
            service.check_ids(body.tokens, "tokens")
        text = await service.beside(
            lambda: service.tokenizer.decode(body.tokens, skip_special_tokens=False), CHARS_PER_TOKEN * len(body.tokens)
        )
        return json_response({"prompt": text})

    return router


async def _tokens(service: Service, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError(400, "Either prompt or messages must be given.", param="prompt")
    text = body.prompt
    if text is None:
        return await prompt_tokens(service, body, bounded=False)
    special = body.add_special_tokens is not False
    return await service.beside(lambda: service.tokenizer.encode(text, add_special_tokens=special), len(text))
