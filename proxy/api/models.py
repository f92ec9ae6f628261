"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from proxy.api.answer_schemas import MODEL, MODELS, STRING
from proxy.api.frames import json_response
from proxy.api.openapi import operation
from proxy.api.service import Service
from proxy.api.tenants import current

ONE_MODEL = operation(
    answer=MODEL, errors=[403, 404], parameters=[{"name": "model_id", "in": "path", "required": True, "schema": STRING}]
)


def models_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", openapi_extra=operation(answer=MODELS))
    async def list_models() -> Response:
        """The served model under each of its names that the key may use."""
        tenant = current.get()
        cards = [model_card(service, name) for name in service.model_names if tenant.may_use(name)]
        return json_response({"object": "list", "data": cards})

    # Model names may have slashes.
    @router.get("/v1/models/{model_id:path}", openapi_extra=ONE_MODEL)
    async def retrieve_model(request: Request) -> Response:
        """One model; 404 `model_not_found` for any other name, 403 for one that the key may not use."""
        name = request.path_params["model_id"]
        service.check_model(name)
        return json_response(model_card(service, name))

    return router


def model_card(service: Service, name: str) -> dict[str, Any]:
    """OpenAI's fields and those that serving tools read. `root` is the model's own name; `max_model_len` is null until
    a worker registered."""
    facts = service.dispatcher.model
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "kvmesh",
        "root": service.model_name,
        "parent": None,
        "max_model_len": None if facts is None else facts.max_model_len,
        "permission": [],
    }
