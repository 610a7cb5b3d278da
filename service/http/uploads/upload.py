"""From a request's body and query to images and fields. Content decides what a body is; three kinds of it are told by their type.

multipart/*                 parts that are images or fields: service/http/uploads/multipart.py
application/json, *+json    images in base64, and fields: service/http/uploads/image_json.py
any other type, or none     one image, as are the two above where they begin as an image does
"""

import asyncio
import re
from collections.abc import Collection, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import Request
from pydantic import ValidationError
from pydantic_core import from_json
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect

from models.images.formats import format_of
from service.errors import BadRequest, MissingFile, UnknownField, UnsupportedMediaType, ValidationFailed
from service.http.middleware import SMALL_BODY
from service.http.uploads import image_json
from service.http.uploads.body import BodyBuffer
from service.http.uploads.image_json import MAX_FIELD_BYTES
from service.http.uploads.multipart import Multipart, PartHead, Sink
from service.http.uploads.queries import PredictQuery, QueryT
from service.settings import Settings

T = TypeVar("T")

MAX_FIELDS, MAX_NAME = 16, 128
FORM = "application/x-www-form-urlencoded"


@dataclass(slots=True)
class Upload:
    """What arrived: the images in order, their names made printable (None for a raw body), and the fields as texts."""

    images: list[bytes]
    filenames: list[str | None]
    fields: dict[str, list[str]] = field(default_factory=dict)

    def query(self, kind: type[QueryT]) -> QueryT:
        """Validates the fields. Raises BadRequest where one that has a single value is repeated, ValidationFailed for a wrong value."""
        values: dict[str, str | list[str]] = {}
        for name, texts in self.fields.items():
            if kind is PredictQuery and name == "model":
                values[name] = texts
            elif len(texts) == 1:
                values[name] = texts[0]
            else:
                raise BadRequest(f"`{name}` was given {len(texts)} times; give it once", param=name)
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            raise ValidationFailed(f"`{first['loc'][0]}` {first['msg']}", param=str(first["loc"][0])) from None


