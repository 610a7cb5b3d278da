"""What is loaded, and what happens to an image: admission, decoding, batching, heads; and the hot swap.

    predict: bind versions -> admit -> decode pool -> BackboneQueue (batcher) -> probabilities -> top-k
    sync:    store -> load beside the old -> a probe through the real path -> one assignment; the old drains with its requests

`self._served` is never changed, only replaced: a request keeps the versions that it began with.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from models import images
from models.classifier import ModelConfig, Preprocessing, top_k
from models.errors import ImageError, InferenceFailed, ModelError, ModelNotFound
from models.runtime import devices
from models.store import ModelStore
from service.batcher import Batcher, Part
from service.errors import DeadlineExceeded, Draining, NotReady, ServiceError
from service.loaded import LoadedBackbone, Loader, ModelStatus, Served, describe, plan_serving
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prediction:
    """The best classes of one image, best first."""

    labels: list[str]
    indices: list[int]
    probabilities: list[float]


@dataclass(frozen=True)
class Timings:
    """Where a call's time went, in ms; of several images, the slowest counts."""

    decode: float = 0.0
    queue: float = 0.0
    compute: float = 0.0


@dataclass(frozen=True)
class Answer:
    """What one model says of each image of a call, in order; an image that failed has its error in its place."""

    model: str
    version: int
    results: list[Prediction | ModelError]
    timings: Timings

    def document(self, filenames: Sequence[str | None]) -> dict[str, Any]:
        """As `POST /predict` and `imago predict --json` show it."""
        results = []
        for filename, result in zip(filenames, self.results, strict=True):
            if isinstance(result, ModelError):
                results.append(failed(filename, result))
            else:
                rows = zip(result.labels, result.indices, result.probabilities, strict=True)
                predictions = [{"label": label, "index": index, "probability": p} for label, index, p in rows]
                results.append({"filename": filename, "predictions": predictions})
        return {"model": self.model, "version": self.version, "results": results}


def failed(filename: str | None, error: ModelError) -> dict[str, Any]:
    """An image's own error, in its place among the results."""
    return {"filename": filename, "error": {"code": error.code, "message": str(error)}}


@dataclass(frozen=True)
class Embedding:
    """Feature vectors, float32 (D,) each, of one model's backbones (concatenated where there are several)."""

    model: str
    version: int
    results: list[Tensor | ModelError]
    timings: Timings


@dataclass(frozen=True)
class _Row:
    """One image's way through: a value for each part asked for, by backbone."""

    values: dict[LoadedBackbone, list[Tensor]]
    timings: Timings


