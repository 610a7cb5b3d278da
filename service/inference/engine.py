"""Computes predictions: admission, decoding, batching, heads. The registry has the served versions and the hot swap.

files -> bind versions -> outputs: admit -> for each image: decode (decoding.py) -> submit to each backbone (batcher.py) -> Output
      -> probabilities of each model -> heat maps -> Prediction (results.py)
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from models.errors import ImageError, ModelError
from models.runtime import devices
from models.store.store import ModelStore
from service.errors import DeadlineExceeded, NotReady
from service.inference.backbone_queue import Flow, Item
from service.inference.batcher import Batcher, DeviceState
from service.inference.decoding import Decoder, Image
from service.inference.device_health import DeviceHealth, why_no_gpu
from service.inference.forward import features_part
from service.inference.heatmaps import Explainer
from service.inference.registry.loader import LoadedBackbone, Outputs, Served
from service.inference.registry.registry import Registry
from service.inference.results import (
    DEFAULTS,
    Explanation,
    ModelResults,
    PartFunction,
    Prediction,
    PredictOptions,
    Timings,
    check_provided,
    check_size,
    predicted,
)
from service.inference.traces import Traces
from service.observability.metrics import Metrics
from service.settings import Settings

T = TypeVar("T")

Parts = Mapping[LoadedBackbone, Sequence[PartFunction]]  # what each backbone's features are used for

INLINE_ANSWERS = 64  # images x models whose best classes are found on the event loop: 5 ms
HANGS_AFTER_S = 60.0  # the shortest time after which a device that computes one batch counts as lost


class Engine:
    """Serves the models that the store serves. Made and used on one event loop."""

    def __init__(self, settings: Settings, store: ModelStore, metrics: Metrics, traces: Traces | None = None) -> None:
        self.settings, self.store, self.metrics, self.traces = settings, store, metrics, traces
        self.devices = devices(settings.device)
        self.batcher = Batcher(self.devices, metrics)
        self.registry = Registry(settings, store, metrics, self.batcher)
        self._decoder = Decoder(settings)
        self._explainer = Explainer(store, self._decoder.pool)
        self.device_note = why_no_gpu(settings.device, self.devices)
        self._health = DeviceHealth(self.batcher, self._hangs_after_s)
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    # Start and end

    def start(self) -> None:
        """Start the device threads and the loading of models; return at once. `ready` is True when the default model is warm."""
        self.batcher.start()
        self.registry.start()
        self._health.start()

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Wait until every model that can be loaded is. Raises NotReady with the reason if the default model is not."""
        async with asyncio.timeout(timeout_s):
            await self.registry.wait_loaded()
        if not self.ready:
            raise NotReady(self.not_ready_reason())

    @property
    def ready(self) -> bool:
        return self.registry.ready and not self.draining and not self._decoders_stuck

    @property
    def live(self) -> bool:
        """Return whether each served backbone is on a device that works."""
        served = self.registry.served.values()
        return self._health.answers(backbone for one in served for backbone in one.backbones)

    def device_states(self) -> dict[str, DeviceState]:
        """Return the state of each device. A `lost` device stays lost until the process is restarted."""
        return {str(device): state for device, state in self._health.states().items()}

    def _hangs_after_s(self) -> float:
        return max(HANGS_AFTER_S, 2 * self.settings.timeout_ms / 1000)

    @property
    def _decoders_stuck(self) -> bool:
        """Return whether no thread has finished decoding for longer than a request may take."""
        return self._decoder.pool.stuck_s() > self.settings.timeout_ms / 1000

    def not_ready_reason(self) -> str:
        if self.draining:
            return "the server is shutting down"
        if self._decoders_stuck:
            return f"no thread is free to decode an image for {self._decoder.pool.stuck_s():.0f} s"
        return self.registry.not_ready_reason()

    async def drain(self, grace_s: float) -> bool:
        """Refuse new work, and wait for the current work; False if some of it is left after `grace_s`."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        return self._in_flight == 0

    def close(self) -> None:
        """Tell every thread to end after its current work, without waiting; see `join`."""
        self._health.close()
        self.registry.close()
        self.batcher.close()
        self._explainer.close()
        self._decoder.pool.close()

    def join(self, timeout_s: float) -> bool:
        """Wait for the device threads to end after `close`; False if one still works after `timeout_s`.

        The interpreter must not end before them: a thread that returns from torch into an interpreter that is being finalised aborts the
        process (SIGABRT). If the result is False, exit by `os._exit`.
        """
        return self.batcher.join(timeout_s)

    # Predictions

    async def predict(
        self, files: Sequence[bytes], models: Sequence[str] = (), options: PredictOptions = DEFAULTS
    ) -> list[ModelResults[Prediction]]:
        """Classify images with one or more models (none: the default), with one forward pass per backbone.

        Raises ModelNotFound, QueueFull, NotReady, DeadlineExceeded, NotProvided. An image's own error is its result.
        """
        bound = [self.registry.bind(name) for name in dict.fromkeys(models)] or [self.registry.bind(None)]
        for served in bound:
            check_provided(served.config, served.reference, options)
        check_size(len(files), [len(served.config.classes) for served in bound], options)
        deadline, parts = self._deadline(options), parts_of(bound)
        for served in bound:
            if served.near is not None:
                parts[served.backbones[0]].append(served.near)
        images, scores = await self._scores(files, bound, parts, options)
        heat: list[Sequence[list[Explanation] | None]] = [[None] * len(images)] * len(bound)
        if options.explain is not None:
            async with self._until(deadline):
                heat = [
                    await self._explainer.explain(served, images, answer.results, options)
                    for served, answer in zip(bound, scores, strict=True)
                ]

        def answers() -> list[ModelResults[Prediction]]:
            rows = zip(bound, scores, heat, strict=True)
            return [_predictions(served, images, answer, maps, options) for served, answer, maps in rows]

        small = len(images) * len(bound) <= INLINE_ANSWERS
        return answers() if small else await self._decoder.pool.run(options.client, answers)

    async def infer(
        self, images: Sequence[Image], served: Served, options: PredictOptions = DEFAULTS
    ) -> ModelResults[Tensor]:
        """Return each image's probabilities, (1, classes), by a version from `Registry.bind`.

        Raises QueueFull, DeadlineExceeded. An image's own error is its result.
        """
        _, [probabilities] = await self._scores(images, [served], parts_of([served]), options)
        return probabilities

    async def embed(
        self, files: Sequence[bytes], model: str | None = None, options: PredictOptions = DEFAULTS
    ) -> ModelResults[Tensor]:
        """Return the features that a model's head gets, computed in the same queues and batches."""
        served = self.registry.bind(model)
        parts = {backbone: [features_part] for backbone in served.backbones}
        images = await self.outputs(files, parts, options, served.config.name)

        def features(image: Outputs) -> Tensor:
            return torch.cat([image[backbone].values[features_part] for backbone in served.backbones])

        return _results(served, images, [i if isinstance(i, ModelError) else features(i) for i in images])

    async def _scores(
        self, files: Sequence[Image], bound: Sequence[Served], parts: Parts, options: PredictOptions
    ) -> tuple[list[Outputs | ModelError], list[ModelResults[Tensor]]]:
        """Return the outputs of each image, and their probabilities by each model; count them in metrics and statistics."""
        started = time.monotonic()
        try:
            images = await self.outputs(files, parts, options, " ".join(served.config.name for served in bound))
            scores = [_results(served, images, await self._probabilities(served, images, options)) for served in bound]
        except BaseException:
            for served in bound:
                served.statistics.failure.add(time.monotonic() - started)
            raise
        for served, answer in zip(bound, scores, strict=True):
            served.statistics.answered(answer, time.monotonic() - started)
            for result in answer.results:
                self.metrics.image(result.code if isinstance(result, ModelError) else "ok")
        return images, scores

    async def outputs(
        self, images: Sequence[Image], parts: Parts, options: PredictOptions = DEFAULTS, model: str = ""
    ) -> list[Outputs | ModelError]:
        """Run each image through each backbone; an error that concerns one image alone is its result. `model` names the images' line in the
        queue of their client.

        Raises QueueFull, DeadlineExceeded, DeviceLost: no answer is incomplete.
        """
        deadline, flow = self._deadline(options), (options.client, model)
        size = sum(image.nbytes if isinstance(image, Tensor) else len(image) for image in images)
        with contextlib.ExitStack() as admitted:
            for backbone in parts:
                admitted.enter_context(backbone.queue.admit(len(images), size, flow))
            async with self._until(deadline):
                outcomes = await _ended([self._image(image, parts, deadline, flow, options) for image in images])
                return [outcome if isinstance(outcome, ModelError) else _result(outcome) for outcome in outcomes]

    def _deadline(self, options: PredictOptions) -> float:
        """Return the deadline, as time.monotonic()."""
        most = self.settings.timeout_ms
        return time.monotonic() + min(options.timeout_ms or most, most) / 1000

    @contextlib.asynccontextmanager
    async def _until(self, deadline: float) -> AsyncIterator[None]:
        """Limit work by a deadline, and count it as in flight, so that `drain` waits for it. Raises DeadlineExceeded."""
        timeout_s = deadline - time.monotonic()
        self._in_flight += 1
        self._idle.clear()
        try:
            async with asyncio.timeout(timeout_s):
                yield
        except (TimeoutError, DeadlineExceeded):
            self.metrics.reject("deadline")
            raise DeadlineExceeded(f"no answer within {timeout_s * 1000:.0f} ms") from None
        finally:
            self._in_flight -= 1
            if self._in_flight == 0:
                self._idle.set()

    async def _image(self, image: Image, parts: Parts, deadline: float, flow: Flow, options: PredictOptions) -> Outputs:
        """Decode an image and run it through its backbones. Raises ModelError and ServiceError.

        Nothing of the image stays in a queue, except when it is cancelled: then it is dropped when its batch is cut.
        """
        started, request = time.monotonic(), self.traces.request() if self.traces else None
        kinds = list(dict.fromkeys(backbone.ref.preprocessing for backbone in parts))
        try:
            decoded = await _all([self._decoder.decode(image, kind, deadline, flow) for kind in kinds])
        except ImageError as error:
            if self.traces:
                self.traces.decoded(request, started, error)
            raise
        decode_ms = (time.monotonic() - started) * 1000
        if self.traces:
            self.traces.decoded(request, started)
        pixels = dict(zip(kinds, decoded, strict=True))
        submissions = []
        for backbone, wanted in parts.items():
            mapped = options.explain is not None and backbone.mapped
            item = Item(
                pixels[backbone.ref.preprocessing],
                wanted,
                deadline,
                options.head_start_s,
                mapped,
                flow,
                decode_ms,
                request,
            )
            submissions.append(self.batcher.submit(backbone.queue, item))
        outputs = dict(zip(parts, await _all(submissions), strict=True))
        if self.traces:
            self.traces.computed(request, list(outputs.values()))
        timings = Timings.slowest([output.timings for output in outputs.values()])
        self.metrics.stage("decode", timings.decode / 1000)
        self.metrics.stage("queue", timings.queue / 1000)
        self.metrics.stage("compute", timings.compute / 1000)
        return outputs

    async def _probabilities(
        self, served: Served, images: Sequence[Outputs | ModelError], options: PredictOptions
    ) -> list[Tensor | ModelError]:
        """Return the probabilities (1, classes) of each image. Combining an ensemble's parts is work for the pool."""

        def combined() -> list[Tensor | ModelError]:
            return [image if isinstance(image, ModelError) else probabilities_of(served, image) for image in images]

        return combined() if len(served.parts) == 1 else await self._decoder.pool.run(options.client, combined)


