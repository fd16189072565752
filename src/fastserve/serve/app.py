"""The application: routes and what surrounds them, made for given models. Nothing here is global."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from collections.abc import Sequence as Seq
from contextlib import asynccontextmanager, suppress

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response

from fastserve._version import __version__
from fastserve.engine.energy import find_counters
from fastserve.errors import FastServeError, RequestError
from fastserve.serve.api_keys import ApiKeys
from fastserve.serve.body import BodyLimit
from fastserve.serve.drain import DrainGate
from fastserve.serve.energy import EnergyMeter
from fastserve.serve.errors import error_response, nothing_at, validation_error
from fastserve.serve.log import RequestLog
from fastserve.serve.model_entry import ServedModel
from fastserve.serve.model_table import ModelTable
from fastserve.serve.options import ServeOptions
from fastserve.serve.routes.admin import admin_router
from fastserve.serve.routes.admin_adapters import admin_adapters_router
from fastserve.serve.routes.admin_models import admin_models_router
from fastserve.serve.routes.answer import answer_router
from fastserve.serve.routes.chat_completions import chat_completions_router
from fastserve.serve.routes.classify import classify_router
from fastserve.serve.routes.completions import completions_router
from fastserve.serve.routes.dashboard import dashboard_router
from fastserve.serve.routes.embeddings import embeddings_router
from fastserve.serve.routes.health import health_router
from fastserve.serve.routes.messages import messages_router
from fastserve.serve.routes.models import models_router
from fastserve.serve.routes.openapi import add_openapi
from fastserve.serve.routes.responses import responses_router
from fastserve.serve.routes.score import score_router
from fastserve.serve.routes.tenants import tenants_router
from fastserve.serve.routes.tokenize import tokenize_router
from fastserve.serve.security import AdminGate, Security, check_exposure
from fastserve.serve.service import Service
from fastserve.serve.tenant_table import TenantTable
from fastserve.serve.tracing import Tracing
from fastserve.serve.watch import watch

ROUTERS = (
    models_router,
    chat_completions_router,
    completions_router,
    responses_router,
    messages_router,
    embeddings_router,
    score_router,
    classify_router,
    answer_router,
    tokenize_router,
    health_router,
    dashboard_router,
)
# Below /admin: Security asks for the admin key.
ADMIN_ROUTERS = (admin_router, admin_models_router, admin_adapters_router, tenants_router)


def create_app(
    models: Seq[ServedModel] | ModelTable,
    options: ServeOptions | None = None,
    *,
    keys: ApiKeys | None = None,
    tracing: Tracing | None = None,
) -> FastAPI:
    """The ASGI application that serves models. It owns them: they are closed when it ends.

    >>> app = create_app([AsyncLLM("smollm2-135m-instruct")])  # doctest: +SKIP

    Args:
        models: that are loaded, or a table that loads them.
        keys: who is let in; None: as the options and the environment say.
        tracing: makes spans, and is the application's own from here on; None: as the options say.

    Raises:
        OptionError: two models have one name, the key file is wrong, or others reach the server and nobody
            needs a key; or spans are asked for, and OpenTelemetry is not installed.
    """
    options = options or ServeOptions()
    keys = ApiKeys.load(options) if keys is None else keys
    check_exposure(options, keys)
    tenants = TenantTable(keys)
    if tracing is None and options.otel:
        tracing = Tracing.from_environment()
    table = models if isinstance(models, ModelTable) else ModelTable.of_loaded(models)
    service = Service.of(table, options, tenants, EnergyMeter(find_counters()))
    table.memory.on_load(tenants.tell_weights_to)
    tenants.on_new_admin_key(service.snapshots.dismiss)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await tenants.tell_weights(service.models.generators)
        watching = asyncio.create_task(watch(tenants, service.models, service.energy))
        yield
        watching.cancel()
        with suppress(asyncio.CancelledError):
            await watching
        await service.models.close()
        if tracing is not None:
            await asyncio.to_thread(tracing.close)

    app = FastAPI(
        title="FastServe",
        version=__version__,
        lifespan=lifespan,
        openapi_url=None,  # see add_openapi; FastAPI's pages for it have scripts from elsewhere
        redirect_slashes=False,
    )
    app.state.service = service
    for make_router in ROUTERS:
        app.include_router(make_router(service))
    public = list(app.routes)
    if keys.has_admin_key:
        for make_router in ADMIN_ROUTERS:
            app.include_router(make_router(service))
    add_openapi(app, public)
    app.add_exception_handler(FastServeError, _refuse)
    app.add_exception_handler(RequestValidationError, _refuse_body)
    app.add_exception_handler(HTTPException, _refuse_route)
    # The last one is the outermost.
    app.add_middleware(AdminGate)
    app.add_middleware(BodyLimit, options=options)
    app.add_middleware(DrainGate, drain=service.drain)
    app.add_middleware(Security, options=options, tenants=tenants)
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(options.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["*"],  # official clients say much of themselves
            expose_headers=["retry-after", "x-request-id"],
        )
    app.add_middleware(RequestLog, metrics=service.metrics, tracing=tracing)
    return app


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, FastServeError)
    return error_response(error)


async def _refuse_body(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(validation_error(error.errors(), error.body))


async def _refuse_route(request: Request, error: Exception) -> Response:
    """What the router refuses: no such address, or not with this method; and bodies that are no JSON."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path[:100], request.method
    if error.status_code == 404:
        return error_response(nothing_at(path))
    messages = {
        400: ("the body cannot be read as JSON", "invalid_json"),
        405: (f"{path} is not there for {method}", "method_not_allowed"),
    }
    message, code = messages.get(error.status_code, (str(error.detail), "invalid_request"))
    response = error_response(RequestError(message, status=error.status_code, code=code))
    response.headers.update(error.headers or {})
    return response
