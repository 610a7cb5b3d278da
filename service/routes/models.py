"""`/models`: what is served, for users; what the store holds and which version serves, for admins."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import AfterValidator
from starlette.concurrency import run_in_threadpool

from models.architectures import licences
from models.classifier import ModelConfig
from models.errors import ModelError, ModelNotFound
from models.files.records import NAME_PATTERN
from models.store.export.files import ExportFormat
from models.store.store import ModelStore
from service.errors import ServiceError
from service.http.auth import AdminRoute, require_admin
from service.http.schemas import (
    BINARY,
    ERROR_ANSWERS,
    MODEL_EXAMPLE,
    VERSION_EXAMPLE,
    Activate,
    ModelList,
    Pull,
    VersionList,
    VersionStatus,
    json_answer,
)
from service.http.uploads.upload import while_connected
from service.inference.engine import Engine
from service.inference.registry.loader import ModelStatus
from service.routes.dependencies import EngineDep, ExportsDep, ListingsDep, RegistryDep, StoreDep

router = APIRouter(tags=["models"], responses=ERROR_ANSWERS)
admin_router = APIRouter(
    tags=["models: admin"], route_class=AdminRoute, dependencies=[Depends(require_admin)], responses=ERROR_ANSWERS
)


def _possible(name: str) -> str:
    """A name that no model can have is one that is not there."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ModelNotFound("no model has such a name; GET /models lists those that are served")
    return name


Name = Annotated[str, AfterValidator(_possible), Path(description="A model's name", examples=["cifar10"])]
VersionPath = Annotated[int, Path(ge=1, description="A version of it", examples=[1])]

LISTED = json_answer(
    "The models", {"models": [MODEL_EXAMPLE], "devices": {"cuda:0": "works"}, "device_note": None, "has_more": False}
)
SHOWN = json_answer("The model", MODEL_EXAMPLE)
VERSIONS = json_answer("Its versions", {"versions": [VERSION_EXAMPLE]})

PULL_S = 0.25  # how often a download tells how far it is
UNCACHED = {"Cache-Control": "no-store"}
_pulls: set[asyncio.Task[ModelConfig]] = set()  # nobody else holds a task whose client has left


@router.get("/models", summary="What is served", responses={200: LISTED}, response_model=ModelList)
async def list_models(
    listings: ListingsDep,
    after: Annotated[str, Query(max_length=64, description="The last name of the page before")] = "",
    limit: Annotated[int | None, Query(ge=1, le=1000, description="Models per page; by default all")] = None,
) -> Response:
    """Every model that serves, is being loaded, or failed to load, with its classes, backbones and figures, by name."""
    return Response(await listings.models(after, limit), media_type="application/json")


@router.get("/models/{name}", summary="One served model", responses={200: SHOWN})
async def show_model(name: Name, registry: RegistryDep) -> ModelStatus:
    return registry.model(name)


@admin_router.post(
    "/models/sync", summary="Make what serves equal to the store", responses={200: LISTED}, response_model=ModelList
)
async def sync_models(registry: RegistryDep, listings: ListingsDep) -> Response:
    """Loads what is new in the store beside what serves, and swaps. What fails to load shows its error, and its old version serves on."""
    await registry.sync()
    return Response(await listings.models(), media_type="application/json")


PULLED: dict[str, Any] = {
    "description": "How far it is, and how it ended",
    "content": {
        "text/event-stream": {
            "schema": {"type": "string"},
            "example": 'data: {"bytes": 1048576, "total": 102530333}\n\n',
        }
    },
}


@admin_router.post(
    "/models/pull",
    summary="Download published weights",
    response_class=StreamingResponse,
    responses={200: PULLED},
)
async def pull_model(body: Pull, engine: EngineDep, store: StoreDep) -> EventSourceResponse:
    """Server-sent events: `{bytes, total}` of the file that arrives, then `event: end` with `{model, version}`, which serves now unless
    another version of its name did, and `warnings` where its licence is unknown or restricts use; or `event: error` with
    `{code, message}`. The download goes on where the client leaves."""
    await run_in_threadpool(_check_published, body.name)
    await run_in_threadpool(store.check_writable)
    return EventSourceResponse(pulling(engine, body.name, body.model), headers=UNCACHED)


def _check_published(name: str) -> None:
    from models.store.pull import check

    check(name)


async def pulling(engine: Engine, name: str, as_name: str | None = None) -> AsyncIterator[bytes]:
    far: dict[str, int | None] = {"bytes": 0, "total": None}

    def hear(done: int, total: int | None) -> None:  # in the thread that downloads
        far.update(bytes=done, total=total)

    task = asyncio.create_task(engine.registry.pull(name, hear, as_name))
    _pulls.add(task)
    task.add_done_callback(_pulls.discard)
    while not task.done() and not engine.draining:
        await asyncio.wait([task], timeout=PULL_S)
        yield format_sse_event(data_str=json.dumps(far))
    if task.done():
        yield _outcome(task)


