"""Which versions serve: from the store to memory, and every change of it.

    sync:      store -> load beside the old -> a probe through the real path -> one assignment; the old drains with its requests
    activate:  load -> probe -> the caller's own check -> the store records it -> one assignment

`served` is never changed, only replaced: a request keeps the versions that it began with.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from models.classifier import ModelConfig
from models.errors import ModelError, ModelNotFound, NameConflict, OutOfMemory, WeightsError
from models.store import packaged
from models.store.download import DownloadProgress
from models.store.store import ModelStore
from service.errors import DeviceLost, NotReady, ServiceError
from service.inference.batcher import Batcher
from service.inference.registry.loader import Loader, ModelStatus, Served, Sharers, describe, sharers_of
from service.inference.registry.served_models import ServingPlan, plan_serving
from service.observability.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)

RETRY_FIRST_S, RETRY_LONGEST_S = 5.0, 300.0  # after a load that lacked memory or lost a device; doubled each time
T = TypeVar("T")
ActivationCheck = Callable[[Served], Awaitable[None]]


class LoadFailure(NamedTuple):
    """Why a model is not served. `passing`: another try may succeed, because what it lacked may be freed, or another device is left."""

    reason: str
    passing: bool = False


async def unchecked(served: Served) -> None:
    """The loader's own probe is enough."""


