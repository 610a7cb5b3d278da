"""Published weights by name -> model versions in the store, with class names, preprocessing and lineage.

efficientnet_lite0, imagenet-lite    from an installed package, without a download
timm/vit_tiny_patch16_224[.tag]      timm's, from the Hugging Face Hub
hf-hub:user/repository[@revision]    a repository in timm's format
./folder                             a folder in the Hub's format
resnet50                             torchvision's
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from models import architectures
from models.architectures.timm_names import is_timm
from models.classifier import Head, ModelConfig
from models.errors import WeightsError
from models.files.weights_file import sha256_of
from models.preprocessing import Preprocessing
from models.progress import DownloadProgress, silent
from models.store import hub, packaged
from models.store.download import fetch, hash_prefix
from models.store.ensembles import ensemble
from models.store.importing import fit, read_state
from models.store.store import ModelStore

IMAGENET_GROUP = ("alexnet", "vgg13", "resnet50", "densenet121", "inception_v3")
IMAGENET_ENSEMBLE = "imagenet-ensemble"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """One file of torchvision's published weights. `classes` are in the order of their indices; names may repeat, as ImageNet's crane and
    maillot do, so only the index identifies a class."""

    weights: str  # the enum member, "ResNet50_Weights.IMAGENET1K_V1"
    url: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    metrics: Mapping[str, Any]
    recipe: str | None
    licence: str = "BSD-3-Clause"  # torchvision's own, where it states no other


def published(architecture: str, weights: str = "IMAGENET1K_V1") -> Published:
    """Returns torchvision's description of these weights. Raises ArchitectureNotFound, or WeightsError where it publishes none."""
    member = architectures.published_weights(architecture, weights)
    if member is None:
        raise WeightsError(f"{architecture} has no published weights: train it, or import your own")
    transforms = member.transforms()
    preprocessing = architectures.preprocessing_of(architecture).model_dump() | {
        "resize": transforms.resize_size[0],
        "crop": transforms.crop_size[0],
        "interpolation": transforms.interpolation.value,
    }
    return Published(
        weights=str(member),
        url=member.url,
        classes=tuple(member.meta["categories"]),
        preprocessing=Preprocessing.model_validate(preprocessing),
        metrics=member.meta.get("_metrics", {}).get("ImageNet-1K", {}),
        recipe=member.meta.get("recipe"),
        licence=architectures.licence_of(member),
    )


def pull(
    name: str,
    store: ModelStore,
    cache: Path,
    progress: DownloadProgress = silent,
    weights: str = "IMAGENET1K_V1",
    base_url: str | None = None,
    as_name: str | None = None,
) -> ModelConfig:
    """Publishes the weights that `name` means (see above), unless the store has them, sound, already.

    `weights`: which of torchvision's; `base_url`: a mirror that has torchvision's files under the same paths; `as_name`: the name of
    the model where weights come from the Hub or a folder, by default the last part of `name`. An interrupted download is resumed. A
    file that was in `cache` before stays there; a downloaded one is deleted once the store has its weights.
    Raises ArchitectureNotFound, WeightsError, DownloadError, InvalidName.
    """
    if as_name is not None and not is_renamable(name):
        raise WeightsError(f"{name} is stored under its own name; import a file to choose another")
    if name in packaged.NAMES:
        return packaged.pull(name, store)
    if is_renamable(name):
        from models.store import timm_weights

        if is_timm(name):
            return timm_weights.pull_timm(name, store, cache, progress, as_name)
        if hub.is_hub(name):
            return timm_weights.pull_repository(name, store, cache, progress, as_name)
        return timm_weights.pull_folder(Path(name), store, as_name)
    source = published(name, weights)
    if existing := store.newest_sound(name, lambda config: _is_of(config, source)):
        logger.info("%s is in the store already, as version %d", source.weights, existing.version)
        return existing
    url = httpx.URL(source.url)
    if base_url is not None:
        mirror = httpx.URL(base_url)
        url = mirror.copy_with(path=mirror.path.rstrip("/") + url.path)
    was_there = (cache / Path(url.path).name).exists()
    path = fetch(url, cache, progress)
    config = _publish(name, store, source, path)
    if not was_there:
        path.unlink()
    return config


def is_renamable(name: str) -> bool:
    """Returns whether the weights come from the Hub or a folder, so that their model can have any name."""
    return is_timm(name) or hub.is_hub(name) or "/" in name


def check(name: str) -> None:
    """Checks a name as far as is possible without the network. Raises ArchitectureNotFound, WeightsError, DownloadError."""
    if is_timm(name):
        from models.store.timm_weights import published as published_by_timm

        published_by_timm(name)
    elif hub.is_hub(name):
        hub.split_repository(name)
    elif name not in (*packaged.NAMES, IMAGENET_ENSEMBLE):
        published(name)


def pull_group(
    store: ModelStore, cache: Path, progress: DownloadProgress = silent, base_url: str | None = None
) -> list[ModelConfig]:
    """Publishes the group `imagenet`: the networks of IMAGENET_GROUP, and their ensemble, which shares their backbones."""
    members = [pull(name, store, cache, progress, base_url=base_url) for name in IMAGENET_GROUP]
    return [*members, publish_ensemble(store)]


def publish_ensemble(store: ModelStore) -> ModelConfig:
    """Publishes the mean of the group's probabilities, from the versions in the store."""
    return ensemble(store, IMAGENET_ENSEMBLE, list(IMAGENET_GROUP))


def _is_of(config: ModelConfig, source: Published) -> bool:
    """Returns whether the version was pulled from this file."""
    lineage = config.lineage
    prefix = hash_prefix(Path(source.url).name)
    return lineage.get("weights") == source.weights and str(lineage.get("sha256", "")).startswith(prefix)


def _publish(name: str, store: ModelStore, source: Published, path: Path) -> ModelConfig:
    network = fit(name, read_state(path), channels=3, source=str(path))
    ref = store.put_backbone(name, network.backbone, source.preprocessing)
    if existing := store.newest_sound(name, lambda config: _is_of(config, source)):
        logger.info("the damaged backbone of %s was replaced; version %d is whole again", name, existing.version)
        return existing
    lineage = {
        "source": source.url,
        "sha256": sha256_of(path),
        "weights": source.weights,
        "torchvision": version("torchvision"),
        "recipe": source.recipe,
        "licence": source.licence,
    }
    return store.publish(name, [ref], Head.of(network.layer), source.classes, dict(source.metrics), lineage)
