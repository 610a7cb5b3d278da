"""Which models are to be served: the setting `models` against what the store holds."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from models.classifier import ModelConfig
from models.errors import InvalidName, ModelNotFound, WeightsError
from models.store.store import ModelStore
from service.settings import Settings

IMAGENET = "imagenet"  # the group's name in the setting `models`


@dataclass(frozen=True)
class ServingPlan:
    """Which models are to be served. A name without a configuration is damaged or missing."""

    names: tuple[str, ...]  # the default first
    versions: Mapping[str, int]
    configs: Mapping[str, ModelConfig]
    default: str | None

    @property
    def missing(self) -> frozenset[str]:
        """What the store has no version of."""
        return frozenset(self.names) - frozenset(self.versions)


def plan_serving(settings: Settings, store: ModelStore) -> ServingPlan:
    """The setting `models` (default: all that the store serves) against the store."""
    serving = store.serving()
    names: list[str] = []
    for name in settings.models:
        names += _imagenet_group() if name == IMAGENET else (name,)
    names = names or [*serving.models]
    default = settings.default_model or (serving.default if serving.default in names else None)
    default = default or (names[0] if settings.models else None)  # never the first by name: it has other classes
    ordered = tuple(dict.fromkeys([default, *names] if default else names))
    versions: dict[str, int] = {}
    configs: dict[str, ModelConfig] = {}
    for name in ordered:
        with suppress(InvalidName, ModelNotFound, WeightsError):  # loading it says what is wrong
            if stored := store.versions(name):
                versions[name] = serving.models.get(name) or stored[-1]
                configs[name] = store.config(name, versions[name])
    return ServingPlan(ordered, versions, configs, default)


def _imagenet_group() -> tuple[str, ...]:
    from models.store.pull import IMAGENET_ENSEMBLE, IMAGENET_GROUP

    return (*IMAGENET_GROUP, IMAGENET_ENSEMBLE)
