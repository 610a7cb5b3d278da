"""What happens to an image: admission, decoding, batching, heads. What is served, and the hot swap, is the catalogue's.

predict: bind versions -> admit -> decode pool -> BackboneQueue (batcher) -> probabilities -> top-k
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from models.classifier import ModelConfig
from models.errors import ImageError, ModelError, ModelNotFound, WeightsError
from models.images import decoding as images
from models.preprocessing import Preprocessing
from models.runtime import devices
from models.store.download import DownloadProgress
from models.store.store import ModelStore
from service.errors import DeadlineExceeded, NotReady, ServiceError
from service.inference.batcher import Batcher, DeviceState
from service.inference.decoding import DecodePool
from service.inference.device_health import DeviceHealth, why_no_gpu
from service.inference.forward import PartFunction
from service.inference.heatmaps import Explainer
from service.inference.items import Output
from service.inference.pixel_budget import PixelBudget
from service.inference.registry import parity
from service.inference.registry.loader import LoadedBackbone, ModelStatus, Served
from service.inference.registry.registry import Registry
from service.inference.results import (
    PLAIN,
    BackboneView,
    Embedding,
    ModelResults,
    ParityImage,
    Probabilities,
    Terms,
    Timings,
    Wanted,
    check_size,
)
from service.inference.traces import Traces
from service.inference.uncertainty import check, judged
from service.observability.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")
Image = (
    bytes | Tensor
)  # a file, or (C, height, width) that was preprocessed already: uint8, or float32 as `normalise` makes it

INLINE_ANSWERS = 64  # images x models whose best classes are found on the event loop: 5 ms
HANGS_AFTER_S = 60.0  # a batch may take so long at least before its device counts as lost


@dataclass(frozen=True)
class _Row:
    """One image's way through: a value for each part asked for, by backbone."""

    values: dict[LoadedBackbone, list[Tensor]]
    timings: Timings
    seen: dict[LoadedBackbone, BackboneView]


