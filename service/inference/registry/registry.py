"""The served versions in memory, and every change of them.

    sync:      store -> load beside the old version -> probe -> one assignment; the old version ends with its requests
    activate:  load -> probe -> serve: the store records it -> one assignment
    deploy:    load -> probe -> parity check (parity.py) -> serve

The probe is a plain image on the path of requests. An entry's `served` is never changed, only replaced, so a request keeps the versions
with which it began.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from models.classifier import ModelConfig
from models.errors import ModelError, ModelNotFound, NameConflict, OutOfMemory, WeightsError
from models.progress import DownloadProgress
from models.store import packaged
from models.store.store import ModelStore
from service.errors import DeviceLost, NotReady, ServiceError
from service.inference.batcher import Batcher
from service.inference.registry.loader import Loader, ModelStatus, Served, Sharers, describe, sharers_of
from service.inference.registry.served_models import ServingPlan, plan_serving
from service.observability.metrics import Metrics
from service.settings import Settings

log = logging.getLogger(__name__)

RETRY_FIRST_S, RETRY_LONGEST_S = (
    5.0,
    300.0,
)  # after a load that failed for lack of memory or a lost device; doubled each time
UNKNOWN = "no model of that name is served; GET /models lists those that are"
T = TypeVar("T")


class LoadFailure(NamedTuple):
    """The reason why a model is not served. `passing`: another try may succeed, with more free memory or on another device."""

    reason: str
    passing: bool = False


@dataclass(eq=False)
class Entry:
    """One model: the version that serves, whether one is being loaded, and why the last one failed to load."""

    served: Served | None = None
    loading: bool = False
    failure: LoadFailure | None = None
    download: asyncio.Task[None] | None = None
    retries: asyncio.Task[None] | None = None
    retried_at: float | None = None  # time.monotonic() of the next try

    @property
    def is_known(self) -> bool:
        return self.served is not None or self.loading or self.failure is not None

    @property
    def error(self) -> str | None:
        """Return why the model, or its new version, does not serve. Safe to call from any thread."""
        failure, at = self.failure, self.retried_at
        if failure is None or at is None or not failure.passing:
            return failure and failure.reason
        return f"{failure.reason}; tried again in {max(0.0, at - time.monotonic()):.0f} s"


class Registry:
    """The models in memory, by name. Made and used on one event loop."""

    def __init__(self, settings: Settings, store: ModelStore, metrics: Metrics, batcher: Batcher) -> None:
        self.settings, self.store, self.metrics, self.batcher = settings, store, metrics, batcher
        self.entries: dict[str, Entry] = {}
        self.default: str | None = None
        self._loader = Loader(settings, store, metrics, batcher.devices)
        self._store_error: str | None = None
        self._sync_lock = asyncio.Lock()
        self._first_sync: asyncio.Task[None] | None = None

    @property
    def served(self) -> dict[str, Served]:
        """Return the served versions by name. Safe to call from any thread."""
        return {name: entry.served for name, entry in list(self.entries.items()) if entry.served is not None}

    def _find(self, name: str | None) -> Entry:
        """Return a model's entry for reading; an empty one if there is none."""
        return self.entries.get(name or "") or Entry()

    def _entry(self, name: str) -> Entry:
        """Return a model's entry for changes; a new one if there is none."""
        return self.entries.setdefault(name, Entry())

    def is_served(self, name: str | None) -> bool:
        return self._find(name).served is not None

    # Start and end

    def start(self) -> None:
        """Start loading; return at once."""
        self._first_sync = asyncio.create_task(self._load_first())

    async def _load_first(self) -> None:
        try:
            with contextlib.suppress(OSError, ModelError):  # a read-only store can be served too
                await asyncio.to_thread(self.store.sweep)
            await self.sync()
        except Exception as error:
            log.exception("the store could not be read")
            self._store_error = str(error) if isinstance(error, ModelError) else "the log has the details"

    async def wait_loaded(self) -> None:
        """Wait until every model that can be loaded is."""
        if self._first_sync is None:
            raise RuntimeError("start() comes first")
        await asyncio.shield(self._first_sync)
        while downloads := [entry.download for entry in self.entries.values() if entry.download is not None]:
            await asyncio.wait(downloads)

    @property
    def ready(self) -> bool:
        """Return whether the default model is warm."""
        return self.is_served(self.default)

    def not_ready_reason(self) -> str:
        if self._store_error:
            return f"the store could not be read: {self._store_error}"
        if (failure := self._find(self.default).failure) is not None:
            return f"the default model {self.default!r} could not be loaded: {failure.reason}"
        if self.default is None and self._first_sync is not None and self._first_sync.done():
            if self.served:
                return "no default model is set: `imago models default NAME`, then POST /models/sync; or name a model"
            return "the store serves no model: pull, import or train one, then POST /models/sync"
        return "the default model is still loading"

    def close(self) -> None:
        if self._first_sync is not None:
            self._first_sync.cancel()
        for entry in self.entries.values():
            for task in (entry.download, entry.retries):
                if task is not None:
                    task.cancel()
        self._loader.close()

    # Served versions

    def bind(self, name: str | None, version: int | None = None) -> Served:
        """Return the served version of a model (None: the default). Raises NotReady, and ModelNotFound also if another version serves."""
        if not name and not self.ready:
            raise NotReady(self.not_ready_reason(), retry_after_s=2.0)
        entry = self._find(name or self.default)
        if entry.served is None:
            if entry.loading:
                raise NotReady(f"the model {name!r} is still loading", retry_after_s=2.0)
            raise ModelNotFound(UNKNOWN)
        if version is not None and version != entry.served.config.version:
            raise ModelNotFound(f"this version of the model is not served; version {entry.served.config.version} is")
        return entry.served

    async def sync(self) -> None:
        """Reload changed models from the store: load new versions beside the old ones, then replace each in one assignment.

        If a version fails to load, the old one goes on serving, and `models()` has the error. Models that the store lacks are pulled in the
        background, one after the other, if the setting `pull_missing` is on; packaged weights are converted first.
        """
        for name in await self._load_stored():
            entry = self._entry(name)
            if entry.download is None:
                entry.download = asyncio.create_task(self._download(name, entry))

    async def _download(self, name: str, entry: Entry) -> None:
        try:
            if await self._attempt(name, self._loader.pull(name)) is not None:
                await self._load_stored()
        finally:
            entry.download = None

    async def pull(self, name: str, progress: DownloadProgress, as_name: str | None = None) -> ModelConfig:
        """Pull published weights into the store, and serve the version unless another of its name is served.

        Raises ArchitectureNotFound, WeightsError, DownloadError, and NameConflict if the setting `models` does not name it.
        """
        config = await self._loader.pull(name, progress, as_name)
        if not self.is_served(config.name):
            await self.activate(config.name, config.version)
        return config

    async def activate(self, name: str, version: int) -> ModelStatus:
        """Load a version beside the one that serves and try it; then record it in the store and swap it in.

        Raises what `load` and `serve` raise; then nothing has changed.
        """
        return await self.serve(await self.load(name, version))

    async def rollback(self, name: str) -> ModelStatus:
        """Activate the version that served before. Raises NameConflict also if there is none."""
        return await self.activate(name, await asyncio.to_thread(self.store.previous, name))

    async def load(self, name: str, version: int) -> Served:
        """Load a version beside the one that serves, and try it on a plain image; nothing else changes.

        Raises ModelNotFound, NameConflict (the setting `models` does not name it), ReadOnlyStore, OutOfMemory, NotReady (a device is
        taken), DeviceLost, WeightsError.
        """
        await asyncio.to_thread(self.store.check_writable)
        plan = await asyncio.to_thread(plan_serving, self.settings, self.store)
        if self.settings.models and name not in plan.names:
            raise NameConflict(f"the setting `models` does not name {name!r}: the server would not load it")
        started = time.monotonic()
        try:
            served = await self._loader.load(name, version, self.batcher)
        except (ModelNotFound, OutOfMemory, NotReady, DeviceLost):
            raise
        except (ModelError, ServiceError) as error:
            raise WeightsError(f"version {version} could not be loaded: {error}") from error
        self.metrics.swap_seconds.observe(time.monotonic() - started)
        return served

    async def serve(self, served: Served) -> ModelStatus:
        """Record a version from `load` in the store, and swap it in. Raises ModelNotFound if the store no longer has it."""
        name = served.config.name
        async with self._sync_lock:
            await asyncio.to_thread(self.store.activate, name, served.config.version)
            entry = self._entry(name)
            entry.served, entry.failure = served, None
            self.default = self.default or (await asyncio.to_thread(plan_serving, self.settings, self.store)).default
            self._announce()
        return self.model(name)

    async def retire(self, name: str) -> None:
        """Stop serving a model, and free its memory; its versions stay in the store.

        Raises ModelNotFound, ReadOnlyStore, and NameConflict if a setting names it, or if it is the default of several.
        """
        await self.check_removable(name)
        await asyncio.to_thread(self.store.deactivate, name)
        await self.sync()

    async def check_removable(self, name: str) -> None:
        """Raise NameConflict for a model that a setting names, without which the next start would not become ready."""
        if name == self.settings.default_model:
            raise NameConflict(f"the setting `default_model` names {name!r}; take it out there")
        plan = await asyncio.to_thread(plan_serving, self.settings, self.store)
        if self.settings.models and name in plan.names:
            raise NameConflict(f"the setting `models` names {name!r}; take it out there")

    async def _load_stored(self) -> list[str]:
        """Load the models to serve that the store has; return the names that still have to be pulled."""
        async with self._sync_lock:
            started = time.monotonic()
            plan = await self._unpacked(await asyncio.to_thread(plan_serving, self.settings, self.store))
            self._store_error = None
            if not self.is_served(self.default) or self.is_served(plan.default):
                self.default = plan.default  # otherwise the old default serves until the new one is loaded
            for name, entry in self.entries.items():
                if name not in plan.names and name != self.default:
                    entry.served = None
                if name not in plan.missing:
                    entry.failure = None
            stale = await asyncio.to_thread(self._stale, plan)
            to_pull = [name for name in stale if name in plan.missing and self.settings.pull_missing]
            self._mark_loading(stale)
            await self._swap_in_all([name for name in stale if name not in to_pull], plan)
            if self.default not in plan.names:  # it was removed
                self.default = plan.default
            self._forget_others(plan)
            self._announce()
            if stale:
                self.metrics.swap_seconds.observe(time.monotonic() - started)
            return to_pull

    def _mark_loading(self, names: Sequence[str]) -> None:
        """Mark these models, and no others, as being loaded, except those whose download failed."""
        for entry in self.entries.values():
            entry.loading = False
        for name in names:
            entry = self._entry(name)
            entry.loading = entry.failure is None

    def _forget_others(self, plan: ServingPlan) -> None:
        """Remove what is not to be served from memory."""
        for name, entry in list(self.entries.items()):
            if name not in plan.names:
                entry.served = None
            if not (entry.is_known or entry.download or entry.retries):
                del self.entries[name]

    async def _unpacked(self, plan: ServingPlan) -> ServingPlan:
        """Convert packaged models that the store lacks into it, and return the new plan."""
        missing = [name for name in plan.names if name in plan.missing and name in packaged.NAMES]
        for name in missing:
            self._entry(name).loading = True
        for name in missing:
            await self._attempt(name, self._loader.pull(name))
        return await asyncio.to_thread(plan_serving, self.settings, self.store) if missing else plan

    def _stale(self, plan: ServingPlan) -> list[str]:
        """Return the models to load. Called in a thread, because comparing a thousand configurations takes 80 ms."""
        refused = {name for name in packaged.NAMES if self._find(name).failure is not None}  # could not be converted
        return [name for name in plan.names if not self._is_current(name, plan) and name not in refused]

    async def _swap_in_all(self, names: Sequence[str], plan: ServingPlan) -> None:
        """Swap in these models, the default first, with which the server becomes ready."""
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
        """Compare the whole configuration, because a model that was removed and published anew starts at version 1 again."""
        served = self._find(name).served
        return served is not None and served.config == plan.configs.get(name)

    async def _swap_in(self, name: str, plan: ServingPlan) -> None:
        started = time.monotonic()
        served = await self._attempt(name, self._loader.load(name, plan.versions.get(name), self.batcher))
        if served is None:
            return
        entry = self._entry(name)
        entry.served, entry.failure = served, None
        if name == plan.default:
            self.default = name
        log.info("%s version %d serves after %.1f s", name, served.config.version, time.monotonic() - started)

    async def _attempt(self, name: str, work: Awaitable[T]) -> T | None:
        """Return the result of loading or pulling a model; None if it failed, which the entry records."""
        entry = self._entry(name)
        try:
            return await work
        except (ModelError, ServiceError) as error:
            entry.failure = LoadFailure(str(error), self._may_pass(error))
            log.error("%s could not be loaded: %s", name, error)
            if entry.failure.passing and entry.retries is None:
                entry.retries = asyncio.create_task(self._retry(name, entry))
        except Exception:
            entry.failure = LoadFailure("an internal error; the log has the details")
            log.exception("%s could not be loaded", name)
        finally:
            entry.loading = False
        return None

    def _may_pass(self, error: Exception) -> bool:
        """Return whether another try may succeed, with more free memory or on the remaining devices."""
        return isinstance(error, OutOfMemory | NotReady) or (isinstance(error, DeviceLost) and self.batcher.computes)

    async def _retry(self, name: str, entry: Entry) -> None:
        """Try to load a model at growing intervals, until it serves, fails for another reason, or is no longer to be served."""
        delay_s = RETRY_FIRST_S
        try:
            while entry.failure is not None and entry.failure.passing:
                entry.retried_at = time.monotonic() + delay_s
                await asyncio.sleep(delay_s)
                try:
                    await self._try_again(name, entry)
                except (OSError, ModelError) as error:
                    log.warning("%s is not tried again now, because the store cannot be read: %s", name, error)
                delay_s = min(2 * delay_s, RETRY_LONGEST_S)
        finally:
            entry.retries = entry.retried_at = None

    async def _try_again(self, name: str, entry: Entry) -> None:
        """Load a model again if it is still to be served. Raises OSError and ModelError if the store cannot be read."""
        async with self._sync_lock:
            plan = await asyncio.to_thread(plan_serving, self.settings, self.store)
            if name not in plan.names:
                entry.failure = None
            elif not self._is_current(name, plan):
                entry.loading = True
                await self._swap_in(name, plan)
                self._announce()

    def models(self) -> list[ModelStatus]:
        """Return every model that is served, being loaded, or failed to load, by name. Safe to call from any thread."""
        known = [(name, entry, entry.served) for name, entry in list(self.entries.items()) if entry.is_known]
        sharers = sharers_of({name: served for name, _, served in known if served is not None})
        return [
            self._describe(name, entry, served, sharers)
            for name, entry, served in sorted(known, key=lambda model: model[0])
        ]

    def model(self, name: str) -> ModelStatus:
        """Return a model's status. Raises ModelNotFound."""
        entry = self._find(name)
        if not entry.is_known:
            raise ModelNotFound(UNKNOWN)
        return self._describe(name, entry, entry.served, sharers_of(self.served))

    def _describe(self, name: str, entry: Entry, served: Served | None, sharers: Sharers) -> ModelStatus:
        default = name == self.default
        return describe(name, served, sharers, default=default, loading=entry.loading, error=entry.error)