async def read_upload(request: Request, settings: Settings, known: frozenset[str]) -> Upload:
    """Reads the body whole. `known` are the fields that the route has; any other is UnknownField."""
    headers = request.headers
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("compressed bodies are not read; send the image as it is, without Content-Encoding")
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind.startswith("multipart/"):
        upload = await _read_multipart(request, settings.max_files, known)
    else:
        upload = await _read_whole(kind, (await read_body(request)).take(), settings.max_files, known)
    if query := request.scope["query_string"]:
        _add_fields(upload, parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    for name in upload.fields:
        if name not in known:
            raise _unknown_field(name, known)
    return upload


async def _read_whole(kind: str, body: bytes, max_images: int, known: frozenset[str]) -> Upload:
    is_image = format_of(body) is not None
    if "json" in kind and not is_image:
        read = partial(image_json.read, body, known, max_images)
        images, names, fields = read() if len(body) <= SMALL_BODY else await run_in_threadpool(read)
        return Upload(images, [None if name is None else printable(name) for name in names], fields)
    if kind == FORM and is_image and len(body) > MAX_FIELD_BYTES and b"\r" not in body and b"\n" not in body:
        raise BadRequest("the image has lost its line ends, as with curl -d: send it with --data-binary")
    return Upload([body], [None])


def _unknown_field(name: str, known: Collection[str]) -> UnknownField:
    return UnknownField(f"there is no field of that name; there are {', '.join(sorted(known))}", param=printable(name))


async def read_body(request: Request) -> BodyBuffer:
    """Collects the body of a request; the middleware counts it. Raises ClientDisconnect, and what the middleware refuses it with."""
    body = BodyBuffer()
    try:
        async for chunk in request.stream():
            body.add(chunk)
    except BaseException:
        body.close()  # the traceback may live on, and the body with it
        raise
    return body


class _Form:
    """What the parts of a multipart body hold, in memory: the middleware bounds the bytes of all requests."""

    def __init__(self, max_files: int, known: Collection[str]) -> None:
        self._max_files, self._known = max_files, known
        self.images: list[tuple[PartHead, BodyBuffer]] = []
        self.fields: list[tuple[PartHead, bytearray]] = []

    def begin(self, part: PartHead) -> Sink:
        """Returns where the bytes of this part go."""
        if (name := part.name.removesuffix("[]")) in self._known:
            return self._field(name, part)
        if not part.is_file:
            raise _no_image(part, self._known)
        if len(self.images) == self._max_files:
            raise BadRequest(f"more than {self._max_files} images; IMAGO_MAX_FILES is the limit")
        self.images.append((part, body := BodyBuffer()))
        return body.add

    def _field(self, name: str, part: PartHead) -> Sink:
        if len(self.fields) == MAX_FIELDS:
            raise BadRequest(f"more than {MAX_FIELDS} fields in the form")
        self.fields.append((part, text := bytearray()))

        def add(data: bytes) -> None:
            if len(text) + len(data) > MAX_FIELD_BYTES:
                raise BadRequest(
                    f"the field `{name}` is longer than {MAX_FIELD_BYTES >> 10} KB; an image goes into a part `file`",
                    param=name,
                )
            text.extend(data)

        return add

    def close(self) -> None:
        for _, body in self.images:
            body.close()


def _no_image(part: PartHead, known: Collection[str]) -> UnknownField | BadRequest:
    if not part.name:
        return BadRequest("malformed multipart: a part has no name; an image is a part `file`")
    fields = ", ".join(sorted(known))
    return UnknownField(
        f"an image is a part `file`, or one of type image/*; fields are {fields}", param=printable(part.name)
    )


async def _read_multipart(request: Request, max_files: int, known: frozenset[str]) -> Upload:
    form, first = _Form(max_files, known), b""
    parser: Multipart | None = None
    try:
        async for chunk in request.stream():
            first = first or chunk[:512]
            parser = parser or Multipart(request.headers["content-type"], form.begin)
            parser.feed(chunk)
        if parser is not None:
            parser.end()
        chosen = [(part, body.take()) for part, body in form.images]
    except BadRequest as error:
        if format_of(first) is not None:
            raise BadRequest(
                f"the body is an image, not multipart: send it with Content-Type: application/octet-stream ({error})"
            ) from None
        raise
    finally:
        form.close()
    chosen = [(part, data) for part, data in chosen if data or part.filename != ""]  # a file input left empty
    upload = Upload(
        [data if part.encoding != "base64" else await _from_base64(data) for part, data in chosen],
        [None if part.filename is None else printable(part.filename) for part, _ in chosen],
    )
    for part, text in form.fields:
        _add_fields(upload, ((part.name.removesuffix("[]"), value) for value in _values(part, bytes(text))))
    if not upload.images:
        raise MissingFile("there is no image; send it in a part `file`: curl -F file=@photo.jpg", param="file")
    return upload


async def _from_base64(data: bytes) -> bytes:
    """A part with `Content-Transfer-Encoding: base64`, as clients built on mail libraries send it."""
    work = partial(image_json.decoded, data, 0, len(data), "file")
    return work() if len(data) <= SMALL_BODY else await run_in_threadpool(work)


def _values(part: PartHead, text: bytes) -> list[str]:
    """A field's text; of one that says it is JSON, the string, the number, or the list of them."""
    if "json" in part.kind:
        with suppress(ValueError):
            value = from_json(text)
            if isinstance(value, str) or (isinstance(value, list) and all(isinstance(each, str) for each in value)):
                return [value] if isinstance(value, str) else value
    return [text.decode("utf-8", "replace")]


def _add_fields(upload: Upload, pairs: Iterable[tuple[str, str]]) -> None:
    for name, value in pairs:
        upload.fields.setdefault(name, []).append(value)


def printable(name: str) -> str:
    """A name that a caller chose, fit to be shown: at most 128 printable characters, the last part of a path."""
    tail = re.split(r"[/\\]", name)[-1]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in tail[:MAX_NAME])


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, and cancels it when the client leaves; raises ClientDisconnect then. The body must have been read."""
    task = asyncio.current_task()
    if task is None:
        raise RuntimeError("a coroutine runs in a task")
    left = False

    async def watch() -> None:
        nonlocal left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if left and task.uncancel() == 0:
            raise ClientDisconnect from None
        raise
    finally:
        watcher.cancel()