def parts_of(bound: Sequence[Served]) -> dict[LoadedBackbone, list[PartFunction]]:
    """Return the heads of these models by the backbone that computes their features."""
    parts: dict[LoadedBackbone, list[PartFunction]] = {}
    for served in bound:
        for backbone, part in zip(served.backbones, served.parts, strict=True):
            parts.setdefault(backbone, []).append(part)
    return parts


def probabilities_of(served: Served, outputs: Outputs) -> Tensor:
    """Return one image's probabilities, (1, classes)."""
    values = [outputs[backbone].values[part] for backbone, part in zip(served.backbones, served.parts, strict=True)]
    return values[0][None] if len(values) == 1 else served.probabilities(values)


async def _ended(works: Sequence[Coroutine[Any, Any, T]]) -> list[T | BaseException]:
    """Return what each returns or raises, when all have ended."""
    if len(works) > 1:
        return await asyncio.gather(*works, return_exceptions=True)
    try:  # saves a task
        return [await work for work in works]
    except Exception as error:
        return [error]


async def _all(works: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """Return the results. Raises the first error when all have ended."""
    return [_result(outcome) for outcome in await _ended(works)]


def _result(outcome: T | BaseException) -> T:
    if isinstance(outcome, BaseException):
        raise outcome
    return outcome


def _results(
    served: Served, images: Sequence[Outputs | ModelError], results: list[Tensor | ModelError]
) -> ModelResults[Tensor]:
    timings = [output.timings for image in images if not isinstance(image, ModelError) for output in image.values()]
    return ModelResults(served.config.name, served.config.version, results, Timings.slowest(timings))


def _predictions(
    served: Served,
    images: Sequence[Outputs | ModelError],
    scores: ModelResults[Tensor],
    heat: Sequence[list[Explanation] | None],
    options: PredictOptions,
) -> ModelResults[Prediction]:
    """Return the predictions of one model, from the probabilities of each image and the requested explanations."""

    def near(image: Outputs) -> Tensor | None:
        return None if served.near is None else image[served.backbones[0]].values[served.near]

    results = [
        image
        if isinstance(image, ModelError)
        else row
        if isinstance(row, ModelError)
        else predicted(row, served.config.classes, options, served.reference, near(image), explanations)
        for image, row, explanations in zip(images, scores.results, heat, strict=True)
    ]
    return ModelResults(scores.model, scores.version, results, scores.timings)
