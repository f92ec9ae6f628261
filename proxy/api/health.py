"""GET /health (the process lives), /ready (a request would be served), /version, /load, /openapi.json, /metrics."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Request
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST as OPENMETRICS_TYPE
from starlette.responses import JSONResponse, Response

from mesh import __version__
from proxy.api.answer_schemas import DESCRIPTION, LOAD, STATUS, STRING, VERSION
from proxy.api.door import Door
from proxy.api.openapi import JSON, operation
from proxy.api.service import Service
from proxy.metrics import CLASSIC_TYPE

NOT_READY = {503: {"description": "It would find none now.", "content": {JSON: {"schema": STATUS}}}}
METRICS = {
    200: {
        "description": "All metrics.",
        "content": {kind: {"schema": STRING} for kind in (CLASSIC_TYPE, OPENMETRICS_TYPE)},
    }
}


def health_router(service: Service, door: Door, metrics_text: Callable[[], bytes] | None) -> APIRouter:
    router = APIRouter()

    @router.get("/health", openapi_extra=operation(answer=STATUS))
    async def health() -> Response:
        """200 while the process answers; says nothing of workers, so a restart on it is never wrong."""
        return JSONResponse({"status": "ok"})

    @router.get("/ready", openapi_extra=operation(answer=STATUS, more=NOT_READY))
    async def ready() -> Response:
        """200 when a request sent now would find workers, else 503."""
        if door.draining:
            return JSONResponse({"status": "draining"}, status_code=503)
        if not service.dispatcher.ready:
            return JSONResponse({"status": "no workers"}, status_code=503)
        return JSONResponse({"status": "ready"})

    @router.get("/version", openapi_extra=operation(answer=VERSION))
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @router.get("/load", openapi_extra=operation(answer=LOAD))
    async def load() -> Response:
        """How many requests that make work are inside now."""
        return JSONResponse({"server_load": door.in_flight})

    @router.get("/openapi.json", openapi_extra=operation(answer=DESCRIPTION))
    async def openapi(request: Request) -> Response:
        """This description."""
        return JSONResponse(request.app.openapi())

    @router.get("/metrics", openapi_extra=operation(answer=STRING, more=METRICS))
    async def metrics(request: Request) -> Response:
        """Prometheus' text format; OpenMetrics when the scraper prefers it and no foreign text is added."""
        if metrics_text is not None:
            text, _ = service.metrics.render("")
            return Response(text + metrics_text(), headers={"content-type": CLASSIC_TYPE})
        text, content_type = service.metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    return router
