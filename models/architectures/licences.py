"""Licences of weights: which are free, and a warning for the others.

A version has its licence in its lineage, under `licence`: an SPDX identifier ("Apache-2.0"), an SPDX expression, or the publisher's text.
"""

import re
from collections.abc import Mapping
from typing import Any

UNKNOWN = "unknown licence: ask the publisher of the weights before you use or pass them on"
FREE = re.compile(
    r"apache(-license)?(-version)?(-?2(\.0)?)?|mit(-license)?|mit-0|expat|isc|zlib|unlicense|0bsd"
    r"|bsd(-[1-4]-clause)?(-clear|-license)?|(new|modified|simplified)-bsd(-license)?"
    r"|cc0(-1\.0)?|cc-by-\d\.0|pddl(-1\.0)?|public-domain"
)
SPDX = re.compile(r"[\w.+-]+(\s+(and|or)\s+[\w.+-]+)*", re.IGNORECASE)


def warning(licence: str | None) -> str | None:
    """Returns one line for weights whose licence is unknown or restricts use; None for a free licence."""
    if licence is None or licence.strip().lower() in ("", "unknown", "none"):
        return UNKNOWN
    if is_free(licence):
        return None
    return f"the licence {_shown(licence)} restricts the use of these weights: read it before you use or pass them on"


def is_free(licence: str) -> bool:
    """Whether a licence allows any use with at most attribution: Apache-2.0, MIT, BSD, ISC, CC0, CC-BY and the like.

    In an SPDX expression, all parts of one alternative must be free.
    """
    text = licence.strip().strip("()")
    alternatives = re.split(r"\s+or\s+", text, flags=re.IGNORECASE) if SPDX.fullmatch(text) else [text]
    return any(
        all(FREE.fullmatch(_normalised(part)) for part in re.split(r"\s+and\s+", alternative, flags=re.IGNORECASE))
        for alternative in alternatives
    )


def licences_of(lineage: Mapping[str, Any], generations: int = 8) -> list[str | None]:
    """Returns the distinct licences of a version's weights; None stands for an unknown one.

    A version has its own `licence`, or those of the models it was trained from; one trained from scratch has none. The lineage comes from
    a file: anything in it that is not text is unknown, and ancestors are followed for a limited number of generations.
    """
    if "licence" in lineage:
        licence = lineage["licence"]
        return [licence if isinstance(licence, str) else None]
    ancestors = lineage.get("base_model")
    if isinstance(ancestors, list | tuple) and ancestors and generations:
        origins = [ancestor.get("lineage") if isinstance(ancestor, Mapping) else None for ancestor in ancestors]
        inherited = [licences_of(origin if isinstance(origin, Mapping) else {}, generations - 1) for origin in origins]
        return list(dict.fromkeys(licence for licences in inherited for licence in licences))
    return [] if lineage.get("mode") == "scratch" else [None]


def warnings_of(lineage: Mapping[str, Any]) -> list[str]:
    """Returns one line for each licence of a version's weights that is unknown or restricts use."""
    return [line for licence in licences_of(lineage) if (line := warning(licence)) is not None]


def _normalised(licence: str) -> str:
    """Turns `Apache License, Version 2.0` into `apache-license-version-2.0`."""
    name = re.sub(r"^the\s+|\s+licen[cs]e$", "", licence.strip().lower())
    return re.sub(r"[\s,_]+", "-", name).replace("licence", "license")


def _shown(licence: str) -> str:
    line = " ".join(licence.split())
    return repr(line if len(line) <= 80 else line[:77] + "...")