class Engine:
    """Serves what the store says is served. Made and used on one event loop."""

    def __init__(self, settings: Settings, store: ModelStore, metrics: Metrics) -> None:
        self.settings, self.store, self.metrics = settings, store, metrics
        self.devices = devices(settings.device)
        self.batcher = Batcher(self.devices, metrics)
        self._loader = Loader(settings, store, metrics, self.devices)
        self._limits = settings.limits()
        self._formats = frozenset(settings.extra_formats)
        self._decoders = ThreadPoolExecutor(settings.decode_threads or torch.get_num_threads(), "decode")
        self._served: Mapping[str, Served] = {}
        self._default: str | None = None
        self._failures: dict[str, str] = {}
        self._loading: set[str] = set()
        self._store_error: str | None = None
        self._sync_lock = asyncio.Lock()
        self._first_sync: asyncio.Task[None] | None = None
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    # Life

    def start(self) -> None:
        """Starts the device threads and begins to load; returns at once. `ready` once the default model is warm."""
        self.batcher.start()
        self._first_sync = asyncio.create_task(self._load_first())

    async def _load_first(self) -> None:
        try:
            with contextlib.suppress(OSError):  # a read-only store can be served all the same
                await asyncio.to_thread(self.store.sweep)
            await self.sync()
        except Exception as error:
            log.exception("the store could not be read")
            self._store_error = str(error) if isinstance(error, ModelError) else "the log has the details"

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Returns when everything that can be loaded is; raises NotReady with the reason when the default model is not."""
        assert self._first_sync is not None, "start() comes first"  # noqa: S101
        async with asyncio.timeout(timeout_s):
            await asyncio.shield(self._first_sync)
        if not self.ready:
            raise NotReady(self.not_ready_reason())

    @property
    def ready(self) -> bool:
        return self._default in self._served and not self.draining

    @property
    def live(self) -> bool:
        """Every device thread is alive, and none has been in one batch for longer than twice the deadline."""
        limit_s = max(60.0, 2 * self.settings.timeout_ms / 1000)
        return all(
            worker.is_alive() and (worker.busy_since is None or time.monotonic() - worker.busy_since < limit_s)
            for worker in self.batcher.workers
        )

    def not_ready_reason(self) -> str:
        if self.draining:
            return "the server is shutting down"
        if self._store_error:
            return f"the store could not be read: {self._store_error}"
        if self._default in self._failures:
            return f"the default model {self._default!r} could not be loaded: {self._failures[self._default]}"
        if self._default is None and self._first_sync is not None and self._first_sync.done():
            return "the store serves no model: pull, import or train one, then POST /models/sync"
        return "the default model is still loading"

    async def drain(self, grace_s: float) -> bool:
        """Refuses new work and waits for what is under way; False if some of it was left after `grace_s`."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._idle.wait()
        return self._in_flight == 0

    def close(self) -> None:
        if self._first_sync is not None:
            self._first_sync.cancel()
        self.batcher.close()
        self._loader.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    # Answers

    async def predict(
        self, files: Sequence[bytes], models: Sequence[str] = (), k: int = 5, timeout_ms: int | None = None
    ) -> list[Answer]:
        """Classifies images with one or more models (none: the default), one forward pass per backbone.

        Raises ModelNotFound, QueueFull, NotReady, Draining, DeadlineExceeded; an image's own error stands in its place.
        """
        bound = [self._bind(name) for name in dict.fromkeys(models)] or [self._bind(None)]
        wanted: dict[LoadedBackbone, list[Part]] = {}
        slots: list[list[tuple[LoadedBackbone, int]]] = []  # for each model, where the values of its parts will stand
        for served in bound:
            slots.append([])
            for backbone, part in zip(served.backbones, served.parts, strict=True):
                wanted.setdefault(backbone, []).append(part)
                slots[-1].append((backbone, len(wanted[backbone]) - 1))
        rows = await self._rows(files, wanted, timeout_ms)
        answers = []
        for served, places in zip(bound, slots, strict=True):
            results: list[Prediction | ModelError] = []
            for row in rows:
                if isinstance(row, ModelError):
                    results.append(row)
                else:
                    values = [row.values[backbone][slot] for backbone, slot in places]
                    results.append(_prediction(served, values, k))
            answers.append(Answer(served.config.name, served.config.version, results, _slowest(rows)))
            for result in results:
                self.metrics.image(result.code if isinstance(result, ModelError) else "ok")
        return answers

    async def embed(self, files: Sequence[bytes], model: str | None = None, timeout_ms: int | None = None) -> Embedding:
        """The features on which a model's head stands, through the same queues and batches."""
        served = self._bind(model)
        rows = await self._rows(files, {backbone: [_features] for backbone in served.backbones}, timeout_ms)
        results = [
            row if isinstance(row, ModelError) else torch.cat([row.values[b][0] for b in served.backbones])
            for row in rows
        ]
        return Embedding(served.config.name, served.config.version, results, _slowest(rows))

    def _bind(self, name: str | None) -> Served:
        if self.draining:
            raise Draining("the server is shutting down; try again", retry_after_s=self.settings.drain_seconds)
        if name is None and not self.ready:
            raise NotReady(self.not_ready_reason(), retry_after_s=2.0)
        served = self._served.get(name or self._default or "")
        if served is not None:
            return served
        if name in self._loading:
            raise NotReady(f"the model {name!r} is still loading", retry_after_s=2.0)
        raise ModelNotFound("no model of that name is served; GET /models lists those that are")

    async def _rows(
        self, files: Sequence[bytes], wanted: dict[LoadedBackbone, list[Part]], timeout_ms: int | None
    ) -> list[_Row | ModelError]:
        """Each image through each backbone: its values, or the error that concerns it alone."""
        timeout_s = min(timeout_ms or self.settings.timeout_ms, self.settings.timeout_ms) / 1000
        deadline = time.monotonic() + timeout_s
        size = sum(len(data) for data in files)
        with contextlib.ExitStack() as admitted:
            for backbone in wanted:
                admitted.enter_context(backbone.queue.admit(len(files), size))
            admitted.enter_context(self._under_way())
            try:
                async with asyncio.timeout(timeout_s):
                    return await asyncio.gather(*(self._row(data, wanted, deadline) for data in files))
            except (TimeoutError, DeadlineExceeded):
                self.metrics.reject("deadline")
                raise DeadlineExceeded(f"no answer within {timeout_s * 1000:.0f} ms") from None

    async def _row(self, data: bytes, wanted: dict[LoadedBackbone, list[Part]], deadline: float) -> _Row | ModelError:
        started = time.monotonic()
        kinds = dict.fromkeys(backbone.ref.preprocessing for backbone in wanted)
        try:
            pixels = dict(zip(kinds, await asyncio.gather(*(self._decode(data, kind) for kind in kinds)), strict=True))
            decoded = time.monotonic()
            outputs = await asyncio.gather(
                *(
                    self.batcher.submit(backbone.queue, pixels[backbone.ref.preprocessing], parts, deadline)
                    for backbone, parts in wanted.items()
                )
            )
        except (ImageError, InferenceFailed) as error:
            return error
        timings = Timings(
            decode=(decoded - started) * 1000,
            queue=max(output.queue_ms for output in outputs),
            compute=max(output.compute_ms for output in outputs),
        )
        self._observe(timings)
        return _Row({b: output.values for b, output in zip(wanted, outputs, strict=True)}, timings)

    async def _decode(self, data: bytes, preprocessing: Preprocessing) -> Tensor:
        """Image bytes -> uint8 (C, crop, crop), in the decode pool."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._decoders, images.decode, data, preprocessing, self._limits, self._formats
        )

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
        """Makes memory equal to the store: loads what is new beside what serves, then replaces it in one assignment.

        What fails to load keeps its old version serving, and its error shows in `models()`.
        """
        async with self._sync_lock:
            started = time.monotonic()
            plan = await asyncio.to_thread(plan_serving, self.settings, self.store)
            self._default = plan.default
            self._served = {name: served for name, served in self._served.items() if name in plan.names}
            self._failures = {}
            stale = [name for name in plan.names if not self._is_current(name, plan.configs.get(name))]
            self._loading = set(stale)
            await asyncio.gather(*(self._swap_in(name, plan.versions.get(name)) for name in stale))
            self.metrics.serve(
                (name, served.config.version, backbone.ref.key)
                for name, served in self._served.items()
                for backbone in served.backbones
            )
            if stale:
                self.metrics.swap_seconds.observe(time.monotonic() - started)

    def _is_current(self, name: str, config: ModelConfig | None) -> bool:
        """By the whole configuration: a model that was removed and published anew begins at version 1 again."""
        return name in self._served and self._served[name].config == config

    async def _swap_in(self, name: str, version: int | None) -> None:
        started = time.monotonic()
        try:
            served = await self._loader.load(name, version, self.batcher)
        except (ModelError, ServiceError) as error:
            self._failures[name] = str(error)
            log.error("%s could not be loaded: %s", name, error)
            return
        except Exception:
            self._failures[name] = "an internal error; the log has the details"
            log.exception("%s could not be loaded", name)
            return
        finally:
            self._loading.discard(name)
        self._served = {**self._served, name: served}
        log.info("%s version %d serves after %.1f s", name, served.config.version, time.monotonic() - started)

    def models(self) -> list[ModelStatus]:
        """Every model that is served, being loaded, or failed to load, by name."""
        names = sorted({*self._served, *self._loading, *self._failures})
        return [self.model(name) for name in names]

    def model(self, name: str) -> ModelStatus:
        """Raises ModelNotFound."""
        if name not in self._served and name not in self._loading and name not in self._failures:
            raise ModelNotFound("no model of that name is served; GET /models lists those that are")
        return describe(
            name,
            self._served,
            default=name == self._default,
            loading=name in self._loading,
            error=self._failures.get(name),
        )


def _features(features: Tensor) -> Tensor:
    """The part that `embed` asks for: the features themselves."""
    return features


def _prediction(served: Served, values: Sequence[Tensor], k: int) -> Prediction:
    indices, probabilities = top_k(served.probabilities(values), k)
    return Prediction([served.config.classes[i] for i in indices[0]], indices[0], probabilities[0])


def _slowest(rows: Sequence[_Row | ModelError]) -> Timings:
    timings = [row.timings for row in rows if isinstance(row, _Row)]
    return Timings(
        decode=max((t.decode for t in timings), default=0.0),
        queue=max((t.queue for t in timings), default=0.0),
        compute=max((t.compute for t in timings), default=0.0),
    )
