"""From a request's body and query to images and fields: a raw image, or multipart with `file` parts."""

import asyncio
import re
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import parse_qsl

from fastapi import Request
from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect

from service.body import Body
from service.errors import BadRequest, MissingFile, UnknownField, UnsupportedMediaType, ValidationFailed
from service.settings import Settings

T = TypeVar("T")

MAX_FIELDS, MAX_FIELD_BYTES, MAX_NAME = 16, 4096, 128
WHAT_TO_SEND = (
    "send an image with Content-Type image/* or application/octet-stream, or multipart/form-data with `file` parts"
)


@dataclass(slots=True)
class Upload:
    """What arrived: the images in order, their names made printable (None for a raw body), and the fields as texts."""

    images: list[bytes]
    filenames: list[str | None]
    fields: dict[str, list[str]] = field(default_factory=dict)

    def one(self, name: str) -> str | None:
        """A scalar field; raises BadRequest where it is repeated."""
        values = self.fields.get(name, ())
        if len(values) > 1:
            raise BadRequest(f"`{name}` was given {len(values)} times; give it once", param=name)
        return values[0] if values else None

    def whole_number(self, name: str, most: int = 9_999_999) -> int | None:
        """A scalar field of 1 to 7 ASCII digits, from 1 to `most`; raises ValidationFailed."""
        text = self.one(name)
        if text is None:
            return None
        if not re.fullmatch(r"[0-9]{1,7}", text) or not 1 <= int(text) <= most:
            raise ValidationFailed(f"`{name}` must be a whole number from 1 to {most}", param=name)
        return int(text)


async def read_upload(request: Request, settings: Settings, known: frozenset[str]) -> Upload:
    """Reads the body whole. `known` are the fields that the route has; any other is UnknownField."""
    headers = request.headers
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise UnsupportedMediaType("compressed bodies are not read; send the image as it is, without Content-Encoding")
    kind = headers.get("content-type", "application/octet-stream").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        upload = await _read_multipart(request, settings.max_files)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        upload = Upload([(await read_body(request)).take()], [None])
    else:
        raise UnsupportedMediaType(WHAT_TO_SEND)
    if query := request.scope["query_string"]:
        _add_fields(upload, parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    for name in upload.fields:
        if name not in known:
            raise UnknownField(
                f"there is no field of that name; there are {', '.join(sorted(known))}", param=printable(name)
            )
    return upload


async def read_body(request: Request) -> Body:
    """Collects the body of a request; the middleware counts it. Raises ClientDisconnect, and what the middleware refuses it with."""
    body = Body()
    try:
        async for chunk in request.stream():
            body.add(chunk)
    except BaseException:
        body.close()  # the traceback may live on, and the body with it
        raise
    return body


class _InMemory(MultiPartParser):
    """Keeps multipart files in memory, in `bodies` by part: the middleware bounds the bytes of all requests, and there are no
    temporary files to leave behind. The files that the framework opens for the parts stay empty."""

    ended = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bodies: dict[int, Body] = {}  # by the id of the part's UploadFile

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        file = self._current_part.file
        if file is None:
            super().on_part_data(data, start, end)
        else:
            self.bodies.setdefault(id(file), Body()).add(memoryview(data)[start:end])

    def on_end(self) -> None:
        self.ended = True

    def take(self, file: UploadFile) -> bytes:
        """Returns the content of a part, once."""
        body = self.bodies.get(id(file))
        return b"" if body is None else body.take()

    def close(self) -> None:
        """Closes the files of all parts, including a part that was never finished, which no form holds."""
        for file in self._files_to_close_on_error:
            file.close()
        for body in self.bodies.values():
            body.close()


async def _read_multipart(request: Request, max_files: int) -> Upload:
    parser = _InMemory(
        request.headers, request.stream(), max_files=max_files, max_fields=MAX_FIELDS, max_part_size=MAX_FIELD_BYTES
    )
    try:
        form = await parser.parse()
        if not parser.ended:  # else its last part would be missing without a word
            raise BadRequest("malformed multipart: it breaks off before its closing boundary")
        upload = _files_of(form, parser)
    except MultiPartException as error:
        raise BadRequest(f"malformed multipart: {error.message}") from None
    except ValueError:  # UnicodeError among them: some of Python's codecs are no charsets
        raise BadRequest("malformed multipart: its charset cannot be read; send UTF-8") from None
    finally:
        parser.close()
    _add_fields(upload, ((name, value) for name, value in form.multi_items() if isinstance(value, str)))
    if not upload.images:
        raise MissingFile("there is no `file` part with a filename; send one or more", param="file")
    return upload


def _files_of(form: FormData, parser: _InMemory) -> Upload:
    upload = Upload([], [])
    for name, part in form.multi_items():
        if isinstance(part, UploadFile):
            if name != "file":
                raise UnknownField("images are sent in parts named `file`", param=printable(name))
            upload.images.append(parser.take(part))
            upload.filenames.append(printable(part.filename or ""))
    return upload


def _add_fields(upload: Upload, pairs: Iterable[tuple[str, str]]) -> None:
    for name, value in pairs:
        if name == "file":
            raise MissingFile("`file` must be a file part: it needs a filename", param="file")
        upload.fields.setdefault(name, []).append(value)


def printable(name: str) -> str:
    """A name that a caller chose, fit to be shown: at most 128 printable characters, the last part of a path."""
    tail = re.split(r"[/\\]", name)[-1]
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in tail[:MAX_NAME])


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Awaits `work`, and cancels it when the client leaves; raises ClientDisconnect then. The body must have been read."""
    task = asyncio.current_task()
    assert task is not None  # noqa: S101  (a coroutine always runs in one)
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