class Registry:
    """The versions in memory, by name. Made and used on one event loop."""

    def __init__(
        self,
        settings: Settings,
        store: ModelStore,
        metrics: Metrics,
        devices: Sequence[torch.device],
        batcher: Batcher,
    ) -> None:
        self.settings, self.store, self.metrics, self.batcher = settings, store, metrics, batcher
        self.served: Mapping[str, Served] = {}
        self.default: str | None = None
        self._loader = Loader(settings, store, metrics, devices)
        self._failures: dict[str, LoadFailure] = {}
        self._loading: set[str] = set()
        self._store_error: str | None = None
        self._sync_lock = asyncio.Lock()
        self._pulls: dict[str, asyncio.Task[None]] = {}
        self._retries: dict[str, asyncio.Task[None]] = {}
        self._retried_at: dict[str, float] = {}  # time.monotonic() of the next try
        self._first_sync: asyncio.Task[None] | None = None

    # Life

    def start(self) -> None:
        """Begins to load; returns at once."""
        self._first_sync = asyncio.create_task(self._load_first())

    async def _load_first(self) -> None:
        try:
            with contextlib.suppress(OSError, ModelError):  # a read-only store can be served all the same
                await asyncio.to_thread(self.store.sweep)
            await self.sync()
        except Exception as error:
            log.exception("the store could not be read")
            self._store_error = str(error) if isinstance(error, ModelError) else "the log has the details"

    async def wait_loaded(self) -> None:
        """Returns when everything that can be loaded is."""
        if self._first_sync is None:
            raise RuntimeError("start() comes first")
        await asyncio.shield(self._first_sync)
        while pulls := list(self._pulls.values()):
            await asyncio.wait(pulls)

    @property
    def ready(self) -> bool:
        """The default model is warm."""
        return self.default in self.served

    def not_ready_reason(self) -> str:
        if self._store_error:
            return f"the store could not be read: {self._store_error}"
        if self.default in self._failures:
            return f"the default model {self.default!r} could not be loaded: {self._failures[self.default].reason}"
        if self.default is None and self._first_sync is not None and self._first_sync.done():
            if self.served:
                return "no default model is set: `imago models default NAME`, then POST /models/sync; or name a model"
            return "the store serves no model: pull, import or train one, then POST /models/sync"
        return "the default model is still loading"

    def close(self) -> None:
        if self._first_sync is not None:
            self._first_sync.cancel()
        for task in (*self._pulls.values(), *self._retries.values()):
            task.cancel()
        self._loader.close()

    # What is served

    def bind(self, name: str | None) -> Served:
        """The version that answers; None is the default. Raises NotReady, ModelNotFound."""
        if not name and self.default not in self.served:
            raise NotReady(self.not_ready_reason(), retry_after_s=2.0)
        served = self.served.get(name or self.default or "")
        if served is not None:
            return served
        if name in self._loading:
            raise NotReady(f"the model {name!r} is still loading", retry_after_s=2.0)
        raise ModelNotFound("no model of that name is served; GET /models lists those that are")

    async def sync(self) -> None:
        """Makes memory equal to the store: loads what is new beside what serves, then replaces it in one assignment.

        What fails to load keeps its old version serving, and its error shows in `models()`. What the store lacks is pulled in the
        background, one after the other, if the setting `pull_missing` says so; packaged weights are converted first.
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

    async def pull(self, name: str, progress: DownloadProgress, as_name: str | None = None) -> ModelConfig:
        """Published weights -> a version in the store, which serves from then on unless another of its name does.

        Raises ArchitectureNotFound, WeightsError, DownloadError, and NameConflict where the setting `models` names others.
        """
        config = await self._loader.pull(name, progress, as_name)
        if config.name not in self.served:
            await self.activate(config.name, config.version)
        return config

    async def activate(self, name: str, version: int, check: ActivationCheck = unchecked) -> ModelStatus:
        """Loads a version beside the one that serves and tries it; only then does the store record it, and it is swapped in.

        Raises ModelNotFound, NameConflict (the setting `models` names others), OutOfMemory, NotReady (a device is taken), DeviceLost,
        WeightsError and what `check` raises of the version; then everything is as it was.
        """
        return await self._serve(name, version, partial(self.store.activate, name, version), check)

    async def rollback(self, name: str) -> ModelStatus:
        """The same with the version that served before. Raises NameConflict also where there is none."""
        before = await asyncio.to_thread(self.store.previous, name)
        return await self._serve(name, before, partial(self.store.rollback, name))

    async def retire(self, name: str) -> None:
        """Takes a model out of service and out of memory; its versions stay in the store.

        Raises ModelNotFound, ReadOnlyStore, and NameConflict where a setting names it or it is the default beside others.
        """
        await self.check_removable(name)
        await asyncio.to_thread(self.store.deactivate, name)
        await self.sync()

    async def check_removable(self, name: str) -> None:
        """Raises NameConflict for a model that a setting names: without it the next start would not become ready."""
        if name == self.settings.default_model:
            raise NameConflict(f"the setting `default_model` names {name!r}; take it out there")
        plan = await asyncio.to_thread(plan_serving, self.settings, self.store)
        if self.settings.models and name in plan.names:
            raise NameConflict(f"the setting `models` names {name!r}; take it out there")

    async def _serve(
        self, name: str, version: int, record: Callable[[], object], check: ActivationCheck = unchecked
    ) -> ModelStatus:
        await asyncio.to_thread(self.store.check_writable)
        async with self._sync_lock:
            plan = await asyncio.to_thread(plan_serving, self.settings, self.store)
            if self.settings.models and name not in plan.names:
                raise NameConflict(f"the setting `models` does not name {name!r}: the server would not load it")
            served = await self._loaded(name, version)
            await check(served)
            await asyncio.to_thread(record)
            self._failures.pop(name, None)
            self.served = {**self.served, name: served}
            self.default = self.default or (await asyncio.to_thread(plan_serving, self.settings, self.store)).default
            self._announce()
        return self.model(name)

    async def _loaded(self, name: str, version: int) -> Served:
        started = time.monotonic()
        try:
            served = await self._loader.load(name, version, self.batcher)
        except (ModelNotFound, OutOfMemory, NotReady, DeviceLost):
            raise
        except (ModelError, ServiceError) as error:
            raise WeightsError(f"version {version} could not be loaded: {error}") from error
        self.metrics.swap_seconds.observe(time.monotonic() - started)
        return served

    async def _load_stored(self) -> list[str]:
        """Loads all that is to be served and lies in the store; returns the names that are still to be pulled."""
        async with self._sync_lock:
            started = time.monotonic()
            plan = await self._unpacked(await asyncio.to_thread(plan_serving, self.settings, self.store))
            self._store_error = None
            if self.default not in self.served or plan.default in self.served:
                self.default = plan.default  # otherwise the old default answers until the new one is loaded
            self.served = {n: served for n, served in self.served.items() if n in plan.names or n == self.default}
            self._failures = {name: failure for name, failure in self._failures.items() if name in plan.missing}
            stale = await asyncio.to_thread(self._stale, plan)
            to_pull = [name for name in stale if name in plan.missing and self.settings.pull_missing]
            self._loading = {
                name for name in stale if name not in self._failures
            }  # a pull that failed is not under way
            await self._swap_in_all([name for name in stale if name not in to_pull], plan)
            self.served = {n: served for n, served in self.served.items() if n in plan.names}
            if self.default not in plan.names:  # it was removed
                self.default = plan.default
            self._announce()
            if stale:
                self.metrics.swap_seconds.observe(time.monotonic() - started)
            return to_pull

    async def _unpacked(self, plan: ServingPlan) -> ServingPlan:
        """The plan after the packaged models that the store lacks are converted into it."""
        missing = [name for name in plan.names if name in plan.missing and name in packaged.NAMES]
        self._loading |= set(missing)
        for name in missing:
            await self._attempt(name, self._loader.pull(name))
        return await asyncio.to_thread(plan_serving, self.settings, self.store) if missing else plan

    def _stale(self, plan: ServingPlan) -> list[str]:
        """The models to be loaded. In a thread: comparing a thousand configurations takes 80 ms."""
        return [name for name in plan.names if not self._is_current(name, plan) and not self._is_refused(name)]

    def _is_refused(self, name: str) -> bool:
        """Its packaged weights could not be converted; the failure says why."""
        return name in packaged.NAMES and name in self._failures

    async def _swap_in_all(self, names: Sequence[str], plan: ServingPlan) -> None:
        """The default first: the server is ready as soon as it is."""
        if plan.default is not None and plan.default in names:
            await self._swap_in(plan.default, plan)
        await asyncio.gather(*(self._swap_in(name, plan) for name in names if name != plan.default))

    def _announce(self) -> None:
        self.metrics.serve(
            (name, served.config.version, backbone.ref.key)
            for name, served in self.served.items()
            for backbone in served.backbones
        )

    def _is_current(self, name: str, plan: ServingPlan) -> bool:
        """By the whole configuration: a model that was removed and published anew begins at version 1 again."""
        return name in self.served and self.served[name].config == plan.configs.get(name)

    async def _swap_in(self, name: str, plan: ServingPlan) -> None:
        started = time.monotonic()
        served = await self._attempt(name, self._loader.load(name, plan.versions.get(name), self.batcher))
        if served is None:
            return
        self._failures.pop(name, None)
        self.served = {**self.served, name: served}
        if name == plan.default:
            self.default = name
        log.info("%s version %d serves after %.1f s", name, served.config.version, time.monotonic() - started)

    async def _attempt(self, name: str, work: Awaitable[T]) -> T | None:
        """The result of loading or pulling a model, or None after its failure is noted."""
        try:
            return await work
        except (ModelError, ServiceError) as error:
            failure = self._failures[name] = LoadFailure(str(error), self._may_pass(error))
            log.error("%s could not be loaded: %s", name, error)
            if failure.passing and name not in self._retries:
                self._retries[name] = asyncio.create_task(self._retry(name))
        except Exception:
            self._failures[name] = LoadFailure("an internal error; the log has the details")
            log.exception("%s could not be loaded", name)
        finally:
            self._loading.discard(name)
        return None

    def _may_pass(self, error: Exception) -> bool:
        """Another try may succeed: memory is free then, or it goes to the devices that are left."""
        return isinstance(error, OutOfMemory | NotReady) or (isinstance(error, DeviceLost) and self.batcher.computes)

    async def _retry(self, name: str) -> None:
        """Loads it again, later and later, until it serves, fails for another reason, or is not to be served any more."""
        delay_s = RETRY_FIRST_S
        try:
            while True:
                self._retried_at[name] = time.monotonic() + delay_s
                await asyncio.sleep(delay_s)
                try:
                    await self._try_again(name)
                except (OSError, ModelError) as error:
                    log.warning("%s is not tried again now, because the store cannot be read: %s", name, error)
                if name not in self._failures or not self._failures[name].passing:
                    return
                delay_s = min(2 * delay_s, RETRY_LONGEST_S)
        finally:
            del self._retries[name], self._retried_at[name]

    async def _try_again(self, name: str) -> None:
        """Raises OSError and ModelError where the store cannot be read."""
        async with self._sync_lock:
            plan = await asyncio.to_thread(plan_serving, self.settings, self.store)
            if name not in plan.names:
                self._failures.pop(name, None)
            elif not self._is_current(name, plan):
                self._loading.add(name)
                await self._swap_in(name, plan)
                self._announce()

    def _error(self, name: str) -> str | None:
        if (failure := self._failures.get(name)) is None:
            return None
        if (at := self._retried_at.get(name)) is None or not failure.passing:
            return failure.reason
        return f"{failure.reason}; tried again in {max(0.0, at - time.monotonic()):.0f} s"

    def models(self) -> list[ModelStatus]:
        """Every model that is served, being loaded, or failed to load, by name. Safe to call from any thread."""
        served, loading = self.served, set(self._loading)
        sharers = sharers_of(served)
        return [
            self._describe(name, served.get(name), sharers, name in loading)
            for name in sorted({*served, *loading, *self._failures})
        ]

    def model(self, name: str) -> ModelStatus:
        """Raises ModelNotFound."""
        if name not in self.served and name not in self._loading and name not in self._failures:
            raise ModelNotFound("no model of that name is served; GET /models lists those that are")
        return self._describe(name, self.served.get(name), sharers_of(self.served), name in self._loading)

    def _describe(self, name: str, served: Served | None, sharers: Sharers, loading: bool) -> ModelStatus:
        return describe(name, served, sharers, default=name == self.default, loading=loading, error=self._error(name))
