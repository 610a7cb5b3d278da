"""What is in memory: backbones, each on every device with its queue, and the models whose heads stand on them."""

import asyncio
import logging
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from models import licences, packaged
from models.classifier import BackboneRef, Head, ModelConfig, Preprocessing
from models.download import Progress
from models.errors import InvalidName, ModelNotFound, WeightsError
from models.reference import Reference, nearest
from models.runtime import RuntimeInfo, compile_backbone
from models.store import ModelStore
from service.answers import Statistics
from service.batcher import BackboneQueue, Batcher
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)

IMAGENET = "imagenet"  # the group's name in the setting `models`


@dataclass(frozen=True, eq=False)
class LoadedBackbone:
    """A backbone compiled for every device, and the queue that its images wait in. Freed when no served model stands on it."""

    ref: BackboneRef
    feature_dim: int
    size: int  # bytes of its weights in memory, over all devices
    queue: BackboneQueue
    infos: Mapping[str, RuntimeInfo]  # by device
    mapped: bool = False  # its features come from a map that the forward pass can hand out


class HeadPart:
    """What one backbone's batch computes for one head: features (n, D) -> its part (n, K); the probabilities, where it stands alone."""

    def __init__(self, heads: Mapping[torch.device, Head], member: int) -> None:
        self._heads, self._member = heads, member
        self._batches = dict.fromkeys(heads, 0)  # each device's thread writes its own

    @property
    def batches(self) -> int:
        """In how many it took part."""
        return sum(self._batches.values())

    def __call__(self, features: Tensor) -> Tensor:
        self._batches[features.device] += 1
        head = self._heads[features.device]
        part = head.part(self._member, features)
        return head.combine([part]) if len(head.layers) == 1 else part


class NearPart:
    """What a backbone's batch computes for a version that keeps training images: features (n, D) -> distances and places (n, 2 * M)."""

    def __init__(self, kept: Mapping[torch.device, Tensor]) -> None:
        self._kept = kept  # (n, D) on each device

    def __call__(self, features: Tensor) -> Tensor:
        distances, places = nearest(self._kept[features.device], features)
        return torch.cat([distances, places.float()], dim=1)


@dataclass(frozen=True, eq=False)
class Served:
    """One version of a model, in memory."""

    config: ModelConfig
    backbones: tuple[LoadedBackbone, ...]
    parts: tuple[HeadPart, ...]
    head: Head  # on the CPU
    reference: Reference | None = None
    near: NearPart | None = None
    statistics: Statistics = field(default_factory=Statistics)

    @property
    def input(self) -> Preprocessing | None:
        """What an image has to be like for every backbone; None where they differ, so that no pixels would fit them all."""
        first, *others = (backbone.ref.preprocessing for backbone in self.backbones)
        same = all(
            (o.channels, o.crop, o.mean, o.std) == (first.channels, first.crop, first.mean, first.std) for o in others
        )
        return first if same else None

    @torch.inference_mode()
    def probabilities(self, values: Sequence[Tensor]) -> Tensor:
        """One image's values, one (K,) per backbone -> probabilities (1, classes)."""
        rows = [value[None] for value in values]
        return self.head.combine(rows) if len(rows) > 1 else rows[0]


