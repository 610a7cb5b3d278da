"""`Jobs`: what the routes call. Everything that may block runs in a pool of its own."""

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

from models.errors import DatasetError
from models.files.atomic_files import locked, replace, staging, sweep
from models.files.records import read_record, to_json
from models.store.store import ModelStore
from models.training.job.job_files import DRY_RUN, JOB, REPORT, REPORT_PAGE, RESULT, JobResult
from models.training.job.request import FinetuneRequest
from service import datasets
from service.errors import DeadlineExceeded, Draining, ReportNotFound, ServiceError, TrainerUnavailable, error_of
from service.inference.engine import Engine
from service.inference.parity import deploy
from service.inference.results import ParityImage
from service.jobs.events import EVENTS, Tail, append
from service.jobs.job import ACTIVE, ID_PATTERN, TERMINAL, Job
from service.jobs.trainer import TRAINER, Trainers, order_of
from service.settings import Settings

if TYPE_CHECKING:
    from service.jobs.queue import Queue
    from service.jobs.table import JobTable

log = logging.getLogger(__name__)

T = TypeVar("T")

READY_S = 60.0  # after so long jobs are taken up again, even if the models are not ready
REOPEN_S = 30.0  # between two attempts to open the database
CLOSE_S = 15.0  # for a trainer to be ended at the server's end
DRY_RUN_S = 300.0
COUNT_S = 1.0  # that whoever collects metrics waits at most for the database
STAGING_LOCK = ".staging"  # of the folders of dry runs


@dataclass(frozen=True)
class Opened:
    """The jobs database, and the queue in it."""

    table: "JobTable"
    queue: "Queue"
    closing: ExitStack


