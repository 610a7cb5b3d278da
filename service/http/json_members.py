"""Members of JSON objects that occur twice: parsers keep the last without a word."""

import json
from contextlib import suppress
from typing import Any

from service.errors import BadRequest

MAX_SHOWN = 128  # characters of a name


def refuse_repeated(text: bytes) -> None:
    """Raises BadRequest where an object has a member twice. Text that is not valid JSON passes: its parser has an error for it."""
    with suppress(ValueError, RecursionError):
        json.loads(text, object_pairs_hook=_once)


def _once(pairs: list[tuple[str, Any]]) -> None:
    names = set()
    for name, _ in pairs:
        if name in names:
            shown = name[:MAX_SHOWN] if name.isprintable() else ""
            raise BadRequest(
                f"`{shown}` was given more than once; give it once, as a list where it takes several", param=shown
            )
        names.add(name)
