"""What every endpoint needs: the dispatcher, the tokenizer, and how a body is read and a prompt encoded."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import Request

from mesh.errors import GrammarError, RequestError
from mesh.settings import ProxySettings
from mesh.tokenizer import Tokenizer
from proxy.api import requestid
from proxy.api.jsonbody import parse_object
from proxy.api.sampling import context_length_exceeded
from proxy.api.schemas import RequestBody, unknown_fields, validate
from proxy.api.structured import Constraint, invalid_schema, with_form
from proxy.api.tenants import current
from proxy.generation import Dispatcher, ModelFacts
from proxy.grammars import GrammarCheck
from proxy.metrics import ProxyMetrics
from proxy.text.reasoning import ReasoningFormat
from proxy.text.toolformats import ToolFormat

logger = logging.getLogger(__name__)

MAX_UNKNOWN = 64
"""Names are the clients': they must fill neither memory nor the log."""
MAX_NAME_CHARS = 80
BODY_TIMEOUT_S = 60.0
"""A client that takes longer to send its body holds a place that others wait for."""
INLINE_CHARS = 8_000
"""Rendering and encoding so much text takes a millisecond or two; more is done beside the event loop."""
NORMALISED = 4
"""Normalisation may shorten a text before it is cut into tokens, by less than this factor."""
RETRY_NO_WORKERS_S = 2

T = TypeVar("T")
Body = TypeVar("Body", bound=RequestBody)


@dataclass(frozen=True, slots=True)
class Service:
    """One proxy's API; everything an endpoint may use."""

    dispatcher: Dispatcher
    tokenizer: Tokenizer
    settings: ProxySettings
    model_name: str
    metrics: ProxyMetrics
    keep_alive_s: float
    """Silence after which a stream gets a comment line."""
    created: int
    """Unix seconds; the model card's."""
    grammars: GrammarCheck
    model_names: tuple[str, ...]
    """What clients may ask for: `model_name` and its aliases."""
    reasoning: ReasoningFormat | None
    """How the model writes what it thinks before it answers."""
    tool_format: ToolFormat | None
    """How the model writes calls."""
    unknown: set[str] = field(default_factory=set)
    """Names of body fields that the log already has."""

    async def read(self, kind: type[Body], request: Request) -> Body:
        """The request's body, for a model that is served. Raises `RequestError`."""
        body = validate(kind, await self.read_json(request))
        if body.model_extra:
            requestid.adopt(request.scope, body.model_extra.get("request_id"))
            self.note_unknown(unknown_fields(body.model_extra))
        self.check_model(body.model or self.model_name)
        return body

    def check_priority(self, priority: int | None) -> None:
        """One that lets a request overtake others needs the operator's consent."""
        if priority and self.settings.scheduling_policy != "priority":
            raise RequestError(400, "priority needs a server with --scheduling-policy priority.", param="priority")

    def note_unknown(self, names: Sequence[str]) -> None:
        """Logs each name once: probably a client's mistake, or a parameter that is not served yet."""
        for name in names:
            short = name[:MAX_NAME_CHARS]
            if short not in self.unknown and len(self.unknown) < MAX_UNKNOWN:
                self.unknown.add(short)
                logger.warning("the field %r in request bodies is not known and ignored", short)

    async def read_json(self, request: Request) -> dict[str, Any]:
        """The request's JSON object; raises `RequestError` 400 or 408."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json" and not media_type.endswith("+json"):
            raise RequestError(400, "The content type of the request must be application/json.")
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                body = await request.body()
        except TimeoutError:
            raise RequestError(408, "The request body did not arrive in time.", code="timeout") from None
        return parse_object(body)

    def check_model(self, name: str) -> None:
        """Raises `RequestError` 404, or 403 where it is not the tenant's to use."""
        if name not in self.model_names:
            raise RequestError(404, f"The model {name[:100]!r} does not exist.", code="model_not_found", param="model")
        current.get().check_model(name)

    def facts(self) -> ModelFacts:
        """What the workers serve; raises `RequestError` 503 while there is none."""
        facts = self.dispatcher.model
        if facts is None:
            raise RequestError(
                503,
                "No worker is ready to serve this model yet. Please try again shortly.",
                type="server_error",
                code="no_workers",
                retry_after=RETRY_NO_WORKERS_S,
            )
        return facts

    async def beside(self, work: Callable[[], T], size: int) -> T:
        """`work()`, which handles about `size` characters; in a thread when that takes noticeable time."""
        return work() if size <= INLINE_CHARS else await asyncio.to_thread(work)

    def encode(self, text: str, *, special: bool, param: str, bounded: bool = True) -> list[int]:
        """Token ids of a prompt. Raises `RequestError` 400 when there are none, unknown ones or, if `bounded`, far too
        many."""
        limit = self.facts().max_model_len
        fewest = len(text) // (self.tokenizer.longest_token * NORMALISED)
        if bounded and fewest > limit:  # not worth cutting into tokens
            raise context_length_exceeded(limit, f"more than {fewest}", param)
        ids = self.tokenizer.encode(text, add_special_tokens=special)
        self.check_ids(ids, param)
        return ids

    async def grammar(self, constraint: Constraint | None) -> str | None:
        """What is asked of an output, as the workers get it. Raises `RequestError` 400 or 503."""
        if constraint is None:
            return None
        form = await self.grammar(constraint.form)
        grammar = constraint.grammar if form is None else with_form(constraint.grammar, form)
        try:
            return await self.grammars.check(grammar, converts=constraint.converts)
        except GrammarError as error:
            raise invalid_schema(constraint.param, str(error)) from None

    def check_ids(self, ids: list[int], param: str) -> None:
        """Raises `RequestError` 400 unless `ids` are some token ids of the model."""
        if not ids:
            raise RequestError(400, f"{param} must not be empty.", param=param)
        if max(ids) >= self.tokenizer.vocab_size or min(ids) < 0:
            raise RequestError(
                400, f"{param} holds a token id outside 0..{self.tokenizer.vocab_size - 1}.", param=param
            )


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"


def unix_now() -> int:
    return int(time.time())
