"""The path under which a proxy serves Imago, as `/imago`: the setting `root_path`, or `X-Forwarded-Prefix` of a trusted proxy.

public path       sent by the proxy    answered as    root_path
/imago/predict    /predict             /predict       /imago       the proxy strips the prefix
/imago/predict    /imago/predict       /predict       /imago       the proxy does not
"""

import re
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

HEADER = b"x-forwarded-prefix"
MAX_LENGTH = 256  # characters
# First segments of Imago's own paths: a prefix that begins with one cannot be told from a route.
OWN = frozenset(
    {
        "datasets",
        "docs",
        "embed",
        "finetune",
        "health",
        "metrics",
        "models",
        "openapi.json",
        "predict",
        "v2",
        "web",
    }
)
_PREFIX = re.compile(r"(/(?!\.{1,2}(/|$))[A-Za-z0-9._~@:+=-]+)*")


def prefix_of(value: str) -> str:
    """Returns `/imago` for `/imago/`, and an empty string for `/`. Raises ValueError for a value that cannot be a prefix."""
    prefix = value.removesuffix("/")
    if len(prefix) > MAX_LENGTH or not _PREFIX.fullmatch(prefix):
        raise ValueError(
            f"a prefix looks like /imago: a slash, then letters, digits and ._~@:+=-, in all at most {MAX_LENGTH} characters"
        )
    if prefix.split("/")[1:2] and prefix.split("/")[1] in OWN:
        raise ValueError(f"/{prefix.split('/')[1]} is a path of Imago itself; choose another prefix")
    return prefix


def forwarded(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """Returns the prefix that `X-Forwarded-Prefix` gives, or an empty string if that cannot be one. Of several proxies, the outermost
    comes first."""
    pieces = b",".join(value for name, value in headers if name == HEADER).decode("latin-1").split(",")
    try:
        return prefix_of("".join(prefix_of(piece.strip(" \t")) for piece in pieces))
    except ValueError:
        return ""


def without(prefix: str, path: str) -> str:
    """Returns the path below the prefix, if a proxy has left the prefix in it, or put it there twice; `/` for `/imago` alone."""
    while prefix and f"{path}/".startswith(f"{prefix}/"):
        path = path[len(prefix) :] or "/"
    return path


def no_such_path(path: str, prefix: str) -> str:
    """Returns the message of a 404: how to get the list of paths, or the cause if the path shows it."""
    segments = path.removeprefix("/").split("/")
    if segments[0] in OWN and path.endswith("/"):
        return "no such path; remove the slash at its end"
    if prefix:
        return f"no such path; {prefix}/docs lists the paths"
    own = next((index for index, segment in enumerate(segments) if segment in OWN), 0)
    before = "".join(f"/{segment}" for segment in segments[:own])
    with suppress(ValueError):
        if prefix_of(before):
            return f"no such path; if {before} is the prefix of a proxy, start the server with IMAGO_ROOT_PATH={before}"
    return "no such path; /docs lists the paths, below the proxy's prefix if there is one"


def place(scope: Any, prefix: str) -> None:
    """Sets an ASGI scope's `root_path`, and its `path` without the prefix. Changes nothing without a prefix."""
    if prefix:
        scope["root_path"], scope["path"] = prefix, without(prefix, scope["path"])
