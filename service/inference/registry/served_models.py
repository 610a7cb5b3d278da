"""Plans which models to serve, from the setting `models` and the store."""

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
    """The models to serve. A name without a configuration is damaged or missing."""

    names: tuple[str, ...]  # the default first
    versions: Mapping[str, int]
    configs: Mapping[str, ModelConfig]
    default: str | None

    @property
    def missing(self) -> frozenset[str]:
        """Return the names of which the store has no version."""
        return frozenset(self.names) - frozenset(self.versions)


def plan_serving(settings: Settings, store: ModelStore) -> ServingPlan:
    """Return the plan: the models of the setting `models`, by default all that the store serves."""
    serving = store.serving()
    names: list[str] = []
    for name in settings.models:
        names += _imagenet_group() if name == IMAGENET else (name,)
    names = names or [*serving.models]
    default = settings.default_model or (serving.default if serving.default in names else None)
    default = default or (
        names[0] if settings.models else None
    )  # never just the first by name, which has other classes
    ordered = tuple(dict.fromkeys([default, *names] if default else names))
    versions: dict[str, int] = {}
    configs: dict[str, ModelConfig] = {}
    for name in ordered:
        with suppress(InvalidName, ModelNotFound, WeightsError):  # loading reports the error
            if stored := store.versions(name):
                versions[name] = serving.models.get(name) or stored[-1]
                configs[name] = store.config(name, versions[name])
    return ServingPlan(ordered, versions, configs, default)


def _imagenet_group() -> tuple[str, ...]:
    from models.store.pull import IMAGENET_ENSEMBLE, IMAGENET_GROUP

    return (*IMAGENET_GROUP, IMAGENET_ENSEMBLE)
