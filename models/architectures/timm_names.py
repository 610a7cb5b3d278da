"""Names of timm's networks: `timm/<network>[.<tag>][?<option>=<value>&...]`. Parsing one does not import timm.

    timm/vit_tiny_patch16_224                       the network, and the preprocessing of its default weights
    timm/vit_tiny_patch16_224.augreg_in21k          with the preprocessing and the input size of these weights
    timm/vit_tiny_patch16_224?img_size=384          with arguments of its constructor: JSON values, percent-encoded where they must be

The string says all that is needed to build the network again without the Hub, so it stands in records as it is. It never names a
repository or a path: timm gets a network that it registers itself.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, unquote

from models.errors import ArchitectureNotFound

PREFIX = "timm/"
MAX_LENGTH = 200
NAME = re.compile(r"timm/(?P<network>[a-z0-9_]+)(?:\.(?P<tag>[A-Za-z0-9_.-]+))?(?:\?(?P<options>.+))?")
# A network is built module by module before its weights are compared, so its depth is bounded.
MAX_ITEMS, MAX_NUMBER, MAX_DEPTH = 64, 16_384, 200
DEPTH = re.compile(r"depth|layer|block|repeat|stage")
OPTION = re.compile(r"[a-z][a-z0-9_]*")
# Arguments that say where weights come from, or that Imago sets itself.
RESERVED = re.compile(
    r"pretrained\w*|checkpoint_path|cache_dir|num_classes|in_chans|features_only|feature_\w+|device|dtype|out_indices"
)


@dataclass(frozen=True)
class TimmName:
    network: str
    tag: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def tagged(self) -> str:
        """Returns the name in timm's registry: `resnet50.a1_in1k`."""
        return f"{self.network}.{self.tag}" if self.tag else self.network

    def __str__(self) -> str:
        options = "&".join(f"{key}={_encoded(self.options[key])}" for key in sorted(self.options))
        return f"{PREFIX}{self.tagged}" + (f"?{options}" if options else "")


def is_timm(architecture: str) -> bool:
    return architecture.startswith(PREFIX)


def parse(architecture: str) -> TimmName:
    """Parses a name. Raises ArchitectureNotFound for an invalid one; does not check that timm has it."""
    match = NAME.fullmatch(architecture) if len(architecture) <= MAX_LENGTH else None
    if match is None:
        raise ArchitectureNotFound(
            f"{architecture[:80]!r} is not a name of timm's: write timm/<network>, timm/<network>.<tag> or "
            f"timm/<network>?<option>=<value>, at most {MAX_LENGTH} characters"
        )
    pairs = (option.partition("=") for option in (match["options"] or "").split("&") if option)
    return TimmName(match["network"], match["tag"], checked({key: _decoded(value) for key, _, value in pairs}))


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the options if each is plain and none is reserved. Raises ArchitectureNotFound."""
    for key, value in options.items():
        if not OPTION.fullmatch(key) or RESERVED.fullmatch(key):
            raise ArchitectureNotFound(
                f"the option {key!r} cannot be set: timm networks take arguments of their own constructors only"
            )
        if not _is_plain(value):
            raise ArchitectureNotFound(
                f"the option {key!r} must be a number, a text, true, false, null or a list of at most {MAX_ITEMS} of these"
            )
        if (largest := _largest(value)) > (limit := MAX_DEPTH if DEPTH.search(key) else MAX_NUMBER):
            raise ArchitectureNotFound(f"the option {key!r} is {largest:g}; at most {limit:,} is allowed")
    return dict(options)


def _is_plain(value: Any, nested: int = 2) -> bool:
    if isinstance(value, list | tuple):
        return nested > 0 and len(value) <= MAX_ITEMS and all(_is_plain(item, nested - 1) for item in value)
    return value is None or isinstance(value, str | int | float | bool)


def _largest(value: Any) -> float:
    """Returns the largest absolute number in an option; infinity if one is not finite."""
    if isinstance(value, list | tuple):
        return max(map(_largest, value), default=0)
    if not isinstance(value, int | float):
        return 0
    return abs(value) if isinstance(value, int) or math.isfinite(value) else math.inf


def _encoded(value: Any) -> str:
    return quote(json.dumps(value, separators=(",", ":")), safe='[],"')


def _decoded(text: str) -> Any:
    """Decodes JSON, or else returns the text."""
    text = unquote(text)
    try:
        return json.loads(text)
    except ValueError:
        return text