class Loader:
    """From the store to memory, each backbone once. Used on the event loop; the work itself is done in threads."""

    def __init__(
        self, settings: Settings, store: ModelStore, metrics: Metrics, devices: Sequence[torch.device]
    ) -> None:
        self._settings, self._store, self._metrics, self._devices = settings, store, metrics, devices
        # One thread per device: compiling measures, and two measurements at once would each see half the machine.
        self._compilers = ThreadPoolExecutor(len(devices), "compile")
        self._readers = ThreadPoolExecutor(2, "load")
        self._puller = ThreadPoolExecutor(1, "pull")
        self._loaded: weakref.WeakValueDictionary[BackboneRef, LoadedBackbone] = weakref.WeakValueDictionary()
        self._under_way: dict[BackboneRef, asyncio.Task[LoadedBackbone]] = {}

    async def load(self, name: str, version: int | None, batcher: Batcher) -> Served:
        """Reads, compiles and tries a version (None: the latest)."""
        loop = asyncio.get_running_loop()
        config = await loop.run_in_executor(self._readers, self._config, name, version)
        head = await loop.run_in_executor(self._readers, self._store.load_head, config)
        layers = [*head.layers] if head.config.kind != "feature_sum" else [None] * len(head.layers)
        backbones = tuple(
            await asyncio.gather(
                *(self._backbone(r, layer, batcher) for r, layer in zip(config.backbones, layers, strict=True))
            )
        )
        heads = {device: head if device.type == "cpu" else deepcopy(head).to(device) for device in self._devices}
        parts = tuple(HeadPart(heads, member) for member in range(len(backbones)))
        reference = await loop.run_in_executor(self._readers, self._reference, config)
        near = None
        if reference is not None and (neighbourhood := reference.neighbourhood) is not None:
            near = NearPart({device: neighbourhood.features.to(device) for device in self._devices})
        served = Served(config, backbones, parts, head, reference, near)
        await _probe(served, batcher)
        return served

    def close(self) -> None:
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._compilers.shutdown(wait=False, cancel_futures=True)
        self._puller.shutdown(wait=False, cancel_futures=True)

    async def pull(self, name: str, progress: Progress | None = None, as_name: str | None = None) -> ModelConfig:
        """Published weights -> a version in the store. One at a time, in a thread of their own, which calls `progress`: loading does
        not wait for them."""
        return await asyncio.get_running_loop().run_in_executor(self._puller, self._pull, name, progress, as_name)

    def _pull(self, name: str, progress: Progress | None, as_name: str | None) -> ModelConfig:
        if name in packaged.NAMES:
            return _unpacked(name, self._store)
        from models.pull import IMAGENET_ENSEMBLE, pull, pull_group

        log.info("%s: pulling its published weights", name)
        downloads, mirror = self._settings.data / "downloads", self._settings.weights_url
        if name == IMAGENET_ENSEMBLE:  # with those of its members that are not there yet
            return pull_group(self._store, downloads, progress, base_url=mirror)[-1]
        config = pull(name, self._store, downloads, progress, base_url=mirror, as_name=as_name)
        for warning in licences.warnings_of(config.lineage):
            log.warning("%s: %s", config.name, warning)
        return config

    def _reference(self, config: ModelConfig) -> Reference | None:
        """A damaged one takes nothing else down: the model answers, and says less."""
        try:
            return self._store.load_reference(config)
        except WeightsError as error:
            log.warning("%s@%d: %s", config.name, config.version, error)
            return None

    def _config(self, name: str, version: int | None) -> ModelConfig:
        try:
            return self._store.config(name, version)
        except ModelNotFound:
            if self._store.versions(name):
                raise
            raise ModelNotFound(
                f"the store has no model {name!r}: run `imago models pull {name}`, or set pull_missing"
            ) from None

    async def _backbone(self, ref: BackboneRef, layer: nn.Module | None, batcher: Batcher) -> LoadedBackbone:
        """The backbone in memory, or loaded now, or the load that is under way already.

        `layer` turns features into scores, by which the compiled backbone is compared with the original.
        """
        if (loaded := self._loaded.get(ref)) is not None:
            return loaded
        if ref not in self._under_way:
            task = asyncio.create_task(self._load_backbone(ref, layer, batcher))
            self._under_way[ref] = task
            task.add_done_callback(lambda _: self._under_way.pop(ref, None))
        return await asyncio.shield(self._under_way[ref])

    async def _load_backbone(self, ref: BackboneRef, layer: nn.Module | None, batcher: Batcher) -> LoadedBackbone:
        loop = asyncio.get_running_loop()
        started = time.monotonic()
        log.info("%s: reading", ref.key)
        backbone = await loop.run_in_executor(self._readers, self._store.load_backbone, ref)
        read = time.monotonic()
        options = self._settings.runtime_options()
        compiled = await asyncio.gather(
            *(
                loop.run_in_executor(
                    self._compilers,
                    partial(compile_backbone, is_serving=partial(batcher.is_busy, device)),
                    backbone,
                    device,
                    options,
                    layer,
                )
                for device in self._devices
            )
        )
        runtimes = dict(zip(self._devices, compiled, strict=True))
        info = compiled[0].info
        log.info(
            "%s: read in %.1f s, compiled in %.1f s: %s %s, batches of %d (%s)",
            *(
                ref.key,
                read - started,
                time.monotonic() - read,
                info.engine,
                info.precision,
                info.max_batch,
                info.source,
            ),
        )
        settings = self._settings
        queue = BackboneQueue(ref.key, runtimes, settings.max_queue_images, settings.max_queue_mb << 20, self._metrics)
        loaded = LoadedBackbone(
            ref,
            backbone.feature_dim,
            sum(_bytes(backbone.module, runtime.info.precision) for runtime in compiled),
            queue,
            {str(device): runtime.info for device, runtime in runtimes.items()},
            backbone.map is not None,
        )
        self._loaded[ref] = loaded
        weakref.finalize(loaded, self._forget, ref.key)
        return loaded

    def _forget(self, key: str) -> None:
        """A backbone left memory. Another may have its key: the same weights after another preprocessing."""
        if not any(ref.key == key for ref in list(self._loaded)):
            self._metrics.forget(key)