def _outcome(task: asyncio.Task[ModelConfig]) -> bytes:
    try:
        config = task.result()
    except (ModelError, ServiceError) as error:
        return format_sse_event(event="error", data_str=json.dumps({"code": error.code, "message": str(error)}))
    end = {"model": config.name, "version": config.version}
    if warnings := licences.warnings_of(config.lineage):
        end["warnings"] = warnings
    return format_sse_event(event="end", data_str=json.dumps(end))


@admin_router.get("/models/{name}/versions", summary="A model's versions in the store", responses={200: VERSIONS})
async def list_versions(name: Name, store: StoreDep) -> VersionList:
    """With the figures that each was published with."""
    return await run_in_threadpool(_versions, store, name)


def _versions(store: ModelStore, name: str) -> VersionList:
    serving, numbers = store.serving(), store.versions(name)
    if not numbers:
        raise ModelNotFound(f"the store has no model {name!r}")
    states = {serving.previous.get(name): "previous", serving.models.get(name): "serving"}
    found = [_version(store, name, number, states.get(number, "stored")) for number in reversed(numbers)]
    return VersionList(versions=found)


def _version(store: ModelStore, name: str, number: int, state: Any) -> VersionStatus:
    try:
        config = store.config(name, number)
    except ModelError as error:
        return VersionStatus(version=number, state=state, error=str(error))
    return VersionStatus(
        version=number,
        state=state,
        created_at=config.created_at,
        classes=len(config.classes),
        backbones=[ref.key for ref in config.backbones],
        metrics=config.metrics,
        command=config.lineage.get("command"),
    )


EXPORTED: dict[str, Any] = {
    "description": "A zip, as an attachment",
    "content": {"application/octet-stream": {"schema": BINARY}},  # generated clients read no application/zip
    "headers": {
        "X-Licence-Warning": {
            "description": "Where a licence of the weights is unknown or not free",
            "schema": {"type": "string"},
        }
    },
}


@admin_router.get(
    "/models/{name}/versions/{version}/export",
    summary="Export a version",
    response_class=StreamingResponse,
    responses={200: EXPORTED},
)
async def export_version(
    request: Request,
    name: Name,
    version: VersionPath,
    store: StoreDep,
    exports: ExportsDep,
    format: Annotated[
        ExportFormat, Query(description="onnx with predict.py, openvino, or store: for another Imago")
    ] = "onnx",
) -> StreamingResponse:
    """Converts the version in a process of its own, which takes seconds, and answers with the zip. 503 while another is exported."""
    config = await run_in_threadpool(store.config, name, version)
    made = await while_connected(request, exports.make(config, format))
    headers = UNCACHED | {
        "Content-Disposition": f'attachment; filename="{made.filename}"',
        "Content-Length": str(made.size),
    }
    if made.warnings:
        headers["X-Licence-Warning"] = "; ".join(made.warnings).encode("ascii", "replace").decode()
    return StreamingResponse(made.blocks(), media_type="application/octet-stream", headers=headers)


@admin_router.post("/models/{name}/activate", summary="Serve a version", responses={200: SHOWN})
async def activate_model(name: Name, body: Activate, registry: RegistryDep) -> ModelStatus:
    """Loads the version beside the one that serves, tries it, and swaps; requests under way keep theirs. 422 if it cannot be loaded."""
    return await registry.activate(name, body.version)


@admin_router.post("/models/{name}/rollback", summary="Serve the version before", responses={200: SHOWN})
async def roll_back_model(name: Name, registry: RegistryDep) -> ModelStatus:
    """Swaps back to the version that served before this one. 409 if there is none."""
    return await registry.rollback(name)


@admin_router.delete("/models/{name}", summary="Remove a model", status_code=204)
async def remove_model(name: Name, registry: RegistryDep, store: StoreDep) -> None:
    """Removes every version, and the backbones that no other model stands on. Requests under way are still answered. 409 where a setting
    names it."""
    await registry.check_removable(name)
    await run_in_threadpool(store.remove, name)
    await registry.sync()


@admin_router.delete("/models/{name}/versions/{version}", summary="Remove a version", status_code=204)
async def remove_version(name: Name, version: VersionPath, registry: RegistryDep, store: StoreDep) -> None:
    """409 if it serves."""
    await run_in_threadpool(store.remove, name, version)
    await registry.sync()
