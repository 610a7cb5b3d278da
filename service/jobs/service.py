"""`Jobs`, which the routes call. Blocking calls run in a pool of its own."""

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from models.files.atomic_files import locked, sweep
from models.store.store import ModelStore
from models.training.job.job_files import REPORT, REPORT_PAGE
from models.training.job.request import FinetuneRequest
from service import datasets
from service.errors import ReportNotFound, ServiceError, TrainerUnavailable
from service.inference.engine import Engine
from service.inference.parity import deploy
from service.inference.results import ParityImage
from service.jobs.dry_run import STAGING_LOCK, dry_run
from service.jobs.events import EVENTS, Tail, append, append_queued
from service.jobs.job import ACTIVE, ID_PATTERN, TERMINAL, Job
from service.jobs.trainer import TRAINER, Trainers
from service.settings import Settings

if TYPE_CHECKING:
    from service.jobs.table import JobTable
    from service.jobs.worker import Worker

log = logging.getLogger(__name__)

T = TypeVar("T")

READY_S = 60.0  # after so long the jobs start, even if the models are not ready
REOPEN_S = 30.0  # between two attempts to open the database
CLOSE_S = 15.0  # for a trainer to be ended at the server's end
COUNT_S = 1.0  # for the database to answer a request for metrics


@dataclass(frozen=True)
class Opened:
    """The jobs database, and the worker on its jobs."""

    table: "JobTable"
    worker: "Worker"
    closing: ExitStack


