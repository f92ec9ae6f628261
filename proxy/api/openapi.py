"""What /openapi.json says of an operation: its body, its answers, and every status that it can have.

An endpoint is declared by `openapi_extra=operation(...)` where it is defined; `errors` are those beyond `ALWAYS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from proxy.api.schemas import ERROR_SCHEMA

Schema = Mapping[str, Any]

JSON = "application/json"
EVENTS = "text/event-stream"
EVENT_SCHEMA = "x-itemSchema"
"""Of the JSON in one event's `data`. OpenAPI has `itemSchema` for it, from version 3.2 on."""

ERRORS = {
    400: "The request is wrong, or asks for what is not served.",
    401: "The server wants a key, and this is none of its.",
    403: "This key may not use the model.",
    404: "No model of that name is served.",
    405: "The path does not have this method.",
    408: "The body did not arrive in time.",
    413: "The body is larger than the server takes.",
    429: "This key's limit of requests or tokens is reached.",
    500: "A fault of the server.",
    503: "Now is no worker that could serve it, or the server takes no more requests.",
    504: "It could not be completed in time.",
    529: "The server is overloaded.",
}
ALWAYS = (401, 405, 413, 500)
"""What any operation can answer."""
READS_BODY = (400, 403, 404, 408, 503)
"""What one adds that reads a body, which has a model's name, and is counted by the door."""
GENERATES = (*READS_BODY, 429, 504)
"""What one adds that needs workers."""
TRY_AGAIN = (429, 503, 529)
"""With these comes `Retry-After`, mostly."""


def operation(
    body: type[BaseModel] | None = None,
    *,
    answer: Schema,
    events: Schema | None = None,
    errors: Sequence[int] = (),
    error_schema: Schema = ERROR_SCHEMA,
    more: Mapping[int, Mapping[str, Any]] | None = None,
    parameters: Sequence[Schema] = (),
) -> dict[str, Any]:
    """`openapi_extra` of a route. `events`: the operation streams too, and this is the JSON of one event. `more`:
    responses that are no errors, beside or instead of 200."""
    content: dict[str, Any] = {JSON: {"schema": answer}}
    if events is not None:
        content[EVENTS] = {"schema": {"type": "string"}, EVENT_SCHEMA: events}
    responses: dict[int, Any] = {200: {"description": "The answer.", "content": content}}
    responses |= {status: _error(status, error_schema) for status in (*ALWAYS, *errors)}
    responses |= more or {}
    extra: dict[str, Any] = {"responses": {str(status): responses[status] for status in sorted(responses)}}
    if body is not None:
        extra["requestBody"] = {"required": True, "content": {JSON: {"schema": body_schema(body)}}}
    if parameters:
        extra["parameters"] = list(parameters)
    return extra


def query_parameter(name: str, schema: Schema) -> dict[str, Any]:
    """An optional one, for `parameters`."""
    return {"name": name, "in": "query", "required": False, "schema": schema}


def body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """The schema of a body, without references."""
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(value: Any) -> Any:
        if isinstance(value, dict):
            reference = str(value.get("$ref", ""))
            if reference.startswith("#/$defs/"):
                return inlined(definitions[reference.removeprefix("#/$defs/")])
            return {key: inlined(member) for key, member in value.items()}
        return [inlined(member) for member in value] if isinstance(value, list) else value

    return dict(inlined(schema))


def _error(status: int, schema: Schema) -> dict[str, Any]:
    response: dict[str, Any] = {"description": ERRORS[status], "content": {JSON: {"schema": schema}}}
    if status in TRY_AGAIN:
        seconds = {"type": "integer", "minimum": 0}
        response["headers"] = {"Retry-After": {"description": "Seconds to wait.", "schema": seconds}}
    return response
