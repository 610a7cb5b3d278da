"""Ensembles: the backbones of several models, shared by their hash, under one head."""

import torch
from torch import Tensor

from models.architectures.licences import licences_of
from models.classifier import Head, Layer, MLPLayer, ModelConfig
from models.errors import ModelNotFound, WeightsError
from models.store.store import ModelStore


def ensemble(store: ModelStore, name: str, members: list[str]) -> ModelConfig:
    """Publishes the mean of the members' probabilities as the next version of `name`, unless its latest version is that already.

    Members are their served or latest versions. Raises WeightsError unless each has one backbone, and all the same classes in the same
    order.
    """
    served = store.serving().models
    configs = [store.config(member, served.get(member)) for member in members]
    _check_members(configs)
    lineage = {
        "ensemble": [{"name": config.name, "version": config.version} for config in configs],
        "licence": _licence(configs),
    }
    if (existing := _latest(store, name)) is not None and existing.lineage == lineage:
        return existing
    layers = [_tempered(store.load_head(config)) for config in configs]
    head = Head.mean_of(layers, len(configs[0].classes))
    return store.publish(name, [config.backbones[0] for config in configs], head, configs[0].classes, lineage=lineage)


def _licence(configs: list[ModelConfig]) -> str | None:
    """Returns the licence of all members' weights together; None where one is unknown."""
    licences = dict.fromkeys(licence for config in configs for licence in licences_of(config.lineage))
    return None if None in licences else " AND ".join(map(str, licences)) or None


def _check_members(configs: list[ModelConfig]) -> None:
    if len(configs) < 2:
        raise WeightsError(f"an ensemble has at least two members, not {len(configs)}")
    for config in configs:
        if config.head.kind != "single":
            raise WeightsError(f"{config.name} is an ensemble itself; name its members instead")
        if config.classes != configs[0].classes:
            raise WeightsError(f"{config.name} and {configs[0].name} differ in their classes or the order of them")


def _latest(store: ModelStore, name: str) -> ModelConfig | None:
    try:
        return store.config(name)
    except (ModelNotFound, WeightsError):
        return None


@torch.no_grad()
def _tempered(head: Head) -> Layer:
    """Returns the last layer of a member with its weights divided by the temperature. ReLU and mean of a ConvLayer commute with that."""
    layer = head.layers[0]
    for parameter in (layer.output if isinstance(layer, MLPLayer) else layer).parameters():
        scaled: Tensor = parameter / head.config.temperature
        parameter.copy_(scaled)
    if not isinstance(layer, Layer):
        raise TypeError("a head's layer is one of the three")
    return layer