class Engine:
    """Serves what the store says is served. Made and used on one event loop."""

    def __init__(self, settings: Settings, store: ModelStore, metrics: Metrics, traces: Traces | None = None) -> None:
        self.settings, self.store, self.metrics, self.traces = settings, store, metrics, traces
        self.devices = devices(settings.device)
        self.batcher = Batcher(self.devices, metrics)
        self.catalogue = Registry(settings, store, metrics, self.devices, self.batcher)
        self._limits = settings.limits()
        self._pixels = PixelBudget(settings.max_megapixels_in_flight * 10**6, max(1, settings.decoders - 1))
        self._decoders = DecodePool(settings.decoders)
        self._explainer = Explainer(store, self._decoders)
        self.device_note = why_no_gpu(settings.device, self.devices)
        self._health = DeviceHealth(self.batcher, self._hangs_after_s)
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    # Life

    def start(self) -> None:
        """Starts the device threads and begins to load; returns at once. `ready` once the default model is warm."""
        self.batcher.start()
        self.catalogue.start()
        self._health.start()

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Returns when everything that can be loaded is; raises NotReady with the reason when the default model is not."""
        async with asyncio.timeout(timeout_s):
            await self.catalogue.wait_loaded()
        if not self.ready:
            raise NotReady(self.not_ready_reason())

    @property
    def ready(self) -> bool:
        return self.catalogue.ready and not self.draining and not self._decoders_stuck

    @property
    def live(self) -> bool:
        """A device works, and each served backbone is on one that does."""
        served = self.catalogue.served.values()
        return self._health.answers(backbone for one in served for backbone in one.backbones)

    def device_states(self) -> dict[str, DeviceState]:
        """A `lost` device stays so until the process is started again."""
        return {str(device): state for device, state in self._health.states().items()}

    def _hangs_after_s(self) -> float:
        return max(HANGS_AFTER_S, 2 * self.settings.timeout_ms / 1000)

    @property
    def _decoders_stuck(self) -> bool:
        """No thread has decoded anything for longer than a request may take."""
        return self._decoders.stuck_s() > self.settings.timeout_ms / 1000

    def not_ready_reason(self) -> str:
        if self.draining:
            return "the server is shutting down"
        if self._decoders_stuck:
            return f"no thread is free to decode an image for {self._decoders.stuck_s():.0f} s"
        return self.catalogue.not_ready_reason()

    async def drain(self, grace_s: float) -> bool:
        """Refuses new work and waits for what is under way; False if some of it was left after `grace_s`."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        return self._in_flight == 0

    def close(self) -> None:
        """Tells every thread to end after the work it is in, and waits for none; see `join`."""
        self._health.close()
        self.catalogue.close()
        self.batcher.close()
        self._explainer.close()
        self._decoders.close()

    def join(self, timeout_s: float) -> bool:
        """Waits for the device threads to end after `close`; False if one still works after `timeout_s`.

        The interpreter must not end before they have: a thread that returns from torch into an interpreter that is being torn down
        aborts the process (SIGABRT). Where this is False, leave by `os._exit`.
        """
        return self.batcher.join(timeout_s)

    # Answers

    async def predict(
        self,
        files: Sequence[bytes],
        models: Sequence[str] = (),
        k: int = 5,
        timeout_ms: int | None = None,
        wanted: Wanted = PLAIN,
        client: str = "",
    ) -> list[ModelResults]:
        """Classifies images with one or more models (none: the default), one forward pass per backbone.

        Raises ModelNotFound, QueueFull, NotReady, DeadlineExceeded, NotProvided; an image's own error stands in its place.
        """
        bound = [self.catalogue.bind(name) for name in dict.fromkeys(models)] or [self.catalogue.bind(None)]
        for served in bound:
            check(served, wanted)
        check_size(len(files), [len(served.config.classes) for served in bound], k, wanted)
        explain, deadline = wanted.explain, self._deadline(timeout_ms)
        terms = Terms(timeout_ms, client=client, model=_names(bound), explained=explain is not None, judged=True)
        scored = await self._counted(files, bound, terms)

        def judge() -> list[ModelResults]:
            return [judged(s.answer(k), served, s, wanted) for served, s in zip(bound, scored, strict=True)]

        small = len(files) * len(bound) <= INLINE_ANSWERS
        answers = judge() if small else await self._decoders.run(client, judge)
        if explain is None:
            return answers
        async with self._until(deadline):
            return [
                await self._explainer.explained(answer, served, scores, explain, client)
                for answer, served, scores in zip(answers, bound, scored, strict=True)
            ]

    async def infer(
        self,
        images: Sequence[Image],
        served: Served,
        timeout_ms: int | None = None,
        head_start_s: float = 0.0,
        client: str = "",
    ) -> Probabilities:
        """The probabilities of all classes, by a version that `bind` gave. In the queue it is as if it had come `head_start_s` earlier.

        Raises QueueFull, DeadlineExceeded; an image's own error stands in its place.
        """
        [scores] = await self._counted(images, [served], Terms(timeout_ms, head_start_s, client, _names([served])))
        return scores

    def is_served(self, name: str) -> bool:
        return name in self.catalogue.served

    def bind(self, name: str, version: int | None = None) -> Served:
        """The version that answers now. Raises NotReady, and ModelNotFound also where another than `version` is served."""
        served = self.catalogue.bind(name)
        if version is not None and version != served.config.version:
            raise ModelNotFound(f"this version of the model is not served; version {served.config.version} is")
        return served

    async def _counted(self, images: Sequence[Image], bound: Sequence[Served], terms: Terms) -> list[Probabilities]:
        """The scores, with what metrics and statistics make of them."""
        started = time.monotonic()
        try:
            answered = await self._scores(images, bound, terms)
        except BaseException:
            for served in bound:
                served.statistics.failure.add(time.monotonic() - started)
            raise
        for served, scores in zip(bound, answered, strict=True):
            served.statistics.answered(scores, time.monotonic() - started)
            for result in scores.results:
                self.metrics.image(result.code if isinstance(result, ModelError) else "ok")
        return answered

    async def _scores(self, images: Sequence[Image], bound: Sequence[Served], terms: Terms) -> list[Probabilities]:
        wanted: dict[LoadedBackbone, list[PartFunction]] = {}
        slots: list[list[tuple[LoadedBackbone, int]]] = []  # for each model, where the values of its parts will stand
        near: dict[Served, int] = {}  # and where its distances
        for served in bound:
            slots.append([])
            for backbone, part in zip(served.backbones, served.parts, strict=True):
                wanted.setdefault(backbone, []).append(part)
                slots[-1].append((backbone, len(wanted[backbone]) - 1))
            if terms.judged and served.near is not None:
                wanted[served.backbones[0]].append(served.near)
                near[served] = len(wanted[served.backbones[0]]) - 1
        rows = await self._rows(images, wanted, terms)
        timings = _slowest(rows)
        return [
            Probabilities(
                served.config,
                await self._joined(served, places, rows, terms.client),
                timings,
                _seen(served, rows),
                _near(served, near, rows),
            )
            for served, places in zip(bound, slots, strict=True)
        ]

    async def _joined(
        self,
        served: Served,
        places: Sequence[tuple[LoadedBackbone, int]],
        rows: Sequence["_Row | ModelError"],
        client: str,
    ) -> list[Tensor | ModelError]:
        """The parts of each image joined to its probabilities. An ensemble's joining computes, and goes to the pool."""

        def joined() -> list[Tensor | ModelError]:
            return [
                row
                if isinstance(row, ModelError)
                else served.probabilities([row.values[b][slot] for b, slot in places])
                for row in rows
            ]

        if len(places) == 1:
            return joined()
        return await self._decoders.run(client, joined)

    async def embed(
        self, files: Sequence[bytes], model: str | None = None, timeout_ms: int | None = None, client: str = ""
    ) -> Embedding:
        """The features on which a model's head stands, through the same queues and batches."""
        served = self.catalogue.bind(model)
        wanted: dict[LoadedBackbone, list[PartFunction]] = {backbone: [_features] for backbone in served.backbones}
        rows = await self._rows(files, wanted, Terms(timeout_ms, client=client, model=_names([served])))
        results = [
            row if isinstance(row, ModelError) else torch.cat([row.values[b][0] for b in served.backbones])
            for row in rows
        ]
        return Embedding(
            served.config.name,
            served.config.version,
            results,
            _slowest(rows),
        )

    def _deadline(self, timeout_ms: int | None) -> float:
        """time.monotonic()"""
        return time.monotonic() + min(timeout_ms or self.settings.timeout_ms, self.settings.timeout_ms) / 1000

    @contextlib.asynccontextmanager
    async def _until(self, deadline: float) -> AsyncIterator[None]:
        """Work under way, for which the server waits before it ends. Raises DeadlineExceeded."""
        timeout_s = deadline - time.monotonic()
        with self._under_way():
            try:
                async with asyncio.timeout(timeout_s):
                    yield
            except (TimeoutError, DeadlineExceeded):
                self.metrics.reject("deadline")
                raise DeadlineExceeded(f"no answer within {timeout_s * 1000:.0f} ms") from None

    async def _rows(
        self, files: Sequence[Image], wanted: dict[LoadedBackbone, list[PartFunction]], terms: Terms
    ) -> list[_Row | ModelError]:
        """Each image through each backbone: its values, or the error that concerns it alone."""
        deadline = self._deadline(terms.timeout_ms)
        size = sum(data.nbytes if isinstance(data, Tensor) else len(data) for data in files)
        with contextlib.ExitStack() as admitted:
            for backbone in wanted:
                admitted.enter_context(backbone.queue.admit(len(files), size, (terms.client, terms.model)))
            async with self._until(deadline):
                rows = _answered(await asyncio.gather(*(self._row(data, wanted, deadline, terms) for data in files)))
        return rows

    async def _row(
        self, data: Image, wanted: dict[LoadedBackbone, list[PartFunction]], deadline: float, terms: Terms
    ) -> _Row | ModelError | ServiceError:
        """Never leaves anything of this image in a queue behind, except when it is cancelled, and then the cut drops it."""
        started, request = time.monotonic(), self.traces.request() if self.traces else None
        kinds = dict.fromkeys(backbone.ref.preprocessing for backbone in wanted)
        try:
            decoding = (self._decode(data, kind, deadline, terms) for kind in kinds)
            pixels = dict(zip(kinds, await asyncio.gather(*decoding), strict=True))
        except images.OutOfTime:
            return DeadlineExceeded("no answer in time")
        except ImageError as error:
            if self.traces:
                self.traces.decoded(request, started, error)
            return error
        decoded = time.monotonic()
        if self.traces:
            self.traces.decoded(request, started)
        outcomes = await asyncio.gather(
            *(
                self.batcher.submit(
                    backbone.queue,
                    pixels[backbone.ref.preprocessing],
                    parts,
                    deadline,
                    terms.head_start_s,
                    terms.explained and backbone.mapped,
                    request,
                    (terms.client, terms.model),
                )
                for backbone, parts in wanted.items()
            ),
            return_exceptions=True,
        )
        outputs: list[Output] = []
        for outcome in outcomes:
            if isinstance(outcome, ModelError | ServiceError):
                return outcome
            if isinstance(outcome, BaseException):
                raise outcome
            outputs.append(outcome)
        if self.traces:
            self.traces.computed(request, outputs)
        timings = Timings(
            decode=(decoded - started) * 1000,
            queue=max(output.queue_ms for output in outputs),
            compute=max(output.compute_ms for output in outputs),
        )
        self._observe(timings)
        by_backbone = dict(zip(wanted, outputs, strict=True))
        seen = (
            {b: BackboneView(pixels[b.ref.preprocessing], o.map) for b, o in by_backbone.items()}
            if terms.explained
            else {}
        )
        return _Row({b: output.values for b, output in by_backbone.items()}, timings, seen)

    async def _decode(self, data: Image, preprocessing: Preprocessing, deadline: float, terms: Terms) -> Tensor:
        """An image -> uint8 (C, height, width), in the decode pool; while too many pixels are in memory it waits. Raises OutOfTime."""
        if isinstance(data, Tensor):
            if data.dtype == torch.uint8:
                return data
            return await self._decoders.run(terms.client, partial(images.unnormalise, data, preprocessing), terms.model)
        left = threading.Event()
        work = partial(images.decode, data, preprocessing, self._limits, self._pixels.hold, deadline, left.is_set)
        try:
            while True:
                try:
                    return await self._decoders.run(terms.client, work, terms.model)
                except images.NoRoom as full:
                    await self._pixels.room(full.pixels)
        finally:
            left.set()  # a thread that still decodes for a caller who has left stops

    @contextlib.contextmanager
    def _under_way(self) -> Iterator[None]:
        self._in_flight += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    def _observe(self, timings: Timings) -> None:
        self.metrics.stage("decode", timings.decode / 1000)
        self.metrics.stage("queue", timings.queue / 1000)
        self.metrics.stage("compute", timings.compute / 1000)

    # What is served

    async def sync(self) -> None:
        """Makes memory equal to the store; see Catalogue."""
        await self.catalogue.sync()

    async def activate(self, name: str, version: int, samples: Sequence[ParityImage] = ()) -> ModelStatus:
        """Swaps a version in, once it has been tried: each of `samples` must get the features and probabilities that it is said to
        have, from its bytes on. Raises ModelNotFound, NameConflict and WeightsError; then everything is as it was."""
        return await self.catalogue.activate(name, version, partial(self._compare, samples))

    async def rollback(self, name: str) -> ModelStatus:
        """The same with the version that served before."""
        return await self.catalogue.rollback(name)

    async def retire(self, name: str) -> None:
        """Takes a model out of service; its versions stay in the store. Raises ModelNotFound, NameConflict."""
        await self.catalogue.retire(name)

    async def check_removable(self, name: str) -> None:
        """Raises NameConflict for a model that a setting names."""
        await self.catalogue.check_removable(name)

    async def pull(self, name: str, progress: DownloadProgress, as_name: str | None = None) -> ModelConfig:
        """Downloads published weights and serves them; `progress` is called in a thread. See `Catalogue.pull`."""
        return await self.catalogue.pull(name, progress, as_name)

    def models(self) -> list[ModelStatus]:
        """Every model that is served, being loaded, or failed to load, by name."""
        return self.catalogue.models()

    def model(self, name: str) -> ModelStatus:
        """Raises ModelNotFound."""
        return self.catalogue.model(name)

    async def _compare(self, samples: Sequence[ParityImage], served: Served) -> None:
        """What serving makes of an image must be what training made of it. Raises WeightsError that names the first that differs."""
        if not samples:
            return
        wanted: dict[LoadedBackbone, list[PartFunction]] = {backbone: [_features] for backbone in served.backbones}
        slots: list[tuple[LoadedBackbone, int]] = []
        for backbone, part in zip(served.backbones, served.parts, strict=True):
            wanted[backbone].append(part)
            slots.append((backbone, len(wanted[backbone]) - 1))
        values = []
        for sample, row in zip(samples, await self._rows([s.data for s in samples], wanted, Terms()), strict=True):
            if isinstance(row, ModelError):
                raise WeightsError(f"{sample.name}, an image of its training, is refused here: {row}")
            values.append(row.values)
        features = [torch.stack([of_one[backbone][0] for of_one in values]) for backbone in served.backbones]
        answered = torch.cat(
            [served.probabilities([one[backbone][slot] for backbone, slot in slots]) for one in values]
        )
        parity.check(samples, served, features, answered)