def _unpacked(name: str, store: ModelStore) -> ModelConfig:
    """A packaged model, converted into the store. Raises WeightsError, also where the store cannot be written."""
    log.info("%s: converting its packaged weights", name)
    try:
        return packaged.pull(name, store)
    except OSError as error:
        raise WeightsError(
            f"its packaged weights cannot be converted into {store.root}: {error.strerror}; "
            f"make the folder writable, or run `imago models pull {name}` where it is"
        ) from error


def _bytes(module: nn.Module, precision: str) -> int:
    elements = sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
    return elements * (4 if precision == "float32" else 2)


async def _probe(served: Served, batcher: Batcher) -> None:
    """One gray image through the real path, so that weights which fail or answer NaN are refused before anyone is served by them."""
    deadline = time.monotonic() + 300
    values = []
    near = [] if served.near is None else [served.near]
    for backbone, part in zip(served.backbones, served.parts, strict=True):
        kind = backbone.ref.preprocessing
        pixels = torch.full((kind.height, kind.width, kind.channels), 127, dtype=torch.uint8).permute(2, 0, 1)
        output = await batcher.submit(backbone.queue, pixels, [part, *near], deadline)
        values.append(output.values[0])
    probabilities = served.probabilities(values)
    if probabilities.shape != (1, len(served.config.classes)):
        raise WeightsError(
            f"the head answers {probabilities.shape[1]} classes, but {len(served.config.classes)} are named"
        )
    if not bool(probabilities.isfinite().all()):
        raise WeightsError("the model answers NaN for a plain gray image; its weights are not usable")


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
    default = default or (names[0] if names else None)
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
    from models.pull import IMAGENET_ENSEMBLE, IMAGENET_GROUP

    return (*IMAGENET_GROUP, IMAGENET_ENSEMBLE)


class BackboneStatus(BaseModel):
    """A backbone under a served model."""

    key: str
    architecture: str
    sha256: str
    feature_dim: int
    input: tuple[int, int, int]
    shared_with: list[str]
    memory_bytes: int
    runtime: dict[str, RuntimeInfo]


class DecisionRule(BaseModel):
    """By what a model's answers are accepted, and how many of its held-out images were."""

    precision: float = Field(description="Share of accepted images that is to be right")
    threshold: float | None = Field(description="Probability from which on an answer is accepted; null: none is")
    accepted_share: float = Field(description="Share of the held-out images that is accepted")
    images: int = Field(description="Held-out images")
    reject_distance: float | None = Field(description="Distance beyond which an image is rejected; null: none is")


class ModelStatus(BaseModel):
    """One entry of `GET /models`."""

    name: str
    default: bool
    state: Literal["ready", "loading", "failed"]
    version: int | None = None
    error: str | None = None
    classes: list[str] = []
    head: str | None = None
    head_bytes: int | None = None
    backbones: list[BackboneStatus] = []
    metrics: dict[str, Any] = {}
    decision: DecisionRule | None = None
    licences: list[str | None] = []  # of the weights; null is unknown
    created_at: datetime | None = None


def describe(
    name: str, served_by_name: Mapping[str, Served], *, default: bool, loading: bool, error: str | None
) -> ModelStatus:
    """The state of one model. One that failed to load a new version, or is loading it, still shows the version that serves."""
    served = served_by_name.get(name)
    state: Literal["ready", "loading", "failed"] = "ready" if served else "loading" if loading else "failed"
    if served is None:
        return ModelStatus(name=name, default=default, state=state, error=error)
    return ModelStatus(
        name=name,
        default=default,
        state=state,
        version=served.config.version,
        error=error,
        classes=list(served.config.classes),
        head=served.config.head.kind,
        head_bytes=sum(p.nbytes for p in served.head.parameters()),
        backbones=[_describe_backbone(name, b, served_by_name) for b in served.backbones],
        metrics=served.config.metrics,
        decision=_decision_rule(served.reference),
        licences=licences.licences_of(served.config.lineage),
        created_at=served.config.created_at,
    )


def _decision_rule(reference: Reference | None) -> DecisionRule | None:
    if reference is None or (decisions := reference.decisions) is None:
        return None
    near = reference.neighbourhood
    return DecisionRule(
        precision=decisions.precision,
        threshold=decisions.threshold,
        accepted_share=decisions.accepted_share,
        images=decisions.images,
        reject_distance=near.far if near is not None else None,
    )


def _describe_backbone(name: str, backbone: LoadedBackbone, served_by_name: Mapping[str, Served]) -> BackboneStatus:
    kind = backbone.ref.preprocessing
    return BackboneStatus(
        key=backbone.ref.key,
        architecture=backbone.ref.architecture,
        sha256=backbone.ref.sha256,
        feature_dim=backbone.feature_dim,
        input=(kind.channels, kind.height, kind.width),
        shared_with=sorted(n for n, other in served_by_name.items() if n != name and backbone in other.backbones),
        memory_bytes=backbone.size,
        runtime=dict(backbone.infos),
    )
