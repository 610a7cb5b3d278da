"""`/v2`: the Open Inference Protocol (KServe, Triton), so that its clients work as they are. A failure is `{"error": "..."}` here."""

import re
from collections.abc import Sequence
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Body, Depends, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from torch import Tensor

from models.classifier import ModelConfig
from models.errors import ModelNotFound
from models.store.store import ModelStore
from service.errors import BadRequest
from service.http import compression
from service.http.auth import AdminRoute, UserRoute, client_of, require_admin
from service.http.middleware import encode_each
from service.http.schemas import json_answer
from service.http.uploads.upload import read_body, while_connected
from service.inference.decoding import Image
from service.inference.registry.loader import Served
from service.inference.registry.registry import Registry
from service.inference.results import ModelResults, PredictOptions
from service.oip import metadata as documents
from service.oip.metadata import Document
from service.oip.tensors import Inference, fitted, parse, reply
from service.routes import ops
from service.routes.dependencies import EngineDep, ListingsDep, RegistryDep, State, StoreDep
from service.routes.models import Name

INLINE_BYTES, INLINE_SCORES = (
    2**16,
    10_000,
)  # of request and answer: what takes the event loop a few ms; more goes to a thread

infer_router = APIRouter(tags=["Open Inference Protocol"], route_class=UserRoute)
router = APIRouter(tags=["Open Inference Protocol"], responses=documents.V2_ERRORS)
health_router = APIRouter(tags=["Open Inference Protocol"], responses=documents.V2_ERRORS)
admin_router = APIRouter(
    prefix="/v2/repository",
    tags=["Open Inference Protocol: admin"],
    route_class=AdminRoute,
    dependencies=[Depends(require_admin)],
    responses=documents.V2_ERRORS,
    strict_content_type=False,  # tritonclient names none
)

EMPTY: dict[int | str, Document] = {
    200: {
        "description": "Done; the body is empty",
        "content": {"text/plain": {"schema": {"type": "string"}, "example": ""}},
    }
}


async def _served(request: Request, name: Name, registry: RegistryDep) -> Served:
    """The model of the path; a version in the path has to be the one that serves."""
    version: str | None = request.path_params.get("version")
    if version is None:
        return registry.bind(name)
    if not re.fullmatch(r"[1-9][0-9]{0,8}", version):
        raise ModelNotFound("a version is a whole number from 1")
    return registry.bind(name, int(version))


ServedDep = Annotated[Served, Depends(_served)]


# Inference


@infer_router.post(
    "/v2/models/{name}/infer",
    summary="Classify pixels or encoded images",
    response_class=Response,
    responses=documents.INFER_RESPONSES,
    openapi_extra=documents.infer_request(documents.NAME_PARAMETER),
    name="v2_infer",
)
@infer_router.post(
    "/v2/models/{name}/versions/{version}/infer",
    summary="Classify by a named version",
    response_class=Response,
    responses=documents.INFER_RESPONSES,
    openapi_extra=documents.infer_request(documents.NAME_PARAMETER, documents.VERSION_PARAMETER),
    name="v2_infer_version",
)
async def infer(request: Request) -> Response:
    """UINT8 pixels, FP32 normalised pixels or BYTES (encoded images) in, probabilities or the best classes out, as JSON or binary. All
    images are answered, or none: the error names the first that failed."""
    state: State = request.scope["state"]
    served = await _served(request, request.path_params["name"], state["engine"].registry)
    inference = await _read(request, state["settings"].max_files)
    images = _images(inference, served)
    state["exchange"].images, state["exchange"].models = len(images), [f"{served.config.name}@{served.config.version}"]
    options = PredictOptions(
        timeout_ms=inference.timeout_ms,
        head_start_s=documents.HEAD_START_S.get(inference.priority, 0.0),
        client=client_of(request),
    )
    answer = await while_connected(request, state["engine"].infer(images, served, options))
    return await _respond(request, inference, served.config, answer)


async def _read(request: Request, max_images: int) -> Inference:
    text = request.headers.get(documents.HEADER_LENGTH)
    if text is not None and not re.fullmatch(r"[0-9]{1,10}", text):
        raise BadRequest(f"{documents.HEADER_LENGTH} must be a whole number")
    body = (await read_body(request)).take_array()
    work = partial(parse, body, None if text is None else int(text), max_images)
    return work() if len(body) <= INLINE_BYTES else await run_in_threadpool(work)


def _images(inference: Inference, served: Served) -> Sequence[Image]:
    if isinstance(inference.images, list):
        return inference.images
    if served.input is None:
        raise BadRequest("the networks of this model want different pixels; send encoded images, as BYTES")
    return fitted(inference.images, served.input)


async def _respond(
    request: Request, inference: Inference, config: ModelConfig, answer: ModelResults[Tensor]
) -> Response:
    probabilities = answer.stacked()
    encoding = compression.accepted(request.headers.get("accept-encoding", ""))
    headers = {"Server-Timing": answer.timings.header}
    work = partial(_response, inference, config, probabilities, headers, encoding)
    return work() if probabilities.numel() <= INLINE_SCORES else await run_in_threadpool(work)


def _response(
    inference: Inference, config: ModelConfig, probabilities: Tensor, headers: dict[str, str], encoding: str | None
) -> Response:
    answer = reply(inference, config, probabilities)
    body, kind = answer.body, "application/json"
    if answer.header_length is not None:
        headers[documents.HEADER_LENGTH], kind = str(answer.header_length), "application/octet-stream"
    if encoding is not None and len(body) >= compression.WORTH_IT:
        body, headers["Content-Encoding"] = compression.compressed(body, encoding), encoding
    return Response(body, media_type=kind, headers=headers)


