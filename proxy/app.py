"""The proxy's HTTP application, assembled."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.responses import Response

from mesh import __version__
from mesh.apikeys import read_keys
from mesh.errors import EXIT_USAGE, StartupError
from mesh.settings import ProxySettings
from mesh.tokenizer import Tokenizer
from proxy.api.anthropic import anthropic_router
from proxy.api.chat import chat_router
from proxy.api.completions import completions_router
from proxy.api.door import Door
from proxy.api.errors import install_error_handlers
from proxy.api.health import health_router
from proxy.api.keys import Keys
from proxy.api.middleware import Admission, BodyLimit, Edge
from proxy.api.models import models_router
from proxy.api.responses import responses_router
from proxy.api.responses_store import MemoryStore, ResponseStore
from proxy.api.service import Service, unix_now
from proxy.api.tenants import Tenant, read_tenants
from proxy.api.tokenize import tokenize_router
from proxy.generation import Dispatcher
from proxy.grammars import GrammarCheck
from proxy.metrics import ProxyMetrics
from proxy.text.reasoning import reasoning_format
from proxy.text.toolformats import tool_format

KEEP_ALIVE_S = 15.0
"""Load balancers cut connections that are silent for a minute, some for 30 s."""


def create_app(
    dispatcher: Dispatcher,
    tokenizer: Tokenizer,
    settings: ProxySettings,
    model_name: str,
    *,
    aliases: Sequence[str] = (),
    metrics: ProxyMetrics | None = None,
    metrics_text: Callable[[], bytes] | None = None,
    door: Door | None = None,
    responses: ResponseStore | None = None,
    keep_alive_s: float = KEEP_ALIVE_S,
) -> FastAPI:
    """The application that serves `dispatcher`'s workers as `model_name`, and under its `aliases`.

    `responses` keeps the answers of /v1/responses; the caller closes it.

    `metrics.registry` takes what other parts of the proxy measure; `metrics_text` adds text in Prometheus' classic
    format instead. `door` is how a shutdown is announced: the caller keeps it, sets `door.draining` and waits for
    `door.in_flight`. Raises `StartupError` for a `--reasoning-parser` or `--tool-call-parser` that is not
    known, and for an `--api-key-file` or `--tenants` file that is not what it should be.
    """
    metrics = metrics or ProxyMetrics(model_name)
    door = door or Door(settings.max_concurrent_requests)
    service = Service(
        dispatcher,
        tokenizer,
        settings,
        model_name,
        metrics,
        keep_alive_s,
        unix_now(),
        GrammarCheck(tokenizer),
        (model_name, *aliases),
        reasoning_format(settings.reasoning_parser, tokenizer),
        tool_format(settings.tool_call_parser, tokenizer),
    )
    app = FastAPI(
        title="kvmesh",
        version=__version__,
        # The interactive pages load scripts from elsewhere.
        docs_url=None,
        redoc_url=None,
        # The routes declare their answers, and /openapi.json is one of them.
        openapi_url=None,
        default_response_class=Response,
        middleware=[
            Middleware(Edge, metrics=metrics),
            Middleware(Keys, known=_tenants(settings, service.model_names)),
            Middleware(Admission, door=door, metrics=metrics),
            Middleware(BodyLimit, limit=settings.max_body_bytes),
        ],
    )
    install_error_handlers(app)
    for router in (
        chat_router(service),
        completions_router(service),
        responses_router(service, responses or MemoryStore(settings.response_ttl), door),
        anthropic_router(service),
        tokenize_router(service),
        models_router(service),
        health_router(service, door, metrics_text),
    ):
        app.include_router(router)
    return app


def _tenants(settings: ProxySettings, served: Sequence[str]) -> Sequence[Tenant]:
    if settings.tenants and settings.api_key_file:
        raise StartupError("--tenants and --api-key-file exclude each other: a tenant has its own keys.", EXIT_USAGE)
    if settings.tenants:
        return read_tenants(settings.tenants, served)
    return [Tenant(keys=read_keys(settings.api_key_file))] if settings.api_key_file else []
