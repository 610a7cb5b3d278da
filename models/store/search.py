"""The search for architectures by pattern: parameters, input size, licence, and the source of weights."""

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

from models import architectures
from models.architectures import timm_networks
from models.architectures.timm_names import is_timm, parse
from models.errors import ArchitectureNotFound, WeightsError
from models.store import packaged
from models.store.store import ModelStore

NEAREST = 5
WeightsSource = Literal["packaged", "stored", "published", "none"]


@dataclass(frozen=True)
class ArchitectureInfo:
    """An architecture. `licence`: that of the weights that `imago models pull NAME` downloads; None if unknown.

    `weights`: from an installed package, in the store, published by torchvision or on the Hub, or none.
    """

    name: str
    parameters: int
    height: int
    width: int
    licence: str | None
    weights: WeightsSource

    def row(self) -> dict[str, Any]:
        """Returns the fields as JSON has them."""
        return asdict(self)


def search(pattern: str) -> list[str]:
    """Returns the names that contain a shell pattern, case-insensitively; those of timm begin with `timm/`.

    A pattern with a dot, or without a match, is also searched in the names of weights (`timm/<network>.<tag>`).
    Raises ArchitectureNotFound with the nearest names where nothing matches.
    """
    wanted = f"*{pattern.lower().strip('*')}*"
    names = [*architectures.names(), *timm_networks.names()]
    found = [] if "." in pattern else [name for name in names if fnmatchcase(name.lower(), wanted)]
    if not found:
        found = [name for name in timm_networks.published_names() if fnmatchcase(name.lower(), wanted)]
    if not found:
        near = difflib.get_close_matches(pattern.replace("*", ""), names, n=NEAREST, cutoff=0)
        raise ArchitectureNotFound(
            f"no architecture matches {pattern!r} among {len(names)}; the nearest are {', '.join(near)}"
        )
    return found


def describe(names: Sequence[str], store: ModelStore) -> list[ArchitectureInfo]:
    """Describes architectures. Each takes up to half a second, so pass only those that are shown."""
    stored = _stored(store)
    return [_describe(name, stored) for name in names]


def _describe(name: str, stored: set[str]) -> ArchitectureInfo:
    shape = architectures.preprocessing_of(name)
    parameters = sum(parameter.numel() for parameter in architectures.outline(name).parameters())
    licence, published = _published(name)
    weights: WeightsSource = "published" if published else "none"
    if name in packaged.NAMES:
        licence, weights = packaged.LICENCE, "packaged"
    elif name in stored:
        weights = "stored"
    return ArchitectureInfo(name, parameters, shape.height, shape.width, licence, weights)


def _published(name: str) -> tuple[str | None, bool]:
    """Returns the licence of the published weights, and whether there are any."""
    if is_timm(name):
        record = timm_networks.config(parse(name)) or {}
        return record.get("license"), bool(record.get("hf_hub_id"))
    member = architectures.published_weights(name)
    return (None, False) if member is None else (architectures.licence_of(member), True)


def _stored(store: ModelStore) -> set[str]:
    """Returns the architectures of the models in the store; for weights of timm also the name with their tag."""
    found = set()
    for name in store.names():
        try:
            config = store.config(name)
        except WeightsError:
            continue
        for ref in config.backbones:
            found.add(ref.architecture)
            if is_timm(ref.architecture) and (tag := config.lineage.get("weights")):
                found.add(f"{ref.architecture.partition('?')[0]}.{tag}")
    return found
