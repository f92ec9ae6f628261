"""GET /v1/models and /v1/models/{id}."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from proxy.api.service import Service


def models_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def list_models() -> dict[str, Any]:
        """The served model under each of its names."""
        return {"object": "list", "data": [model_card(service, name) for name in service.model_names]}

    # Model names may have slashes.
    @router.get("/v1/models/{model_id:path}")
    async def retrieve_model(model_id: str) -> dict[str, Any]:
        """One model; 404 `model_not_found` for any other name."""
        service.check_model(model_id)
        return model_card(service, model_id)

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
