"""`/datasets`: what lies under the datasets folder, and how a zip gets there, for admins."""

import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Body, Depends, Query, Request, Response

from models.errors import NameConflict
from models.files.records import NAME_PATTERN
from service.datasets import Arrival, DatasetEntry
from service.errors import BadRequest, MissingFile, UnknownField, UnsupportedMediaType, ValidationFailed
from service.http.auth import AdminRoute, require_admin
from service.http.middleware import encode
from service.http.schemas import (
    BINARY,
    DATASET_EXAMPLE,
    DRY_RUN_EXAMPLE,
    ERROR_ANSWERS,
    DatasetList,
    DryRun,
    Validate,
    json_answer,
)
from service.http.uploads.multipart import Multipart, PartHead, Sink
from service.http.uploads.upload import while_connected
from service.routes.dependencies import DatasetsDep, JobsDep

router = APIRouter(
    tags=["datasets"], route_class=AdminRoute, dependencies=[Depends(require_admin)], responses=ERROR_ANSWERS
)

BLOCK_BYTES = 2**20  # written to the disk at once
ZIP_TYPES = (
    "application/zip",
    "application/x-zip-compressed",
    "application/x-zip",
    "multipart/x-zip",
    "application/octet-stream",
    "binary/octet-stream",
)
UPLOADED = {
    "requestBody": {
        "required": True,
        "description": "The zip as it is, sent as application/octet-stream or application/zip; or as a file",
        "content": {
            "application/octet-stream": {"schema": BINARY},
            "multipart/form-data": {
                "schema": {"type": "object", "properties": {"file": BINARY}, "required": ["file"]},
                "example": {"file": "<the bytes of bees.zip>"},
            },
        },
    }
}
KEPT = json_answer("The dataset", DATASET_EXAMPLE)
LISTED = json_answer("A page of datasets", {"object": "list", "data": [DATASET_EXAMPLE], "has_more": False})
FOUND = json_answer("What the trainer found", DRY_RUN_EXAMPLE)
ValidateBody = Annotated[Validate, Body(examples=[{"dataset": "hymenoptera.zip"}])]


@router.get("/datasets", summary="The datasets", responses={200: LISTED})
async def list_datasets(
    datasets: DatasetsDep,
    after: Annotated[str, Query(max_length=255, description="The last name of the page before")] = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> DatasetList:
    """What lies in the datasets folder itself, by name. Links are not shown, and not followed."""
    data, has_more = await datasets.page(after, limit)
    return DatasetList(data=data, has_more=has_more)


@router.post("/datasets", summary="Upload a dataset", status_code=201, responses={201: KEPT}, openapi_extra=UPLOADED)
async def upload_dataset(
    request: Request,
    datasets: DatasetsDep,
    jobs: JobsDep,
    name: Annotated[
        str | None, Query(pattern=NAME_PATTERN, description="By default that of the file, as far as it can be one")
    ] = None,
    replace: Annotated[bool, Query(description="Put it in the place of the one that is there")] = False,
) -> DatasetEntry:
    """A zip of class folders, as the body itself or as a multipart part `file`. It is there once it is whole and its table of contents
    was checked; `POST /datasets/validate` looks at the images."""
    _check_headers(request)
    if name is not None and not replace:  # said before gigabytes are sent, and looked at again after them
        await datasets.in_pool(datasets.check_name, _file_of(name))
    arrival = await datasets.receive(int(request.headers.get("content-length", "0")))
    try:
        filename = await _write(request, arrival, datasets.in_pool)
        file = _file_of(name or _name_from(filename))
        if replace and (job := await jobs.using(Path(file))):
            raise NameConflict(f"job {job} uses {file!r}; wait for it, cancel it, or take another name")
        return await datasets.in_pool(arrival.keep, file, replace)
    finally:
        await datasets.in_pool(arrival.close)


@router.post("/datasets/validate", summary="Audit a dataset", responses={200: FOUND}, response_model=DryRun)
async def validate_dataset(request: Request, jobs: JobsDep, body: ValidateBody) -> Any:
    """The audit of a dataset, the split and an estimate, as `POST /finetune?dry_run=true` gives them; it needs no name of a model."""
    found = await while_connected(request, jobs.dry_run(body))
    return Response(encode(found), media_type="application/json")


def _check_headers(request: Request) -> None:
    if request.headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("compressed bodies are not read; send the zip as it is, without Content-Encoding")
    if _kind(request) not in ZIP_TYPES and not _is_multipart(request):
        raise UnsupportedMediaType(
            "send a zip with Content-Type application/zip, or multipart/form-data with a `file` part"
        )


def _kind(request: Request) -> str:
    return request.headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()


def _is_multipart(request: Request) -> bool:
    return _kind(request).startswith("multipart/") and _kind(request) not in ZIP_TYPES


def _file_of(name: str) -> str:
    return name.removesuffix(".zip") + ".zip"


def _name_from(filename: str) -> str:
    """`C:\\\\photos\\\\My Bees.ZIP` -> `my-bees`. Raises ValidationFailed where nothing is left."""
    tail = re.split(r"[/\\]", filename)[-1].lower().removesuffix(".zip")
    name = re.sub(r"[^a-z0-9._-]+", "-", tail).strip("-._")[:60]
    if not name:
        raise ValidationFailed("give the dataset a name: `?name=bees`", param="name")
    return name


async def _write(request: Request, arrival: Arrival, in_pool: Callable[..., Any]) -> str:
    """Writes the zip as it arrives; -> the name of its file, empty where it has none."""
    if not _is_multipart(request):
        async for block in _blocks(request):
            await in_pool(arrival.write, block)
        return ""
    part = FilePart(request.headers["content-type"], arrival.write)
    async for block in _blocks(request):
        await in_pool(part.feed, block)
    return part.end()


async def _blocks(request: Request) -> AsyncIterator[bytes]:
    """The body in larger pieces than it arrives in: each costs a step to another thread."""
    block = bytearray()
    async for data in request.stream():
        block += data
        if len(block) >= BLOCK_BYTES:
            yield bytes(block)
            block.clear()
    yield bytes(block)


class FilePart:
    """Passes the one `file` part of a multipart body on as it arrives. The methods raise BadRequest, UnknownField and MissingFile."""

    def __init__(self, content_type: str, write: Sink) -> None:
        self._write = write
        self._part: PartHead | None = None
        self._parser = Multipart(content_type, self._begin)

    def feed(self, data: bytes) -> None:
        self._parser.feed(data)

    def end(self) -> str:
        """The name of the file, empty where it has none. Raises MissingFile where there was no file."""
        self._parser.end()
        if self._part is None:
            raise MissingFile("there is no `file` part; send one: curl -F file=@bees.zip", param="file")
        return self._part.filename or ""

    def _begin(self, part: PartHead) -> Sink:
        if not part.is_file and part.kind not in ZIP_TYPES:
            raise UnknownField("the body has one part, `file`; `name` and `replace` go into the query")
        if self._part is not None:
            raise BadRequest("there are two `file` parts; send one dataset at a time", param="file")
        self._part = part
        return self._write
