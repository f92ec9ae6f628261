"""/v1/responses: create, retrieve, cancel, delete, list what went in, count tokens."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from time import perf_counter, time

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from mesh.errors import RequestError
from proxy.api.answer import Answer, Usage
from proxy.api.conversation import Asked, prompt_tokens, respond
from proxy.api.door import Door
from proxy.api.frames import json_response
from proxy.api.logprobs import Spelling
from proxy.api.openapi import GENERATES, READS_BODY, operation, query_parameter
from proxy.api.responses_answer_schemas import COUNTED, DELETED, EVENT, ITEMS, RESPONSE
from proxy.api.responses_background import Background, Followed, keep
from proxy.api.responses_body import ResponsesBody, check_responses
from proxy.api.responses_items import Item, ItemIds
from proxy.api.responses_object import ResponseObject, response_object
from proxy.api.responses_output import Output
from proxy.api.responses_query import MAX_LIMIT, ItemQuery, StreamQuery, item_page
from proxy.api.responses_request import asked_of, chat_body, own_names
from proxy.api.responses_state import conversation_items, kept
from proxy.api.responses_store import Record, ResponseStore, new_response_id
from proxy.api.responses_stream import ResponseDocument, ResponseSink, ResponseStream
from proxy.api.schemas import validate
from proxy.api.service import Service, unix_now
from proxy.api.tenants import current
from proxy.api.tools import offered_tools

CANCEL_WAIT_S = 5.0
"""For a run to end, here or at another proxy, before a cancel answers with what is known."""
CANCEL_LOOK_S = 0.1


CREATE = operation(ResponsesBody, answer=RESPONSE, events=EVENT, errors=GENERATES)
INPUT_TOKENS = operation(ResponsesBody, answer=COUNTED, errors=READS_BODY)
ID = {"name": "response_id", "in": "path", "required": True, "schema": {"type": "string"}}
STORED = (404, 503)
"""What an operation on a stored response adds: it may not be there, or the store may not."""
RETRIEVE = operation(
    answer=RESPONSE,
    events=EVENT,
    errors=(400, *STORED),
    parameters=(
        ID,
        query_parameter("stream", {"enum": ["true", "false"]}),
        query_parameter("starting_after", {"type": "integer", "minimum": 0}),
    ),
)
CANCEL = operation(answer=RESPONSE, errors=(400, *STORED), parameters=(ID,))
DELETE = operation(answer=DELETED, errors=STORED, parameters=(ID,))
INPUT_ITEMS = operation(
    answer=ITEMS,
    errors=(400, *STORED),
    parameters=(
        ID,
        query_parameter("limit", {"type": "integer", "minimum": 1, "maximum": MAX_LIMIT}),
        query_parameter("order", {"enum": ["asc", "desc"]}),
        query_parameter("after", {"type": "string"}),
    ),
)


@dataclass(frozen=True, slots=True)
class Plan:
    """A checked request, ready to be submitted."""

    body: ResponsesBody
    asked: Asked
    items: list[Item]
    response: ResponseObject
    output: Output
    usage: Usage
    spelling: Spelling | None
    arrived: float

    def stream(self) -> ResponseStream:
        return ResponseStream(self.response, self.output, self.usage, self.spelling)

    def document(self) -> ResponseDocument:
        return ResponseDocument(self.response, self.output, self.usage, self.spelling)

    async def answer(self, service: Service, sink: ResponseSink) -> Answer:
        with own_names():
            return await respond(service, self.asked, self.response.id, self.arrived, sink, self.usage)


def responses_router(service: Service, store: ResponseStore, door: Door) -> APIRouter:
    router = APIRouter()
    background = Background(store, door)

    @router.post("/v1/responses", openapi_extra=CREATE)
    async def create_response(request: Request) -> Response:
        """Answers an input, whole, as a stream of server-sent events, or later."""
        arrived = perf_counter()
        plan = await _plan(service, store, await service.read(ResponsesBody, request), arrived)
        if plan.body.background:
            return await _in_background(service, store, door, background, plan)
        sink: ResponseSink = plan.stream() if plan.body.stream else plan.document()
        answer = await plan.answer(service, sink)
        return Kept(answer, store, plan.items, sink) if plan.body.stored else answer

    @router.post("/v1/responses/input_tokens", openapi_extra=INPUT_TOKENS)
    async def count_input_tokens(request: Request) -> Response:
        """How many tokens the prompt of such a response has; nothing is generated."""
        fields = {"model": service.model_name, **await service.read_json(request)}
        body = validate(ResponsesBody, fields)
        service.check_model(body.model)
        check_responses(body)
        items = await conversation_items(store, body, ItemIds(new_response_id()))
        with own_names():
            chat = chat_body(body, items)
            offered_tools(chat, service.tokenizer, service.tool_format)
            tokens = await prompt_tokens(service, chat, bounded=False)
        return json_response({"object": "response.input_tokens", "input_tokens": len(tokens)})

    @router.get("/v1/responses/{response_id}", openapi_extra=RETRIEVE)
    async def retrieve_response(request: Request) -> Response:
        """A response that was stored; or the events of one in the background, from any number on."""
        response_id = request.path_params["response_id"]
        query = StreamQuery.of(request.query_params)
        record = await kept(store, response_id)
        if not query.stream:
            return json_response(record.response)
        run = background.find(response_id)
        if run is None or not run.streamed:
            raise RequestError(
                400,
                "Only a response that was created with background and stream can be streamed, for a while, at the "
                "proxy that runs it; without stream its state is always there.",
                param="stream",
            )
        return Followed(run, query.first, service.keep_alive_s)

    @router.post("/v1/responses/{response_id}/cancel", openapi_extra=CANCEL)
    async def cancel_response(request: Request) -> Response:
        """Ends a response in the background; one that has ended stays as it is."""
        response_id = request.path_params["response_id"]
        record = await kept(store, response_id)
        if not record.response["background"]:
            raise RequestError(400, "Only a response in the background can be cancelled.", param="response_id")
        if record.alive:
            record = await _cancelled(store, background, response_id)
        return json_response(record.response)

    @router.delete("/v1/responses/{response_id}", openapi_extra=DELETE)
    async def delete_response(request: Request) -> Response:
        """Forgets a response; one that still runs is cancelled."""
        response_id = request.path_params["response_id"]
        record = await kept(store, response_id)
        await store.delete(response_id)
        if background.stop(response_id) is None and record.alive:
            await store.ask_cancel(response_id)
        background.forget(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @router.get("/v1/responses/{response_id}/input_items", openapi_extra=INPUT_ITEMS)
    async def list_input_items(request: Request) -> Response:
        """What the model was given, the responses before this one included; without the instructions."""
        query = ItemQuery.of(request.query_params)
        record = await kept(store, request.path_params["response_id"])
        return json_response(item_page(record.input, query))

    return router


async def _plan(service: Service, store: ResponseStore, body: ResponsesBody, arrived: float) -> Plan:
    """Raises `RequestError` for what cannot be served; nothing is generated yet."""
    check_responses(body)
    id = new_response_id()
    ids = ItemIds(id)
    items = await conversation_items(store, body, ids)
    asked = await asked_of(service, body, items)
    return Plan(
        body,
        asked,
        items,
        response_object(id, unix_now(), body, service.tokenizer),
        Output(ids),
        asked.usage(),
        None if body.logprobs is None else Spelling(service.tokenizer),
        arrived,
    )


async def _in_background(
    service: Service, store: ResponseStore, door: Door, background: Background, plan: Plan
) -> Response:
    """Submits, and answers at once. Raises `RequestError` when it cannot be submitted or its state not be kept."""
    sink = plan.stream()
    deadline = time() + service.settings.request_timeout
    queued = sink.document
    record = Record(queued, plan.items, deadline, current.get().name)
    if plan.body.stream:
        background.check_room()
    door.enter()
    try:
        await store.put(record, new=True)
        try:
            answer = await plan.answer(service, sink)
        except BaseException:
            await store.delete(record.id)
            raise
    except BaseException:
        door.leave()
        raise
    run = background.start(record, answer, sink, streamed=bool(plan.body.stream))
    return Followed(run, 0, service.keep_alive_s) if run.streamed else json_response(queued)


async def _cancelled(store: ResponseStore, background: Background, id: str) -> Record:
    """The record after a cancel, which may take another proxy a moment."""
    run = background.stop(id)
    if run is not None:
        try:
            async with asyncio.timeout(CANCEL_WAIT_S):
                await run.over.wait()
        except TimeoutError:
            pass
        return await kept(store, id)
    await store.ask_cancel(id)
    until = perf_counter() + CANCEL_WAIT_S
    while (record := await kept(store, id)).alive and perf_counter() < until:
        await asyncio.sleep(CANCEL_LOOK_S)
    return record


class Kept(Response):
    """An answer that is in the store before its client sees the end of it: the next request may go on from it."""

    def __init__(self, answer: Answer, store: ResponseStore, items: list[Item], sink: ResponseSink) -> None:
        super().__init__()
        self._answer = answer
        self._store = store
        self._items = items
        self._sink = sink

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def keeping(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                record = Record(self._sink.document, self._items, tenant=current.get().name)
                await keep(self._store, record, new=True)
            await send(message)

        await self._answer(scope, receive, keeping)