def _names(bound: Sequence[Served]) -> str:
    """Returns the models of a request as one key, by which images wait."""
    return bound[0].config.name if len(bound) == 1 else " ".join(served.config.name for served in bound)


def _features(features: Tensor) -> Tensor:
    """The part that `embed` asks for: the features themselves."""
    return features


def _seen(served: Served, rows: Sequence[_Row | ModelError]) -> list[list[BackboneView]]:
    """Of each image by each of the model's backbones; of a bad image, and where nobody asked, nothing."""
    return [[row.seen[b] for b in served.backbones] if isinstance(row, _Row) and row.seen else [] for row in rows]


def _near(served: Served, slots: Mapping[Served, int], rows: Sequence[_Row | ModelError]) -> list[Tensor | None]:
    slot, first = slots.get(served), served.backbones[0]
    return [None if slot is None or isinstance(row, ModelError) else row.values[first][slot] for row in rows]


def _answered(rows: Sequence[_Row | ModelError | ServiceError]) -> list[_Row | ModelError]:
    """The rows; raises what befell the server and not an image: nobody gets half an answer."""
    answered: list[_Row | ModelError] = []
    for row in rows:
        if isinstance(row, ServiceError):
            raise row
        answered.append(row)
    return answered


def _slowest(rows: Sequence[_Row | ModelError]) -> Timings:
    return Timings.slowest([row.timings for row in rows if isinstance(row, _Row)])
