"""Assembles the service in `create_app`: settings, engine, store, routes, middleware."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import NoReturn

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from models.store.store import ModelStore
from service.datasets import Datasets
from service.errors import (
    BadRequest,
    Internal,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    ServiceError,
    UnknownField,
    ValidationFailed,
)
from service.http.auth import Keys, require_user
from service.http.middleware import Edge, Traffic, UserCORS
from service.http.uploads.upload import printable
from service.inference.engine import Engine
from service.inference.traces import Traces
from service.jobs import Jobs
from service.jobs.exports import Exports
from service.observability.metrics import Metrics
from service.oip.metadata import HEADER_LENGTH
from service.routes import datasets, finetune, models, oip, ops, page, predict
from service.routes.dependencies import State
from service.routes.shared_answers import Listings
from service.settings import Settings
from service.system.prefix import no_such_path

DESCRIPTION = (
    "Classify images with your own models. A failure is always `{error: {code, message, param, request_id}}`; "
    "under `/v2`, where clients of the Open Inference Protocol expect it so, `{error: message}`."
)


def create_app(
    settings: Settings,
    engine: Engine | None = None,
    store: ModelStore | None = None,
    metrics: Metrics | None = None,
    keys: Keys | None = None,
    traffic: Traffic | None = None,
    jobs: Jobs | None = None,
    traces: Traces | None = None,
) -> FastAPI:
    """Returns the ASGI application. Its lifespan starts and closes the engine. What is not given is made from the settings."""
    metrics = metrics or Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[State]:
        state = _state(settings, engine, store, metrics, keys, jobs)
        state["engine"].start()
        state["jobs"].start()
        await state["datasets"].start()
        await state["exports"].start()
        try:
            yield state
        finally:
            state["exports"].close()
            state["datasets"].close()
            await state["jobs"].close()
            state["engine"].close()

    app = FastAPI(
        title="Imago",
        version=version("imago"),
        description=DESCRIPTION,
        servers=[{"url": "."}],  # relative to the document: a proxy may serve it under a path of its own
        docs_url=None,  # the page's router has a viewer of our own, which asks no other host
        redoc_url=None,
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},  # asking whether it is on costs 15 us a request
        redirect_slashes=False,  # a redirect would be built from the Host header
        generate_unique_id_function=_operation_id,
        exception_handlers={HTTPException: _framework_error, RequestValidationError: _invalid_request},
    )
    user = [Depends(require_user)] if settings.api_key else []
    app.include_router(predict.router, dependencies=user)
    app.include_router(models.router, dependencies=user)
    app.include_router(models.admin_router)
    app.include_router(finetune.router)
    app.include_router(datasets.router)
    app.include_router(oip.infer_router, dependencies=user)
    app.include_router(oip.router, dependencies=user)
    app.include_router(oip.admin_router)
    app.include_router(oip.health_router)
    app.include_router(ops.router)
    app.include_router(page.router)
    app.mount("/web", page.PageFiles(directory=page.WEB))
    app.add_middleware(Edge, settings=settings, metrics=metrics, traffic=traffic or Traffic(), traces=traces)
    if settings.cors_origins:
        app.add_middleware(
            UserCORS,
            allow_origins=settings.cors_origins,
            allow_methods=("GET", "POST"),
            allow_headers=("Authorization", "Content-Type", "X-Request-ID", HEADER_LENGTH),
            expose_headers=("X-Request-ID", "Server-Timing", "Retry-After", HEADER_LENGTH),
        )
    return app


def _state(
    settings: Settings,
    engine: Engine | None,
    store: ModelStore | None,
    metrics: Metrics,
    keys: Keys | None,
    jobs: Jobs | None,
) -> State:
    store = store or ModelStore(settings.weights)
    engine = engine or Engine(settings, store, metrics)
    return State(
        settings=settings,
        engine=engine,
        store=store,
        metrics=metrics,
        keys=keys or Keys.of(settings),
        jobs=jobs or Jobs(settings, engine, store),
        datasets=Datasets(settings.datasets),
        exports=Exports(settings),
        listings=Listings(engine, metrics),
    )


def _operation_id(route: APIRoute) -> str:
    return route.name


# Errors of FastAPI and Starlette become errors of ours; the middleware answers them all.


async def _framework_error(request: Request, error: Exception) -> NoReturn:
    if not isinstance(error, HTTPException):
        raise TypeError("the handler is registered for HTTPException alone")
    raise _translate(error, request) from error


def _translate(error: HTTPException, request: Request) -> ServiceError:
    match error.status_code:
        case 404:
            prefix = request.scope.get(
                "app_root_path", request.scope["root_path"]
            )  # below a mount, `root_path` is the mount's
            return NotFound(no_such_path(request.scope["path"], prefix))
        case 405:
            allow = _allowed(request)
            return MethodNotAllowed(f"this path has no such method; it has {allow}", allow)
        case 413:
            return PayloadTooLarge("the request body is too large")
        case 400:
            return BadRequest("the request could not be read")
        case _:
            return Internal("internal error; the log has the details")


def _allowed(request: Request) -> str:
    """Returns every method that the path has; the framework names only those of its first route."""
    routes = (context.original_route for context in iter_route_contexts(request.app.routes))
    found = [r for r in routes if isinstance(r, Route) and r.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in found for method in route.methods or ()}))


async def _invalid_request(request: Request, error: Exception) -> NoReturn:
    """Returns the first of several complaints, without the input that it is about."""
    if not isinstance(error, RequestValidationError):
        raise TypeError("the handler is registered for RequestValidationError alone")
    first = error.errors()[0]
    param = printable(".".join(str(part) for part in first["loc"][1:])) or None
    match first["type"]:
        case "json_invalid":
            raise BadRequest("the body is not valid JSON") from None
        case "extra_forbidden":
            raise UnknownField("there is no field of that name", param=param) from None
        case "model_attributes_type" if param is None:  # or one that is not said to be JSON, and comes as bytes
            raise ValidationFailed("the body must be a JSON object, with Content-Type: application/json") from None
        case "model_type" | "model_attributes_type":
            raise ValidationFailed("must be a JSON object", param=param) from None
        case _:
            raise ValidationFailed(first["msg"], param=param) from None
