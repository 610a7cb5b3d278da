"""The page at `/` and the viewer of the OpenAPI document at `/docs`: their files, and what a browser may do with them."""

import os
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse, RedirectResponse
from starlette.staticfiles import StaticFiles

router = APIRouter(include_in_schema=False)

WEB = Path(__file__).parents[1] / "web"
HEADERS = {
    # Nothing comes from elsewhere, nothing stands inside the page's own text, and nobody puts the page into theirs. Pictures that a
    # visitor chose are blob: URLs.
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # asked for again each time, by its ETag: a new version is seen at once
}


class PageFiles(StaticFiles):
    """The page's scripts and style, with its headers."""

    def get_path(self, scope: Any) -> str:
        """By the path alone: the framework would look for `root_path` in front of it, and ours is without."""
        path: str = scope["path"]
        return os.path.normpath(path.removeprefix("/web").lstrip("/"))

    def file_response(
        self, full_path: str | os.PathLike[str], stat_result: os.stat_result, scope: Any, status_code: int = 200
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(HEADERS)
        return response


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    prefix = request.scope["root_path"]
    if (
        prefix and request.scope["raw_path"] == prefix.encode()
    ):  # the page's own links are relative: they need the slash
        return RedirectResponse(f"{prefix}/", 308)
    return FileResponse(WEB / "index.html", headers=HEADERS)


@router.get("/docs")
async def docs() -> FileResponse:
    return FileResponse(WEB / "viewer" / "index.html", headers=HEADERS)
