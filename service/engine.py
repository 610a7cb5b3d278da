"""What is loaded, and what happens to an image: admission, decoding, batching, heads; and the hot swap.

    predict: bind versions -> admit -> decode pool -> BackboneQueue (batcher) -> probabilities -> top-k
    sync:    store -> load beside the old -> a probe through the real path -> one assignment; the old drains with its requests

`self._served` is never changed, only replaced: a request keeps the versions that it began with.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from models import images
from models.classifier import Preprocessing
from models.errors import ImageError, ModelError, ModelNotFound, NameConflict, WeightsError
from models.runtime import devices
from models.store import ModelStore
from service.answers import Answer, Embedding, Prediction, Sample, Timings, best
from service.batcher import Batcher, Output, Part
from service.errors import DeadlineExceeded, NotReady, ServiceError
from service.loaded import LoadedBackbone, Loader, ModelStatus, Served, ServingPlan, describe, plan_serving
from service.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)

T = TypeVar("T")

PARITY = 0.05  # of a probability, between training in float32 and serving, which may be in bfloat16


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
        self._decoders = ThreadPoolExecutor(settings.decoders, "decode")
        self._served: Mapping[str, Served] = {}
        self._default: str | None = None
        self._failures: dict[str, str] = {}
        self._loading: set[str] = set()
        self._store_error: str | None = None
        self._sync_lock = asyncio.Lock()
        self._pulls: dict[str, asyncio.Task[None]] = {}
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
            with contextlib.suppress(OSError, ModelError):  # a read-only store can be served all the same
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
            while pulls := list(self._pulls.values()):
                await asyncio.wait(pulls)
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
        for pull in self._pulls.values():
            pull.cancel()
        self.batcher.close()
        self._loader.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    # Answers

    async def predict(
        self, files: Sequence[bytes], models: Sequence[str] = (), k: int = 5, timeout_ms: int | None = None
    ) -> list[Answer]:
        """Classifies images with one or more models (none: the default), one forward pass per backbone.

        Raises ModelNotFound, QueueFull, NotReady, DeadlineExceeded; an image's own error stands in its place.
        """
        bound = [self._bind(name) for name in dict.fromkeys(models)] or [self._bind(None)]
        answers = await self._answers(files, bound, k, timeout_ms)
        for result in (result for answer in answers for result in answer.results):
            self.metrics.image(result.code if isinstance(result, ModelError) else "ok")
        return answers

    async def _answers(
        self, files: Sequence[bytes], bound: Sequence[Served], k: int, timeout_ms: int | None = None
    ) -> list[Answer]:
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
            results = await self._results(served, places, rows, k)
            answers.append(Answer(served.config.name, served.config.version, results, _slowest(rows)))
        return answers

    async def _results(
        self,
        served: Served,
        places: Sequence[tuple[LoadedBackbone, int]],
        rows: Sequence["_Row | ModelError"],
        k: int,
    ) -> list[Prediction | ModelError]:
        """The parts of each image joined to its best classes. An ensemble's joining computes, and goes to the pool."""

        def joined() -> list[Prediction | ModelError]:
            return [
                row
                if isinstance(row, ModelError)
                else best(served.probabilities([row.values[b][slot] for b, slot in places]), served.config.classes, k)
                for row in rows
            ]

        if len(places) == 1:
            return joined()
        return await asyncio.get_running_loop().run_in_executor(self._decoders, joined)

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
        if not name and self._default not in self._served:
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
                    rows = await asyncio.gather(*(self._row(data, wanted, deadline) for data in files))
                return _answered(rows)
            except (TimeoutError, DeadlineExceeded):
                self.metrics.reject("deadline")
                raise DeadlineExceeded(f"no answer within {timeout_s * 1000:.0f} ms") from None

    async def _row(
        self, data: bytes, wanted: dict[LoadedBackbone, list[Part]], deadline: float
    ) -> _Row | ModelError | ServiceError:
        """Never leaves anything of this image in a queue behind, except when it is cancelled, and then the cut drops it."""
        started = time.monotonic()
        kinds = dict.fromkeys(backbone.ref.preprocessing for backbone in wanted)
        try:
            pixels = dict(zip(kinds, await asyncio.gather(*(self._decode(data, kind) for kind in kinds)), strict=True))
        except ImageError as error:
            return error
        decoded = time.monotonic()
        outcomes = await asyncio.gather(
            *(
                self.batcher.submit(backbone.queue, pixels[backbone.ref.preprocessing], parts, deadline)
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

        What fails to load keeps its old version serving, and its error shows in `models()`. What the store lacks is pulled in the
        background, one after the other, if the setting `pull_missing` says so.
        """
        for name in await self._load_stored():
            if name not in self._pulls:
                self._pulls[name] = asyncio.create_task(self._pull(name))

    async def _pull(self, name: str) -> None:
        try:
            if await self._attempt(name, self._loader.pull(name)) is not None:
                await self._load_stored()
        finally:
            del self._pulls[name]

    async def activate(self, name: str, version: int, samples: Sequence[Sample] = ()) -> ModelStatus:
        """Loads a version beside the one that serves and tries it; only then does the store record it, and it is swapped in.

        Each of `samples` must get the probabilities that it is said to have, from its bytes on. Raises ModelNotFound, NameConflict
        (the setting `models` names others) and WeightsError; then everything is as it was.
        """
        return await self._serve(name, version, partial(self.store.activate, name, version), samples)

    async def rollback(self, name: str) -> ModelStatus:
        """The same with the version that served before. Raises NameConflict also where there is none."""
        serving = await asyncio.to_thread(self.store.serving)
        before = serving.previous.get(name)
        if before is None:
            await asyncio.to_thread(self.store.rollback, name)  # says why it cannot
            raise NameConflict(f"{name!r} was changed by someone else at the same moment; look at GET /models")
        return await self._serve(name, before, partial(self.store.rollback, name))

    async def _serve(
        self, name: str, version: int, record: Callable[[], object], samples: Sequence[Sample] = ()
    ) -> ModelStatus:
        async with self._sync_lock:
            plan = await asyncio.to_thread(plan_serving, self.settings, self.store)
            if self.settings.models and name not in plan.names:
                raise NameConflict(f"the setting `models` does not name {name!r}: the server would not load it")
            served = await self._loaded(name, version)
            await self._compare(served, samples)
            await asyncio.to_thread(record)
            self._failures.pop(name, None)
            self._served = {**self._served, name: served}
            self._default = self._default or name
            self._announce()
        return self.model(name)

    async def _loaded(self, name: str, version: int) -> Served:
        started = time.monotonic()
        try:
            served = await self._loader.load(name, version, self.batcher)
        except ModelNotFound:
            raise
        except (ModelError, ServiceError) as error:
            raise WeightsError(f"version {version} could not be loaded: {error}") from error
        self.metrics.swap_seconds.observe(time.monotonic() - started)
        return served

    async def _compare(self, served: Served, samples: Sequence[Sample]) -> None:
        """What serving makes of an image must be what training made of it. Raises WeightsError that names the first that differs."""
        if not samples:
            return
        [answer] = await self._answers([s.data for s in samples], [served], len(served.config.classes))
        for sample, found in zip(samples, answer.results, strict=True):
            if isinstance(found, ModelError):
                raise WeightsError(f"{sample.name}, an image of its training, is refused here: {found}")
            off = max(abs(p - sample.probabilities[i]) for i, p in zip(found.indices, found.probabilities, strict=True))
            if off > PARITY:
                raise WeightsError(f"{sample.name} gets other probabilities here than in training: by up to {off:.3f}")

    async def _load_stored(self) -> list[str]:
        """Loads all that is to be served and lies in the store; returns the names that are still to be pulled."""
        async with self._sync_lock:
            started = time.monotonic()
            plan = await asyncio.to_thread(plan_serving, self.settings, self.store)
            self._store_error = None
            if self._default not in self._served or plan.default in self._served:
                self._default = plan.default  # otherwise the old default answers until the new one is loaded
            self._served = {n: served for n, served in self._served.items() if n in plan.names or n == self._default}
            self._failures = {name: error for name, error in self._failures.items() if name in plan.missing}
            stale = [name for name in plan.names if not self._is_current(name, plan)]
            to_pull = [name for name in stale if name in plan.missing and self.settings.pull_missing]
            self._loading = {
                name for name in stale if name not in self._failures
            }  # a pull that failed is not under way
            await asyncio.gather(*(self._swap_in(name, plan) for name in stale if name not in to_pull))
            self._served = {n: served for n, served in self._served.items() if n in plan.names}
            self._announce()
            if stale:
                self.metrics.swap_seconds.observe(time.monotonic() - started)
            return to_pull

    def _announce(self) -> None:
        self.metrics.serve(
            (name, served.config.version, backbone.ref.key)
            for name, served in self._served.items()
            for backbone in served.backbones
        )

    def _is_current(self, name: str, plan: ServingPlan) -> bool:
        """By the whole configuration: a model that was removed and published anew begins at version 1 again."""
        return name in self._served and self._served[name].config == plan.configs.get(name)

    async def _swap_in(self, name: str, plan: ServingPlan) -> None:
        started = time.monotonic()
        served = await self._attempt(name, self._loader.load(name, plan.versions.get(name), self.batcher))
        if served is None:
            return
        self._served = {**self._served, name: served}
        if name == plan.default:
            self._default = name
        log.info("%s version %d serves after %.1f s", name, served.config.version, time.monotonic() - started)

    async def _attempt(self, name: str, work: Awaitable[T]) -> T | None:
        """The result of loading or pulling a model, or None after its failure is noted."""
        try:
            return await work
        except (ModelError, ServiceError) as error:
            self._failures[name] = str(error)
            log.error("%s could not be loaded: %s", name, error)
        except Exception:
            self._failures[name] = "an internal error; the log has the details"
            log.exception("%s could not be loaded", name)
        finally:
            self._loading.discard(name)
        return None

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


def _answered(rows: Sequence[_Row | ModelError | ServiceError]) -> list[_Row | ModelError]:
    """The rows; raises what befell the server and not an image: nobody gets half an answer."""
    answered: list[_Row | ModelError] = []
    for row in rows:
        if isinstance(row, ServiceError):
            raise row
        answered.append(row)
    return answered


def _slowest(rows: Sequence[_Row | ModelError]) -> Timings:
    timings = [row.timings for row in rows if isinstance(row, _Row)]
    return Timings(
        decode=max((t.decode for t in timings), default=0.0),
        queue=max((t.queue for t in timings), default=0.0),
        compute=max((t.compute for t in timings), default=0.0),
    )
