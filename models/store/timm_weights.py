"""Checkpoints in the format of the Hub -> model versions in the store.

config.json --plan--> architecture with its options, preprocessing, class names
model.safetensors --fit--> the network, cut --> backbone and head in the store, licence and origin in the lineage
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import architectures
from models.architectures import timm_networks
from models.architectures.timm_names import RESERVED, TimmName, checked
from models.classifier import Head, ModelConfig
from models.errors import WeightsError
from models.files.weights_file import sha256_of
from models.preprocessing import Preprocessing
from models.progress import DownloadProgress, silent
from models.store import hub
from models.store.importing import fit, read_state
from models.store.packaged import imagenet_classes
from models.store.store import ModelStore

FEATURES = ("features",)  # the only class of weights without a classifier
IMAGENET = re.compile(r"in1k|in12k|in2[12]k")  # in the tag of weights


@dataclass(frozen=True)
class HubConfigPlan:
    """The network and preprocessing of a config.json."""

    name: TimmName
    preprocessing: Preprocessing
    config: Mapping[str, Any]  # `pretrained_cfg`, with the entries beside it

    @property
    def architecture(self) -> str:
        return str(self.name)


def pull_timm(
    architecture: str,
    store: ModelStore,
    cache: Path,
    progress: DownloadProgress = silent,
    as_name: str | None = None,
) -> ModelConfig:
    """Publishes the weights that timm lists under a name, by default the first. Raises as `pull_repository`."""
    name = published(architecture)
    record = timm_networks.config(name) or {}
    known = {"architecture": name.network, "pretrained_cfg": record}
    return _pull(str(record["hf_hub_id"]), known, store, cache, progress, as_name or model_name(architecture))


def published(architecture: str) -> TimmName:
    """Returns the name with its tag. Raises ArchitectureNotFound, and WeightsError where the Hub has no such weights."""
    name = timm_networks.find(architecture)
    if name.options:
        raise WeightsError(f"{architecture} names options, and weights are published without: pull timm/{name.tagged}")
    there = timm_networks.tags(name.network)
    if not there:
        raise WeightsError(
            f"timm knows no published weights of {name.network}: train it from scratch, or import your own"
        )
    if name.tag is None and there[0]:
        name = TimmName(name.network, there[0])
    record = timm_networks.config(name) or {}
    if not record.get("hf_hub_id"):
        if url := record.get("url"):
            raise WeightsError(
                f"the weights of {name} are not on the Hub but a pickled file at {url}: download it, then "
                f"`imago models import FILE --architecture {name}`"
            )
        raise WeightsError(
            f"timm knows no published weights {name.tag!r} of {name.network}; it knows {', '.join(there)}"
        )
    return name


def pull_repository(
    repository: str,
    store: ModelStore,
    cache: Path,
    progress: DownloadProgress = silent,
    as_name: str | None = None,
) -> ModelConfig:
    """Publishes `hf-hub:<user>/<repository>[@<revision>]`. A commit that the store has, sound, is not downloaded again.

    Raises DownloadError, WeightsError, ArchitectureNotFound, InvalidName.
    """
    name = as_name or model_name(hub.split_repository(repository)[0])
    return _pull(repository, None, store, cache, progress, name)


def pull_folder(folder: Path, store: ModelStore, as_name: str | None = None) -> ModelConfig:
    """Publishes a folder in the format of the Hub. Raises WeightsError, ArchitectureNotFound, InvalidName."""
    checkpoint = hub.read_folder(folder)
    return publish(
        checkpoint, plan(checkpoint.config, str(folder)), store, as_name or model_name(folder.resolve().name)
    )


def model_name(source: str) -> str:
    """Returns a model name for a repository or an architecture: its last part in lower case, with `-` for other characters."""
    last = re.sub(r"[^a-z0-9._-]+", "-", source.rstrip("/").rpartition("/")[2].lower())
    return last.strip("._-")[:64] or "model"


def _pull(
    repository: str,
    known: dict[str, Any] | None,
    store: ModelStore,
    cache: Path,
    progress: DownloadProgress,
    name: str,
) -> ModelConfig:
    """Publishes a repository. `known`: the configuration by timm, for a repository whose config.json is of another library."""
    remote = hub.Repository(repository, cache)
    try:
        config, commit = remote.config()
        if known is not None and not isinstance(config.get("architecture"), str):
            config = known
        planned = plan(config, f"{hub.PREFIX}{remote.name}")
        origin = (f"{hub.PREFIX}{remote.name}", commit)
        existing = store.newest_sound(
            name, lambda config: (config.lineage.get("source"), config.lineage.get("revision")) == origin
        )
        return existing or publish(remote.checkpoint(config, commit, progress), planned, store, name)
    finally:
        remote.close()


# config.json


def plan(config: Mapping[str, Any], source: str) -> HubConfigPlan:
    """Reads a config.json in the newer form, with `pretrained_cfg`, or the older flat one. Raises WeightsError."""
    network = config.get("architecture")
    if not isinstance(network, str):
        raise WeightsError(f"{source} is not a repository of timm's: its config.json names no `architecture`")
    known = _mapping(config.get("pretrained_cfg", config), f"{source}: pretrained_cfg")
    known |= {key: config[key] for key in ("num_classes", "label_names", "label_descriptions") if key in config}
    arguments = _mapping(config.get("model_args", {}), f"{source}: model_args")
    options = checked({key: value for key, value in arguments.items() if not RESERVED.fullmatch(key)})
    name = timm_networks.find(str(TimmName(network.partition(".")[0], None, options)))
    shape = known.get("input_size") or (3, 224, 224)
    if not timm_networks.is_size(shape, 3):
        raise WeightsError(f"{source}: its config.json has no usable input_size: {shape!r}"[:300])
    name = _with_input_size(name, known)
    fields = known | timm_networks.size_option(name)
    try:
        preprocessing = timm_networks.preprocessing_from(fields, shape[0], source)
    except (TypeError, ValueError, ArithmeticError, LookupError) as error:
        raise WeightsError(f"{source}: its config.json describes no usable preprocessing") from error
    return HubConfigPlan(name, preprocessing, known)


def _with_input_size(name: TimmName, config: Mapping[str, Any]) -> TimmName:
    """Adds the option `img_size`, where these weights need another input size than the default of the network."""
    if "img_size" in name.options or not config.get("fixed_input_size") or "input_size" not in config:
        return name
    _, height, width = config["input_size"]
    usual = (timm_networks.config(TimmName(name.network)) or {}).get("input_size", (3, 224, 224))
    if [height, width] == [*usual[1:]]:
        return name
    return TimmName(name.network, None, {**name.options, "img_size": height if height == width else [height, width]})


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise WeightsError(f"{what} must be a JSON object")
    return dict(value)


def class_names(config: Mapping[str, Any], count: int, is_imagenet: bool) -> Sequence[str]:
    """Returns the `count` class names of the config with its descriptions, else those of the ImageNet of this size, else `class_0` ..."""
    labels, described = config.get("label_names"), config.get("label_descriptions") or {}
    if isinstance(labels, Mapping):
        labels = [labels.get(str(index), f"class_{index}") for index in range(count)]
    if isinstance(labels, list | tuple) and len(labels) == count:
        return [str(described.get(str(label), label) if isinstance(described, Mapping) else label) for label in labels]
    if is_imagenet and count == 1000:
        return imagenet_classes()
    if is_imagenet:
        from timm.data import ImageNetInfo, infer_imagenet_subset

        if (subset := infer_imagenet_subset({"num_classes": count})) is not None:
            return [str(name) for name in ImageNetInfo(subset).label_descriptions()]
    return [f"class_{index}" for index in range(count)]


# Weights


def publish(checkpoint: hub.HubCheckpoint, planned: HubConfigPlan, store: ModelStore, name: str) -> ModelConfig:
    """Publishes the next version of `name`. Weights without a classifier get one class, `features`, for `/embed` and training."""
    architecture, source = planned.architecture, checkpoint.source
    read = read_state(checkpoint.weights)
    state = _without_offset(timm_networks.renamed(read, architecture) or read, planned)
    backbone, layer = architectures.split_state(architecture, state)
    if not layer:
        state = {**backbone, **_empty_classifier(architecture)}
    network = fit(architecture, state, planned.preprocessing.channels, source)
    head = Head.of(network.layer)
    is_imagenet = source.startswith(f"{hub.PREFIX}timm/") or bool(IMAGENET.search(str(planned.config.get("tag", ""))))
    classes = class_names(planned.config, head.num_classes, is_imagenet) if layer else FEATURES
    ref = store.put_backbone(architecture, network.backbone, planned.preprocessing)
    return store.publish(name, [ref], head, classes, lineage=_lineage(checkpoint, planned, bool(layer)))


def _lineage(checkpoint: hub.HubCheckpoint, planned: HubConfigPlan, has_classifier: bool) -> dict[str, Any]:
    licence = planned.config.get("license")
    return {
        "source": checkpoint.source,
        "revision": checkpoint.revision,
        "sha256": sha256_of(checkpoint.weights),
        "weights": planned.config.get("tag"),
        "architecture": planned.architecture,
        "timm": version("timm"),
        "licence": checkpoint.licence or (licence if isinstance(licence, str) else None),
        "features_only": not has_classifier,
    }


def _without_offset(state: dict[str, Tensor], planned: HubConfigPlan) -> dict[str, Tensor]:
    """Removes the background class that a few old weights have before the 1,000."""
    offset, count = planned.config.get("label_offset"), planned.config.get("num_classes")
    if not isinstance(offset, int) or not isinstance(count, int) or offset < 1:
        return state
    places = tuple(f"{place}." for place in timm_networks.classifiers(architectures.outline(planned.architecture)))
    return {
        key: value[offset:] if key.startswith(places) and len(value) == count + offset else value
        for key, value in state.items()
    }


def _empty_classifier(architecture: str) -> dict[str, Tensor]:
    """Returns a classifier with one class whose score is always zero, by the keys of the uncut network."""
    outline: nn.Module = architectures.outline(architecture, num_classes=1)
    keys = [f"{place}." for place in timm_networks.classifiers(outline)]
    return {
        key: torch.zeros(tensor.shape) for key, tensor in outline.state_dict().items() if key.startswith(tuple(keys))
    }