# What there is

OF_VERSION = {"parameters": [documents.VERSION_PARAMETER]}


@router.get("/v2", summary="The server", responses={200: json_answer("Name, version, extensions", documents.server())})
async def v2_server() -> Document:
    return documents.server()


STATISTICS = json_answer("Counts, and cumulative nanoseconds", documents.STATISTICS_EXAMPLE)


@router.get(
    "/v2/models/stats", summary="Statistics of all models", responses={200: STATISTICS}, response_model=Document
)
async def v2_all_statistics(listings: ListingsDep) -> Response:
    """Of every model that serves, by whichever route it was asked, since it was loaded."""
    return Response(await listings.statistics.get(), media_type="application/json")


@router.get(
    "/v2/models/{name}/stats",
    summary="Statistics of a model",
    responses={200: STATISTICS},
    name="v2_statistics",
)
@router.get(
    "/v2/models/{name}/versions/{version}/stats",
    summary="Statistics of a version",
    responses={200: STATISTICS},
    name="v2_version_statistics",
    openapi_extra=OF_VERSION,
)
async def statistics(served: ServedDep) -> Document:
    return documents.statistics([served])


METADATA = json_answer("Inputs and outputs; `parameters` say what else an input may be", documents.METADATA_EXAMPLE)


@router.get("/v2/models/{name}", summary="A model's tensors", responses={200: METADATA}, name="v2_metadata")
@router.get(
    "/v2/models/{name}/versions/{version}",
    summary="A version's tensors",
    responses={200: METADATA},
    name="v2_version_metadata",
    openapi_extra=OF_VERSION,
)
async def metadata(served: ServedDep) -> Document:
    return documents.metadata(served)


CONFIG = json_answer("As Triton writes it", documents.CONFIG_EXAMPLE)


@router.get("/v2/models/{name}/config", summary="A model's configuration", responses={200: CONFIG}, name="v2_config")
@router.get(
    "/v2/models/{name}/versions/{version}/config",
    summary="A version's configuration",
    responses={200: CONFIG},
    name="v2_version_config",
    openapi_extra=OF_VERSION,
)
async def config(request: Request, served: ServedDep) -> Document:
    return documents.config(served, request.scope["state"]["settings"].max_files)


READY = json_answer("It is", {"name": "cifar10", "ready": True})


@router.get("/v2/models/{name}/ready", summary="Is a model ready?", responses={200: READY}, name="v2_model_ready")
@router.get(
    "/v2/models/{name}/versions/{version}/ready",
    summary="Is a version ready?",
    responses={200: READY},
    name="v2_version_ready",
    openapi_extra=OF_VERSION,
)
async def model_ready(served: ServedDep) -> Document:
    """503 while it is being loaded, 404 where it is not served."""
    return {"name": served.config.name, "ready": True}


@health_router.get(
    "/v2/health/live", summary="Is the process sound?", responses={200: json_answer("It is", {"live": True})}
)
async def v2_live(engine: EngineDep) -> Document:
    await ops.live(engine)
    return {"live": True}


@health_router.get(
    "/v2/health/ready", summary="Can it answer?", responses={200: json_answer("It can", {"ready": True})}
)
async def v2_ready(engine: EngineDep) -> Document:
    await ops.ready(engine)
    return {"ready": True}


# The store, for admins


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class Index(_Strict):
    ready: bool = Field(False, description="Only what serves")


class LoadParameters(_Strict):
    """None: a model's files and its configuration are in the store."""


class LoadRequest(_Strict):
    parameters: LoadParameters = LoadParameters()


class UnloadParameters(_Strict):
    unload_dependents: bool = Field(
        False, description="Nothing depends on a model: backbones go when nobody stands on them"
    )


class Unload(_Strict):
    parameters: UnloadParameters = UnloadParameters()


@admin_router.post(
    "/index",
    summary="Every version in the store",
    responses={200: json_answer("The versions", documents.INDEX_EXAMPLE)},
    response_model=list[Document],
)
async def v2_index(
    registry: RegistryDep, store: StoreDep, body: Annotated[Index | None, Body(examples=[{"ready": True}])] = None
) -> Response:
    index = await run_in_threadpool(_index, registry, store, body is not None and body.ready)
    return Response(index, media_type="application/json")


def _index(registry: Registry, store: ModelStore, only_ready: bool) -> bytes:
    stored = [(name, version) for name in store.names() for version in store.versions(name)]
    return encode_each(documents.index(stored, registry.models(), only_ready))


@admin_router.post(
    "/models/{name}/load", summary="Serve a model of the store", response_class=PlainTextResponse, responses=EMPTY
)
async def v2_load(
    name: Name,
    registry: RegistryDep,
    store: StoreDep,
    body: Annotated[LoadRequest | None, Body(examples=[{"parameters": {}}])] = None,
) -> Response:
    """Loads the version that the store says is served, else the latest, beside the one that serves, tries it, and swaps."""
    await registry.activate(name, await run_in_threadpool(_to_serve, store, name))
    return PlainTextResponse("")


def _to_serve(store: ModelStore, name: str) -> int:
    return store.serving().models.get(name) or store.config(name).version


@admin_router.post(
    "/models/{name}/unload", summary="Take a model out of service", response_class=PlainTextResponse, responses=EMPTY
)
async def v2_unload(
    name: Name,
    registry: RegistryDep,
    body: Annotated[Unload | None, Body(examples=[{"parameters": {"unload_dependents": False}}])] = None,
) -> Response:
    """Its versions stay in the store; requests under way are still answered. 409 where a setting names it."""
    await registry.retire(name)
    return PlainTextResponse("")
