"""Loads models from the store: backbones, each on every device with its queue, and heads on them."""

import asyncio
import gc
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

from models.architectures import licences
from models.classifier import BackboneRef, Head, ModelConfig
from models.errors import ModelNotFound, ReadOnlyStore, WeightsError
from models.preprocessing import Preprocessing
from models.progress import DownloadProgress, silent
from models.runtime import CompiledBackbone, RuntimeInfo, compile_backbone
from models.store import packaged
from models.store.store import ModelStore
from models.uncertainty import Reference
from service.errors import DeviceLost
from service.inference.backbone_queue import BackboneQueue, Item
from service.inference.batcher import Batcher
from service.inference.forward import HeadPart, NeighboursPart
from service.inference.registry.replicas import DeviceWork
from service.inference.results import Output, Statistics
from service.observability.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class LoadedBackbone:
    """A backbone compiled for every device, and its queue of images. Freed when no served model uses it."""

    ref: BackboneRef
    feature_dim: int
    size: int  # bytes of its weights in memory, over all devices
    queue: BackboneQueue
    infos: Mapping[str, RuntimeInfo]  # by device
    failures: Mapping[str, str]  # by device: why it could not be loaded there
    mapped: bool = False  # whether the forward pass can return the map of its features


Outputs = Mapping[LoadedBackbone, Output]  # one image's output by each backbone


@dataclass(frozen=True, eq=False)
class Served:
    """One version of a model, in memory."""

    config: ModelConfig
    backbones: tuple[LoadedBackbone, ...]
    parts: tuple[HeadPart, ...]
    head: Head  # on the CPU
    reference: Reference | None = None
    near: NeighboursPart | None = None
    statistics: Statistics = field(default_factory=Statistics)

    @property
    def input(self) -> Preprocessing | None:
        """Return the preprocessing of all backbones; None if they differ, so that no pixels fit them all."""
        first, *others = (backbone.ref.preprocessing for backbone in self.backbones)
        same = all(
            (o.channels, o.crop, o.mean, o.std) == (first.channels, first.crop, first.mean, first.std) for o in others
        )
        return first if same else None

    @torch.inference_mode()
    def probabilities(self, values: Sequence[Tensor]) -> Tensor:
        """Return probabilities (1, classes) from one image's values, (K,) of each backbone."""
        rows = [value[None] for value in values]
        return self.head.combine(rows) if len(rows) > 1 else rows[0]


