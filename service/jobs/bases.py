"""The models that training can start from, with size, published accuracy and measured speed, for `GET /finetune/schema`."""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress

from pydantic import BaseModel, Field
from torch import nn

from models import architectures
from models.classifier import BackboneRef, ModelConfig
from models.errors import ModelError
from models.preprocessing import Preprocessing
from models.runtime import RuntimeInfo
from models.store import packaged
from models.store.store import ModelStore
from service.inference.registry.loader import ModelStatus


class TrainingBase(BaseModel):
    """One choice of the field `base`."""

    name: str
    default: bool = Field(description="The base of a request that names none")
    in_store: bool = Field(description="False for packaged weights, which are converted when they are first used")
    architectures: list[str]
    input: int = Field(description="Longer side of the network's input in pixels; of an ensemble, the largest")
    bytes: int = Field(description="Size of the backbones' weights")
    accuracy: float | None = Field(description="Published top-1 accuracy on ImageNet in percent, where it is known")
    images_per_s: float | None = Field(description="Measured when it was loaded; null where the server has no figure")


def training_bases(store: ModelStore, served: Sequence[ModelStatus]) -> list[TrainingBase]:
    """Best first: by published accuracy, then by measured speed. Reads the store; a damaged version is left out.

    Models on the same backbones are one base, under the default's name, else the one with a published accuracy, else the oldest.
    """
    default, rates = store.serving().default or packaged.DEFAULT, _rates(served)
    bases = []
    for config in _distinct(_configs(store), default):
        with suppress(ModelError):
            bases.append(_stored(config, store, default, rates))
    bases += [_packaged(name, default) for name in packaged.PACKAGES if not store.versions(name)]
    return sorted(bases, key=lambda base: (-(base.accuracy or 0), -(base.images_per_s or 0), base.name))


def _configs(store: ModelStore) -> list[ModelConfig]:
    """For each model the version that serves, else the latest."""
    serving, configs = store.serving(), []
    for name in store.names():
        with suppress(ModelError):
            configs.append(store.config(name, serving.models.get(name)))
    return configs


def _distinct(configs: Iterable[ModelConfig], default: str) -> list[ModelConfig]:
    by_backbones: dict[tuple[BackboneRef, ...], ModelConfig] = {}
    for config in sorted(configs, key=lambda c: (c.name != default, _accuracy(c) is None, c.created_at)):
        by_backbones.setdefault(config.backbones, config)
    return list(by_backbones.values())


def _accuracy(config: ModelConfig) -> float | None:
    accuracy = config.metrics.get("acc@1")
    return float(accuracy) if isinstance(accuracy, int | float) else None


def _stored(config: ModelConfig, store: ModelStore, default: str, rates: Mapping[str, float]) -> TrainingBase:
    measured = [rates.get(ref.sha256) for ref in config.backbones]
    known = [rate for rate in measured if rate]
    return TrainingBase(
        name=config.name,
        default=config.name == default,
        in_store=True,
        architectures=[ref.architecture for ref in config.backbones],
        input=max(_side(ref.preprocessing) for ref in config.backbones),
        bytes=sum(store.backbone_size(ref) for ref in config.backbones),
        accuracy=_accuracy(config),
        # each image passes through every backbone of an ensemble
        images_per_s=1 / sum(1 / rate for rate in known) if len(known) == len(measured) else None,
    )


def _packaged(name: str, default: str) -> TrainingBase:
    return TrainingBase(
        name=name,
        default=name == default,
        in_store=False,
        architectures=[name],
        input=_side(architectures.preprocessing_of(name)),
        bytes=_bytes(architectures.create_backbone(name)),
        accuracy=packaged.PACKAGES[name].accuracy,
        images_per_s=None,
    )


def _side(preprocessing: Preprocessing) -> int:
    return max(preprocessing.height, preprocessing.width)


def _bytes(backbone: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in backbone.state_dict().values())


def _rates(served: Sequence[ModelStatus]) -> dict[str, float]:
    """Images a second of each backbone in memory by its hash: of its fastest device, at the best batch size of the chosen engine."""
    backbones = [backbone for status in served for backbone in status.backbones]
    rates = {b.sha256: max(map(_rate, b.runtime.values()), default=0.0) for b in backbones}
    return {sha256: rate for sha256, rate in rates.items() if rate}


def _rate(info: RuntimeInfo) -> float:
    return max(
        (
            rate
            for candidate in info.candidates
            if (candidate.engine, candidate.precision) == (info.engine, info.precision)
            for rate in candidate.rates.values()
        ),
        default=0.0,
    )