class Jobs:
    """Opens and imports nothing before the first call, unless there is a jobs database already: a server that never trains pays
    nothing. Made and used on one event loop."""

    def __init__(self, settings: Settings, engine: Engine, store: ModelStore, trainer: Sequence[str] = TRAINER) -> None:
        self.settings, self.engine, self.store = settings, engine, store
        self.folders = settings.data / "jobs"
        self._trainers = Trainers(settings.trainer_cores, trainer, settings.device)
        self._pool = ThreadPoolExecutor(8, "jobs")
        self._opening: asyncio.Future[Opened] | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._dry_running = asyncio.Lock()
        self._closing = threading.Event()

    # Start and end

    def start(self) -> None:
        """Goes on with the jobs of the last run, once the models serve; returns at once."""
        if self._any_before:
            self._resuming = asyncio.create_task(self._resume())

    async def _resume(self) -> None:
        with suppress(ServiceError, TimeoutError):  # a server without a model can train its first
            await self.engine.wait_ready(READY_S)
        while True:
            try:
                await self._opened()
                return
            except TrainerUnavailable as error:
                log.error("no jobs for now: %s", error)
                await asyncio.sleep(REOPEN_S)

    async def close(self) -> None:
        """Ends the trainer, whose job the next start goes on with."""
        self._closing.set()
        if self._resuming is not None:
            self._resuming.cancel()
        opening, self._opening = self._opening, None
        if opening is not None:
            with suppress(TrainerUnavailable):
                await self._in_pool((await opening).closing.close)
        await asyncio.to_thread(self._trainers.close)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _leaving(self) -> bool:
        return self._closing.is_set() or self.engine.draining

    @property
    def _any_before(self) -> bool:
        """True if there is a database, and so there may be jobs in it."""
        return bool(self.settings.jobs_database) or self._sqlite.exists()

    @property
    def _sqlite(self) -> Path:
        return self.settings.data.resolve() / "jobs.sqlite"

    async def _opened(self) -> Opened:
        """Opens the database at the first call, and again after a failure. Raises TrainerUnavailable with the reason."""
        if self._opening is None or (self._opening.done() and self._opening.exception() is not None):
            loop = asyncio.get_running_loop()
            self._opening = loop.run_in_executor(self._pool, self._open, loop)
        return await asyncio.shield(self._opening)

    def _open(self, loop: asyncio.AbstractEventLoop) -> Opened:
        started = time.monotonic()
        with ExitStack() as closing:
            try:
                self.folders.mkdir(parents=True, exist_ok=True)
                table = self._open_table(closing)
                self._sweep(table.ids)
                worker = self._start_worker(table, loop, closing)
            except ServiceError:
                raise
            except Exception as error:
                log.exception("the jobs could not be opened")
                raise TrainerUnavailable("the jobs cannot be opened; the server's log says why") from error
            log.info("jobs are open after %.1f s", time.monotonic() - started)
            return Opened(table, worker, closing.pop_all())

    def _open_table(self, closing: ExitStack) -> "JobTable":
        """Opens the table for this server alone, or with its heartbeat to the others."""
        from service.jobs.failover import Heartbeat
        from service.jobs.table import JobTable

        database = self.settings.jobs_database
        url = database.get_secret_value() if database else f"sqlite:///{self._sqlite}"
        if not url.startswith("postgresql"):
            closing.callback(os.close, self._lock_folder())
        table = JobTable(url, self.settings.server_name)
        closing.callback(table.close)
        if not table.shared:
            return table
        closing.callback(table.hold_name().close)
        closing.callback(Heartbeat(table).start().close)
        return table

    def _lock_folder(self) -> int:
        """Locks the data folder's jobs for this server, and returns the descriptor that holds the lock."""
        handle = os.open(self.folders / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise TrainerUnavailable(
                "another server runs the jobs of this data folder; give each a `data` of its own"
            ) from None
        return handle

    def _sweep(self, ids: Callable[[], set[str]]) -> None:
        """Removes leftovers of a killed server: folders of dry runs, and of jobs without a row."""
        with locked(self.folders / STAGING_LOCK):
            sweep(self.folders)
        folders = list(self.folders.iterdir())
        jobs = ids()  # read after the folders: a job has its row before its folder
        for folder in folders:
            if re.match(ID_PATTERN, folder.name) and folder.name not in jobs:
                log.warning("%s is left over from before, and removed", folder)
                shutil.rmtree(folder, ignore_errors=True)

    def _start_worker(self, table: "JobTable", loop: asyncio.AbstractEventLoop, closing: ExitStack) -> "Worker":
        from service.jobs.worker import Worker

        def activate(name: str, version: int, samples: Sequence[ParityImage]) -> None:
            asyncio.run_coroutine_threadsafe(deploy(self.engine, name, version, samples), loop).result()

        worker = Worker(self.settings, self.store, table, self.folders, activate, self._leaving, self._trainers)
        thread = threading.Thread(target=worker.run, name="jobs worker", daemon=True)
        closing.callback(thread.join, CLOSE_S)
        closing.callback(worker.close)
        thread.start()
        return worker

    # Calls

    async def create(self, request: FinetuneRequest, key: str | None = None) -> tuple[Job, bool]:
        """Queues a new job; or returns that of a known Idempotency-Key, and True.

        Raises DatasetError, InsufficientStorage, ReadOnlyStore, NameConflict, QueueFull, IdempotencyMismatch, TrainerUnavailable.
        """
        opened = await self._opened()
        return await self._in_pool(self._create, opened, request, key)

    def _create(self, opened: Opened, request: FinetuneRequest, key: str | None) -> tuple[Job, bool]:
        from service.jobs.table import Submission

        asked = request.model_dump(mode="json", exclude_none=True)
        sha256 = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        new = Submission(f"ftjob-{secrets.token_hex(16)}", asked, key, sha256)
        known = opened.table.replayed(new)
        if known is not None:
            return known, True
        self._check(request)
        self.store.check_writable()
        job, replayed = opened.table.add(new, self.settings.max_queued_jobs)
        if not replayed:
            self._tell(job)
            opened.worker.wake()
        return job, replayed

    def _check(self, request: FinetuneRequest) -> None:
        dataset = datasets.resolve(self.settings.datasets, request.dataset)
        datasets.check_space(dataset, self.settings.data, self.settings.weights)

    async def get(self, id: str) -> Job:
        """Raises JobNotFound."""
        return await self._in_pool((await self._opened()).table.get, id)

    async def page(self, after: str | None, limit: int) -> tuple[list[Job], bool]:
        """Returns jobs from the latest on, and True if there are more."""
        return await self._in_pool((await self._opened()).table.page, after, limit)

    async def counts(self) -> dict[str, int]:
        """Number of jobs by status; empty if the database is not open yet, or does not answer within COUNT_S."""
        none: dict[str, int] = dict.fromkeys((*ACTIVE, *TERMINAL), 0)
        opening = self._opening
        if opening is None or not opening.done() or opening.exception() is not None:
            return {} if self._any_before else none
        try:
            async with asyncio.timeout(COUNT_S):
                return none | await self._in_pool(opening.result().table.counts)
        except (TimeoutError, TrainerUnavailable):
            return {}

    async def using(self, dataset: Path) -> str | None:
        """The id of an unfinished job on this dataset, by its path under the datasets folder."""
        if self._opening is None and not self._any_before:
            return None
        return await self._in_pool((await self._opened()).table.using, dataset)

    async def cancel(self, id: str) -> Job:
        """Cancels a queued job at once, a running one within seconds. Raises JobNotFound, JobFinished."""
        table = (await self._opened()).table
        before = await self._in_pool(table.get, id)
        job = await self._in_pool(table.cancel, id)
        if job.status != before.status:
            await self._in_pool(self._tell, job)
        return job

    async def stop(self, id: str) -> Job:
        """Asks a running job to end early and keep the best. Raises JobNotFound, JobNotStarted, JobFinished."""
        return await self._in_pool((await self._opened()).table.stop, id)

    async def delete(self, id: str) -> None:
        """Removes a finished job and its files. Raises JobNotFound, JobActive."""
        await self._in_pool((await self._opened()).table.delete, id)
        await self._in_pool(shutil.rmtree, self.folders / id, True)

    def _tell(self, job: Job) -> None:
        """Adds the job's new status to its events."""
        folder = self.folders / job.id
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if job.status == "queued":
                append_queued(folder / EVENTS)
            else:
                append(folder / EVENTS, {"level": "info", "status": job.status})
        except OSError as error:
            log.warning("job %s: an event could not be written: %s", job.id, error)

    async def events(self, id: str, after: int, limit: int) -> list[dict[str, Any]]:
        """Events with a number above `after`, ascending. Raises JobNotFound."""
        await self.get(id)
        return await self.read(self.tail(id, after), limit)

    def tail(self, id: str, after: int) -> Tail:
        """A reader of the events of an existing job, for `read`."""
        return Tail(self.folders / id / EVENTS, after)

    async def read(self, tail: Tail, limit: int) -> list[dict[str, Any]]:
        return await self._in_pool(tail.read, limit)

    async def report(self, id: str, page: bool) -> bytes:
        """The report as JSON, or as an HTML page. Raises JobNotFound, ReportNotFound."""
        await self.get(id)
        try:
            return await self._in_pool((self.folders / id / (REPORT_PAGE if page else REPORT)).read_bytes)
        except FileNotFoundError:
            raise ReportNotFound("this job has no report: it is written at the end of a run that succeeds") from None

    async def dry_run(self, request: FinetuneRequest) -> dict[str, Any]:
        """The trainer's findings in the dataset, the split and the estimated time. One at a time; needs no database."""
        async with self._dry_running:
            left = threading.Event()

            def leaving() -> bool:
                return self._leaving() or left.is_set()

            def run() -> dict[str, Any]:
                self._check(request)
                return dry_run(self.settings, self.folders, self._trainers, request, leaving)

            try:
                return await self._in_pool(run)
            finally:
                left.set()  # the caller may have gone

    async def _in_pool(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)
