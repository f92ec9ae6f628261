"""POST /v1/messages and /v1/messages/count_tokens: Anthropic's API over the same conversations."""

from __future__ import annotations

import uuid
from time import perf_counter

from fastapi import APIRouter, Request
from starlette.responses import Response

from mesh.errors import RequestError
from proxy.api import requestid
from proxy.api.answer import Sink
from proxy.api.anthropic_answer import Ending, MessageDocument, MessageStream
from proxy.api.anthropic_answer_schemas import COUNTED, ERROR, EVENT, MESSAGE
from proxy.api.anthropic_errors import OVERLOADED
from proxy.api.anthropic_request import chat_body, in_clients_words
from proxy.api.anthropic_schemas import CountTokensBody, MessagesBody
from proxy.api.conversation import prepare, prompt_tokens, respond
from proxy.api.frames import json_response
from proxy.api.openapi import GENERATES, READS_BODY, operation
from proxy.api.service import Service
from proxy.api.tools import offered_tools

CREATE = operation(MessagesBody, answer=MESSAGE, events=EVENT, errors=(*GENERATES, OVERLOADED), error_schema=ERROR)
COUNT = operation(CountTokensBody, answer=COUNTED, errors=(*READS_BODY, OVERLOADED), error_schema=ERROR)


def anthropic_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/messages", openapi_extra=CREATE)
    async def create_message(request: Request) -> Response:
        """Answers a conversation in Anthropic's form, whole or as a stream of server-sent events."""
        arrived = perf_counter()
        body = await service.read(MessagesBody, request)
        try:
            asked = await prepare(service, chat_body(body, thinks=service.reasoning is not None))
            id = f"msg_{uuid.uuid4().hex}"
            usage = asked.usage()
            ending = Ending(cut_by_context=asked.budget < body.max_tokens)
            show = body.thinking is None or body.thinking.display != "omitted"
            sink: Sink = MessageDocument(id, body.model, usage, ending, show_thinking=show)
            if body.stream:
                request_id = request.scope[requestid.KEY]
                sink = MessageStream(id, body.model, usage, ending, request_id, show_thinking=show)
            return await respond(service, asked, id, arrived, sink, usage)
        except RequestError as error:
            raise in_clients_words(error) from None

    @router.post("/v1/messages/count_tokens", openapi_extra=COUNT)
    async def count_message_tokens(request: Request) -> Response:
        """How many tokens the prompt of such a message would have; of any length."""
        body = await service.read(CountTokensBody, request)
        try:
            chat = chat_body(body)
            offered_tools(chat, service.tokenizer, service.tool_format)
            tokens = await prompt_tokens(service, chat, bounded=False)
        except RequestError as error:
            raise in_clients_words(error) from None
        return json_response({"input_tokens": len(tokens)})

    return router
