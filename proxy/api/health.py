"""GET /health (the process lives), /ready (a request would be served), /version, /load, /metrics."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from mesh import __version__
from proxy.api.door import Door
from proxy.api.service import Service
from proxy.metrics import CLASSIC_TYPE


def health_router(service: Service, door: Door, metrics_text: Callable[[], bytes] | None) -> APIRouter:
    router = APIRouter()

    @router.get("/health")
    async def health() -> Response:
        """200 while the process answers; says nothing of workers, so a restart on it is never wrong."""
        return JSONResponse({"status": "ok"})

    @router.get("/ready")
    async def ready() -> Response:
        """200 when a request sent now would find workers, else 503."""
        if door.draining:
            return JSONResponse({"status": "draining"}, status_code=503)
        if not service.dispatcher.ready:
            return JSONResponse({"status": "no workers"}, status_code=503)
        return JSONResponse({"status": "ready"})

    @router.get("/version")
    async def version() -> Response:
        return JSONResponse({"version": __version__})

    @router.get("/load")
    async def load() -> Response:
        """How many requests that make work are inside now."""
        return JSONResponse({"server_load": door.in_flight})

    @router.get("/metrics")
    async def metrics(request: Request) -> Response:
        """Prometheus' text format; OpenMetrics when the scraper prefers it and no foreign text is added."""
        if metrics_text is not None:
            text, _ = service.metrics.render("")
            return Response(text + metrics_text(), headers={"content-type": CLASSIC_TYPE})
        text, content_type = service.metrics.render(request.headers.get("accept", ""))
        return Response(text, headers={"content-type": content_type})

    return router