class Jobs:
    """Nothing is opened, nor even imported, before the first call, unless there is a database of jobs already: a server that never
    trains pays nothing. Made and used on one event loop."""

    def __init__(self, settings: Settings, engine: Engine, store: ModelStore, trainer: Sequence[str] = TRAINER) -> None:
        self.settings, self.engine, self.store = settings, engine, store
        self.folders = settings.data / "jobs"
        self._trainers = Trainers(settings.trainer_cores, trainer, settings.device)
        self._pool = ThreadPoolExecutor(8, "jobs")
        self._opening: asyncio.Future[Opened] | None = None
        self._resuming: asyncio.Task[None] | None = None
        self._rehearsing = asyncio.Lock()
        self._closing = threading.Event()
        self._working = threading.Lock()  # held while a job is worked on
        self._lost = threading.Event()  # that job is another server's by now

    # Life

    def start(self) -> None:
        """Takes up the jobs of before, once the models serve; returns at once."""
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
                await self._in_pool(self._shut, await opening)
        await asyncio.to_thread(self._trainers.close)
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _shut(self, opened: Opened) -> None:
        if self._working.acquire(timeout=CLOSE_S):
            self._working.release()
        opened.closing.close()

    @property
    def _leaving(self) -> bool:
        return self._closing.is_set() or self.engine.draining

    @property
    def _any_before(self) -> bool:
        """Whether there is a database, and so there may be jobs in it."""
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
                table, queue = self._connect(loop, closing)
                self._sweep(table.ids)
                for job in table.unfinished():
                    queue.revive(job)
            except ServiceError:
                raise
            except Exception as error:
                log.exception("the jobs could not be opened")
                raise TrainerUnavailable("the jobs cannot be opened; the server's log says why") from error
            log.info("jobs are open after %.1f s", time.monotonic() - started)
            return Opened(table, queue, closing.pop_all())

    def _connect(self, loop: asyncio.AbstractEventLoop, closing: ExitStack) -> tuple["JobTable", "Queue"]:
        from service.jobs.table import JobTable

        database = self.settings.jobs_database
        url = database.get_secret_value() if database else f"sqlite:///{self._sqlite}"
        table = JobTable(url)
        closing.callback(table.close)
        closing.callback(self._hold(url, table))
        from service.jobs.queue import Queue
        from service.jobs.takeover import Takeover
        from service.jobs.worker import Worker

        def activate(name: str, version: int, samples: Sequence[ParityImage]) -> None:
            asyncio.run_coroutine_threadsafe(deploy(self.engine, name, version, samples), loop).result()

        def leaving() -> bool:
            return self._leaving or self._lost.is_set()

        name = self.settings.server_name
        shared = Takeover(table, name, self.folders, self._lost.set) if url.startswith("postgresql") else None
        worker = Worker(self.settings, self.store, table, self.folders, activate, leaving, self._trainers)
        queue = Queue(url, name, self._exclusive(worker.train), self._exclusive(worker.deploy))
        closing.callback(queue.close)
        if shared is not None:
            shared.start(queue)
            closing.callback(shared.close)
        return table, queue

    def _sweep(self, ids: Callable[[], set[str]]) -> None:
        """Removes what a server that was killed has left: folders of dry runs, and of jobs without a row."""
        with locked(self.folders / STAGING_LOCK):
            sweep(self.folders)
        folders = list(self.folders.iterdir())
        jobs = ids()  # asked after: a job has its row before its folder
        for folder in folders:
            if re.match(ID_PATTERN, folder.name) and folder.name not in jobs:
                log.warning("%s is left over from before, and removed", folder)
                shutil.rmtree(folder, ignore_errors=True)

    def _exclusive(self, work: Callable[[str], None]) -> Callable[[str], None]:
        def working(job: str) -> None:
            with self._working:
                self._lost.clear()
                work(job)

        return working

    def _hold(self, url: str, table: "JobTable") -> Callable[[], None]:
        """Makes sure that no other server works on the same jobs, and gives what lets go of them."""
        if url.startswith("postgresql"):
            connection = table.hold(self.settings.server_name)
            if connection is None:
                raise TrainerUnavailable(
                    "another server of this name uses the jobs database; give each a `server_name` of its own"
                )
            return connection.close
        handle = os.open(self.folders / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(handle)
            raise TrainerUnavailable(
                "another server runs the jobs of this data folder; give each a `data` of its own"
            ) from None
        return lambda: os.close(handle)

    # Jobs

    async def create(self, request: FinetuneRequest, key: str | None = None) -> tuple[Job, bool]:
        """A new job, queued; or that of an Idempotency-Key that is known, and True.

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
        if known is None:
            self._check(request)
            self.store.check_writable()
            job, replayed = opened.table.add(new, self.settings.max_queued_jobs)
        else:
            job, replayed = known, True
        if not replayed:
            self._tell(job)
        if job.queue_position == 1 and not self._working.locked():
            self._trainers.prepare()
        if job.status == "queued":  # also one of before: the server may have ended between the table and the queue
            opened.queue.put(job.id)
        return job, replayed

    def _check(self, request: FinetuneRequest) -> None:
        dataset = datasets.resolve(self.settings.datasets, request.dataset)
        datasets.check_space(dataset, self.settings.data, self.settings.weights)

    async def get(self, id: str) -> Job:
        """Raises JobNotFound."""
        return await self._in_pool((await self._opened()).table.get, id)

    async def page(self, after: str | None, limit: int) -> tuple[list[Job], bool]:
        """Jobs from the latest on, and whether there are more."""
        return await self._in_pool((await self._opened()).table.page, after, limit)

    async def counts(self) -> dict[str, int]:
        """How many jobs there are in each status; empty where the database is not open yet, or does not answer within COUNT_S."""
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
        """The id of a job that is not at its end and has this dataset, by its path under the datasets folder."""
        if self._opening is None and not self._any_before:
            return None
        return await self._in_pool((await self._opened()).table.using, dataset)

    async def cancel(self, id: str) -> Job:
        """A queued job is cancelled at once, a running one within seconds. Raises JobNotFound, JobFinished."""
        table = (await self._opened()).table
        before = await self._in_pool(table.get, id)
        job = await self._in_pool(table.cancel, id)
        if job.status != before.status:
            await self._in_pool(self._tell, job)
        return job

    async def stop(self, id: str) -> Job:
        """A running job ends early and keeps the best. Raises JobNotFound, JobNotStarted, JobFinished."""
        return await self._in_pool((await self._opened()).table.stop, id)

    async def delete(self, id: str) -> None:
        """Removes a job that is at its end, and its files. Raises JobNotFound, JobActive."""
        opened = await self._opened()
        await self._in_pool(opened.table.delete, id)
        await self._in_pool(shutil.rmtree, self.folders / id, True)
        await self._in_pool(opened.queue.forget, id)

    def _tell(self, job: Job) -> None:
        """A new status, as an event."""
        folder = self.folders / job.id
        try:
            folder.mkdir(parents=True, exist_ok=True)
            append(folder / EVENTS, {"level": "info", "status": job.status})
        except OSError as error:
            log.warning("job %s: an event could not be written: %s", job.id, error)

    async def events(self, id: str, after: int, limit: int) -> list[dict[str, Any]]:
        """Events with a number above `after`, ascending. Raises JobNotFound."""
        await self.get(id)
        return await self.read(self.tail(id, after), limit)

    def tail(self, id: str, after: int) -> Tail:
        """For whoever follows the events of a job that there is; `read` reads it."""
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

    # Dry runs

    async def dry_run(self, request: FinetuneRequest) -> dict[str, Any]:
        """What the trainer finds in the dataset, how it would split it, and what it would take. One at a time; needs no database."""
        async with self._rehearsing:
            left = threading.Event()
            try:
                return await self._in_pool(self._rehearse, request, left)
            finally:
                left.set()  # the caller may have gone

    def _rehearse(self, request: FinetuneRequest, left: threading.Event) -> dict[str, Any]:
        self._check(request)
        with staging(self.folders, self.folders / STAGING_LOCK) as folder:
            replace(folder / JOB, to_json(order_of(self.settings, request)))
            self._run_dry(folder, left)
            result = read_record(folder / RESULT, JobResult)
            if result.error is not None:
                raise error_of(result.error.code, result.error.message)
            found: dict[str, Any] = json.loads((folder / DRY_RUN).read_bytes())
            return found

    def _run_dry(self, folder: Path, left: threading.Event) -> None:
        ends = time.monotonic() + DRY_RUN_S
        process = self._trainers.take()
        try:
            process.begin(folder, dry_run=True)
            while process.returncode is None:
                process.events(0.1)
                if self._leaving or left.is_set():
                    raise Draining("the server is shutting down")
                if process.memory_bytes() > self.settings.trainer_bytes:
                    limit = f"the {self.settings.trainer_bytes >> 20} MB that trainer_memory_mb allows"
                    raise DatasetError(f"the dry run took more than {limit}; split the dataset, or raise the limit")
                if time.monotonic() > ends:
                    raise DeadlineExceeded(f"the dry run took more than {DRY_RUN_S:.0f} s; start the job instead")
        finally:
            process.end(grace_s=1.0)
            self._trainers.prepare()  # the job itself is likely to follow
        if not (folder / RESULT).exists():
            raise TrainerUnavailable("the trainer ended without a result; the dataset may be too large for its memory")

    async def _in_pool(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, work, *args)