class Loader:
    """Loads models from the store into memory, each backbone once. Used on the event loop; the work is done in threads."""

    def __init__(
        self, settings: Settings, store: ModelStore, metrics: Metrics, devices: Sequence[torch.device]
    ) -> None:
        self._settings, self._store, self._metrics, self._devices = settings, store, metrics, devices
        self._work = DeviceWork(devices)
        self._readers = ThreadPoolExecutor(2, "load")
        self._puller = ThreadPoolExecutor(1, "pull")
        self._loaded: weakref.WeakValueDictionary[BackboneRef, LoadedBackbone] = weakref.WeakValueDictionary()
        self._under_way: dict[BackboneRef, asyncio.Task[LoadedBackbone]] = {}
        self._tidying: asyncio.Task[None] | None = None
        self._closed = False

    async def load(self, name: str, version: int | None, batcher: Batcher) -> Served:
        """Read, compile and try a version (None: the latest)."""
        loop = asyncio.get_running_loop()
        config = await loop.run_in_executor(self._readers, self._config, name, version)
        head = await loop.run_in_executor(self._readers, self._store.load_head, config)
        layers = [*head.layers] if head.config.kind != "feature_sum" else [None] * len(head.layers)
        backbones = tuple(
            await asyncio.gather(
                *(self._backbone(r, layer, batcher) for r, layer in zip(config.backbones, layers, strict=True))
            )
        )
        devices = list(dict.fromkeys(device for backbone in backbones for device in backbone.queue.runtimes))
        heads = await self._work.everywhere(partial(_head_on, head), devices, self._readers, batcher)
        parts = tuple(HeadPart(heads, member) for member in range(len(backbones)))
        reference = await loop.run_in_executor(self._readers, self._reference, config)
        near = None
        if reference is not None and (neighbourhood := reference.neighbourhood) is not None:
            near = NeighboursPart(
                await self._work.everywhere(neighbourhood.features.to, devices, self._readers, batcher)
            )
        served = Served(config, backbones, parts, head, reference, near)
        await _probe(served, batcher)
        return served

    def close(self) -> None:
        self._closed = True
        if self._tidying is not None:
            self._tidying.cancel()
        self._readers.shutdown(wait=False, cancel_futures=True)
        self._work.close()
        self._puller.shutdown(wait=False, cancel_futures=True)

    async def pull(self, name: str, progress: DownloadProgress = silent, as_name: str | None = None) -> ModelConfig:
        """Published weights -> a version in the store. One at a time, in a thread of their own, which calls `progress`: loading does
        not wait for them."""
        return await asyncio.get_running_loop().run_in_executor(self._puller, self._pull, name, progress, as_name)

    def _pull(self, name: str, progress: DownloadProgress, as_name: str | None) -> ModelConfig:
        if name in packaged.NAMES:
            return _unpacked(name, self._store)
        from models.store.pull import IMAGENET_ENSEMBLE, pull, pull_group

        log.info("%s: pulling its published weights", name)
        downloads, mirror = self._settings.data / "downloads", self._settings.weights_url
        if name == IMAGENET_ENSEMBLE:  # with its members that the store lacks
            return pull_group(self._store, downloads, progress, base_url=mirror)[-1]
        config = pull(name, self._store, downloads, progress, base_url=mirror, as_name=as_name)
        for warning in licences.warnings_of(config.lineage):
            log.warning("%s: %s", config.name, warning)
        return config

    def _reference(self, config: ModelConfig) -> Reference | None:
        """Return the reference data; None if it is damaged: the model then serves without uncertainty."""
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
        """Return the backbone from memory, or load it, or wait for the load that is already running.

        `layer` computes scores from features, by which the compiled backbone is compared with the original.
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
        settings, options = self._settings, self._settings.runtime_options()

        def compile_for(device: torch.device) -> CompiledBackbone:
            return compile_backbone(backbone, device, options, layer, is_serving=partial(batcher.is_busy, device))

        replicas = await self._work.replicas(compile_for, ref.preprocessing, batcher)
        infos = {str(device): runtime.info for device, runtime in replicas.runtimes.items()}
        queue = BackboneQueue(
            ref.key, replicas.runtimes, settings.max_queue_images, settings.max_queue_mb << 20, self._metrics
        )
        size = sum(_bytes(backbone.module, info.precision) for info in infos.values())
        mapped = backbone.map is not None
        loaded = LoadedBackbone(ref, backbone.feature_dim, size, queue, infos, replicas.failures, mapped)
        seconds = read - started, time.monotonic() - read
        log.info("%s: read in %.1f s, compiled in %.1f s: %s", ref.key, *seconds, _running(next(iter(infos.values()))))
        self._loaded[ref] = loaded
        weakref.finalize(loaded, self._forget, ref.key, loop, batcher).atexit = False
        return loaded

    def _forget(self, key: str, loop: asyncio.AbstractEventLoop, batcher: Batcher) -> None:
        """Clean up after a backbone was freed, in any thread. Another may have its key: the same weights with another preprocessing."""
        if not any(ref.key == key for ref in list(self._loaded)):
            self._metrics.forget(key)
        with suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(self._tidy, batcher)

    def _tidy(self, batcher: Batcher) -> None:
        if not self._closed and (self._tidying is None or self._tidying.done()):
            self._tidying = asyncio.create_task(self._give_back(batcher))

    async def _give_back(self, batcher: Batcher) -> None:
        """Return the memory of a freed backbone to its device, for a trainer beside the server or for the next load.

        Garbage collection blocks the interpreter for 0.3 ms after the server has called `gc.freeze`, and for half a second before.
        """
        await asyncio.get_running_loop().run_in_executor(self._readers, gc.collect)
        for device in self._devices:
            if device.type == "cuda":
                with suppress(DeviceLost):
                    await batcher.call(device, torch.cuda.empty_cache)


def _head_on(head: Head, device: torch.device) -> Head:
    return head if device.type == "cpu" else deepcopy(head).to(device)


def _running(info: RuntimeInfo) -> str:
    return f"{info.engine} {info.precision}, batches of {info.max_batch} ({info.source})"


def _unpacked(name: str, store: ModelStore) -> ModelConfig:
    """Convert a packaged model into the store. Raises WeightsError, also if the store cannot be written."""
    log.info("%s: converting its packaged weights", name)
    try:
        return packaged.pull(name, store)
    except (OSError, ReadOnlyStore) as error:
        raise WeightsError(
            f"its packaged weights cannot be converted into {store.root}: {getattr(error, 'strerror', None) or 'it is read-only'}; "
            f"make the folder writable, or run `imago models pull {name}` where it is"
        ) from error


def _bytes(module: nn.Module, precision: str) -> int:
    elements = sum(tensor.numel() for tensor in (*module.parameters(), *module.buffers()))
    return elements * (4 if precision == "float32" else 2)


async def _probe(served: Served, batcher: Batcher) -> None:
    """Run a gray image on the path of requests, so that weights that fail or give NaN are refused before they serve."""
    deadline = time.monotonic() + 300
    values = []
    near = [] if served.near is None else [served.near]
    for backbone, part in zip(served.backbones, served.parts, strict=True):
        kind = backbone.ref.preprocessing
        pixels = torch.full((kind.height, kind.width, kind.channels), 127, dtype=torch.uint8).permute(2, 0, 1)
        output = await batcher.submit(backbone.queue, Item(pixels, [part, *near], deadline))
        values.append(output.values[part])
    probabilities = served.probabilities(values)
    if probabilities.shape != (1, len(served.config.classes)):
        raise WeightsError(
            f"the head answers {probabilities.shape[1]} classes, but {len(served.config.classes)} are named"
        )
    if not bool(probabilities.isfinite().all()):
        raise WeightsError("the model answers NaN for a plain gray image; its weights are not usable")


SHARED_SHOWN = 10  # a thousand models on one backbone would each name 999 others: 17 MB


class BackboneStatus(BaseModel):
    """A backbone under a served model."""

    key: str
    architecture: str
    sha256: str
    feature_dim: int
    input: tuple[int, int, int]
    shared_with: list[str] = Field(description=f"Names of other models on this backbone, at most {SHARED_SHOWN}")
    shared_with_count: int = Field(0, description="The number of other models on this backbone")
    memory_bytes: int
    runtime: dict[str, RuntimeInfo] = Field(description="How it runs on each device")
    failures: dict[str, str] = Field(
        {}, description="Devices on which it could not be loaded, and why; the others serve"
    )


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


Sharers = Mapping[LoadedBackbone, Sequence[str]]


def sharers_of(served_by_name: Mapping[str, Served]) -> Sharers:
    """Return the names of the models on each backbone, in order."""
    sharers: dict[LoadedBackbone, list[str]] = {}
    for name in sorted(served_by_name):
        for backbone in dict.fromkeys(served_by_name[name].backbones):
            sharers.setdefault(backbone, []).append(name)
    return sharers


def describe(
    name: str, served: Served | None, sharers: Sharers, *, default: bool, loading: bool, error: str | None
) -> ModelStatus:
    """Return the state of one model. One that is loading a new version, or failed to load it, shows the version that serves."""
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
        backbones=[_describe_backbone(name, b, sharers[b]) for b in served.backbones],
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


def _describe_backbone(name: str, backbone: LoadedBackbone, sharers: Sequence[str]) -> BackboneStatus:
    kind = backbone.ref.preprocessing
    return BackboneStatus(
        key=backbone.ref.key,
        architecture=backbone.ref.architecture,
        sha256=backbone.ref.sha256,
        feature_dim=backbone.feature_dim,
        input=(kind.channels, kind.height, kind.width),
        shared_with=[other for other in sharers[: SHARED_SHOWN + 1] if other != name][:SHARED_SHOWN],
        shared_with_count=len(sharers) - 1,
        memory_bytes=backbone.size,
        runtime=dict(backbone.infos),
        failures=dict(backbone.failures),
    )
