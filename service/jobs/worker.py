"""Runs the jobs, one at a time: starts the trainer, starts it again when it crashes, and deploys the new model.

    run:     claim the oldest job -> train -> deploy, until the server leaves
    train:   begin -> trainer process -> result.json        crashed: begin again, at most MAX_CRASHES times without getting further
                                                            disk full: begin again each minute, for a day
    deploy:  the gate's decision -> activate -> succeeded

Both may be called again for the same job, after a crash of the server at any point: the table and the files say what is left to do.
"""

import errno
import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from models.errors import ModelError, OutOfMemory
from models.files.atomic_files import replace, sweep
from models.files.records import read_record, to_json
from models.store.store import ModelStore
from models.training.job.job_files import (
    EXIT_DEVICE_LOST,
    EXIT_DISK_FULL,
    JOB,
    PARITY,
    RESULT,
    RUN,
    JobResult,
    ParitySamples,
    published,
)
from models.training.job.request import FinetuneRequest
from service.errors import (
    DeadlineExceeded,
    DeviceLost,
    JobNotFound,
    NotReady,
    QueueFull,
    ServiceError,
    TrainerUnavailable,
)
from service.inference.results import ParityImage
from service.jobs.eta import Reached
from service.jobs.events import EVENTS, append, append_queued
from service.jobs.job import Job
from service.jobs.table import Interrupted, JobTable
from service.jobs.trainer import Trainers, order_of, signal_name
from service.jobs.watch import LOOK_S, POLL_S, Watch
from service.settings import Settings

log = logging.getLogger(__name__)

MAX_CRASHES = 3  # of the trainer itself without getting further; a restart of the server is not the job's fault
MAX_ATTEMPTS = 25  # but a job during which server or trainer end so often fails
CLAIM_S = 1.0  # between two reads of the table: another server may have accepted a job, or be lost
GRACE_S = 2.0  # from SIGTERM to SIGKILL: a cancelled job is gone within 5 s
RETRY_S = 5.0  # when the database cannot be used
FULL_RETRY_S, FULL_S = 60.0, 24 * 3600.0  # when the disk is full: tried again so often, and for so long
ACTIVATE_S, ACTIVATE_RETRY_S = 60.0, 2.0  # while the server is too busy to try the new model


class Worker:
    """`run` is the body of a thread. Once `leaving()` is true, the job stays as it is for the next start of the server."""

    def __init__(
        self,
        settings: Settings,
        store: ModelStore,
        table: JobTable,
        folders: Path,
        activate: Callable[[str, int, Sequence[ParityImage]], None],
        leaving: Callable[[], bool],
        trainers: Trainers,
    ) -> None:
        self.settings, self.store, self.table, self.folders = settings, store, table, folders
        self.leaving, self.trainers = leaving, trainers
        self._activate = activate
        self._woken, self._closed = threading.Event(), False
        self._out_of_reach = set[str]()  # jobs that were logged as such

    def run(self) -> None:
        """Runs one job after the other, until `close`."""
        while not self._closed:
            try:
                job = None if self.leaving() else self.table.claim(self._reaches)
                if job is None:
                    self._woken.wait(CLAIM_S)
                    self._woken.clear()
                    continue
                self.train(job)
                self.deploy(job)
            except Interrupted as error:
                log.info("job interrupted: %s", error)
            except TrainerUnavailable as error:
                log.warning("no job can be claimed: %s", error)
                self._woken.wait(RETRY_S)
            except Exception:  # a thread that ended would leave all jobs waiting
                log.exception("the jobs go on in %.0f s", RETRY_S)
                self._woken.wait(RETRY_S)

    def wake(self) -> None:
        """Tells the worker of a new job."""
        self._woken.set()

    def close(self) -> None:
        self._closed = True
        self._woken.set()

    def _reaches(self, job: str) -> bool:
        """True if the folder of a job that another server has begun is here; logs an error once if not."""
        if not self.table.shared or (self.folders / job).is_dir():
            return True
        if job not in self._out_of_reach:
            log.error("job %s was begun by a lost server, but is not in %s: share its data folder", job, self.folders)
            self._out_of_reach.add(job)
        return False

    # Training

    def train(self, id: str) -> None:
        """Returns when the job has failed, is cancelled, or is in the phase `deploy`."""
        self._persist(self._train, id)

    def _persist(self, work: Callable[[str], None], id: str) -> None:
        """Repeats the work until the database answers and the disk has space. An unexpected error fails the job."""
        full: DiskFull | None = None
        while True:
            self._wait(0.0)
            try:
                if full is not None and not self._outwait(id, full):
                    return None
                return work(id)
            except JobNotFound:  # it was at its end already, and somebody has deleted it
                return None
            except TrainerUnavailable as error:
                log.warning("job %s: %s", id, error)
                self._wait(RETRY_S)
            except Exception as error:
                found = _disk_full(error)
                if found is None:
                    return self._break_down(id)
                if full is None or found.reached > full.reached:
                    full = found

    def _break_down(self, id: str) -> None:
        log.exception("job %s failed", id)
        with suppress(TrainerUnavailable, JobNotFound):  # then it is claimed again
            self._fail(id, "internal", "internal error; the server's log has the details")

    def _outwait(self, id: str, full: "DiskFull") -> bool:
        """Waits for the next try, or for `cancel`. Fails the job after a day, and returns False."""
        if time.monotonic() - full.since >= FULL_S:
            self._fail(id, *_DISK_FULL)
            return False
        self.table.uncount(id)
        if not full.told:
            self._tell(id, "warning", "the disk is full; free some space: the job goes on by itself")
            full.told = True
        ends = time.monotonic() + FULL_RETRY_S
        while time.monotonic() < ends and self.table.control(id).status != "cancelling":
            self._wait(LOOK_S)
        return True

    def _wait(self, seconds: float) -> None:
        ends = time.monotonic() + seconds
        while not self.leaving():
            if time.monotonic() >= ends:
                return
            time.sleep(POLL_S)
        raise Interrupted("the server leaves")

    def _train(self, id: str) -> None:
        folder = self.folders / id
        while not (folder / RESULT).exists():
            self._wait(0.0)
            if not self.table.begin(id):  # it was cancelled, or has failed
                break
            folder.mkdir(parents=True, exist_ok=True)
            if not self._attempt(self.table.get(id), folder):
                return
        self._settle(id, folder)

    def _attempt(self, job: Job, folder: Path) -> bool:
        """Runs one trainer process from its start to its end. Returns False if the job has failed."""
        sweep(folder)  # of a trainer that was killed; none is alive now
        if job.attempt > MAX_ATTEMPTS:
            return self._fail(
                job.id, "interrupted", f"server or trainer have ended {MAX_ATTEMPTS} times during this job"
            )
        try:
            order = order_of(self.settings, FinetuneRequest.model_validate(job.request))
        except ModelError as error:
            return self._fail(job.id, error.code, str(error))
        replace(folder / JOB, to_json(order))
        with suppress(OSError):
            append_queued(folder / EVENTS)  # the server that accepted the job may not have written it yet
        self._tell(job.id, status="running", message=f"attempt {job.attempt}")
        process = self.trainers.take()
        watch = Watch(self, job, process)
        try:
            process.begin(folder)
            too_much = watch.follow()
        finally:
            process.end(GRACE_S)
        if too_much:
            limit = (
                f"the trainer took more than the {self.settings.trainer_bytes >> 20} MB that trainer_memory_mb allows"
            )
            return self._fail(
                job.id, "out_of_memory", f"{limit}; take a smaller batch_size or base, or raise the limit"
            )
        if (folder / RESULT).exists() or self.table.control(job.id).status != "running":
            return True
        return self._crashed(job.id, process.returncode or 0, watch.reached, watch.stalled)

    def _crashed(self, id: str, returncode: int, reached: Reached, stalled: str | None) -> bool:
        """Counts a crash. Returns False if it fails the job. `stalled`: why the server ended the trainer. Raises DiskFull."""
        if returncode == EXIT_DISK_FULL:
            raise DiskFull(reached)
        crashes, lost = self.table.crashed(id, reached), returncode == EXIT_DEVICE_LOST
        how = stalled or ("a GPU that failed" if lost else signal_name(returncode))
        if crashes < MAX_CRASHES:
            self._tell(id, "warning", f"the trainer ended by {how}; it goes on from its checkpoint")
            return True
        if lost:
            hint = "; trainer.log in the job's folder, nvidia-smi and the kernel's log (Xid) say more"
        else:
            hint = "; memory may have run out: take a smaller batch_size or base" if how == "SIGKILL" else ""
        return self._fail(
            id,
            "device_lost" if lost else "trainer_crashed",
            f"the trainer ended {crashes} times, at last by {how}{hint}",
        )

    def _settle(self, id: str, folder: Path) -> None:
        """Copies the result from the job's folder to the table."""
        if self._settle_cancelled(id, folder) or not (folder / RESULT).exists():
            return
        result = read_record(folder / RESULT, JobResult)
        if result.error is not None:
            self._fail(id, result.error.code, result.error.message, effective=result.effective)
            return
        found = {"model": result.model, "version": result.version, "effective": result.effective}
        if not self.table.deploying(id, found | {"stop_reason": result.stop_reason, "progress": 1.0}):
            self._settle_cancelled(id, folder)

    def _settle_cancelled(self, id: str, folder: Path) -> bool:
        """Ends the job if a caller has cancelled it, also in the moment in which it ended by itself."""
        cancelling = self.table.control(id).status == "cancelling"
        if cancelling:
            self._discard(id, folder)
        return cancelling

    def _fail(self, id: str, code: str, message: str, **found: Any) -> Literal[False]:
        """Ends the job as failed, or as cancelled if a caller has cancelled it. Returns False: the job does not go on."""
        if self.table.finish(id, "failed", error={"code": code, "message": message}, **found):
            self._tell(id, "error", message, status="failed")
        else:
            self._settle_cancelled(id, self.folders / id)
        return False

    def _discard(self, id: str, folder: Path) -> None:
        """Removes all of a cancelled job but its row and its events."""
        with suppress(ModelError, FileNotFoundError):
            run, name = json.loads((folder / RUN).read_bytes())["run"], self.table.get(id).request["name"]
            if found := published(self.store, name, run):
                self.store.remove(name, found.version)
        for entry in folder.iterdir() if folder.exists() else ():
            if entry.name != EVENTS:
                shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)
        if self.table.finish(id, "cancelled"):
            self._tell(id, status="cancelled")

    # Deployment

    def deploy(self, id: str) -> None:
        """Deploys the model if the gate allows it; then the job has succeeded. The last step of every job."""
        self._persist(self._deploy, id)
        self.trainers.prepare()

    def _deploy(self, id: str) -> None:
        job = self.table.control(id)
        if job.status != "running" or job.phase != "deploy":
            return
        folder = self.folders / id
        result = read_record(folder / RESULT, JobResult)
        deployment = self._activate_if_allowed(result, folder / PARITY)
        (folder / PARITY).unlink(missing_ok=True)  # it holds images
        if self.table.finish(id, "succeeded", deployment=deployment):
            self._tell(id, status="succeeded", message=f"{result.model}@{result.version}: {deployment}")

    def _activate_if_allowed(self, result: JobResult, parity: Path) -> str:
        if result.deployment == "rejected":
            return f"rejected: {result.reason}"
        if result.deployment != "activate" or result.model is None or result.version is None:
            return result.deployment or "never"
        try:
            self._activate_patiently(result.model, result.version, _samples(parity))
        except (ModelError, ServiceError) as error:
            return f"failed: {error}"
        except Exception:  # the model is published all the same
            log.exception("%s@%d could not be activated", result.model, result.version)
            return "failed: internal error; the server's log has the details"
        return "activated"

    def _activate_patiently(self, name: str, version: int, samples: Sequence[ParityImage]) -> None:
        """Retries for a while, or after a restart, while the server is busy or has lost a GPU: that is not the model's fault."""
        ends = time.monotonic() + ACTIVATE_S
        while True:
            try:
                return self._activate(name, version, samples)
            except (QueueFull, NotReady, DeadlineExceeded, OutOfMemory, DeviceLost) as error:
                if time.monotonic() >= ends:
                    raise
                log.info("%s@%d is activated later: %s", name, version, error)
            self._wait(ACTIVATE_RETRY_S)

    def _tell(self, id: str, level: str = "info", message: str | None = None, status: str | None = None) -> None:
        self.note(id, {"level": level, "status": status, "message": message})

    def note(self, id: str, event: dict[str, Any]) -> None:
        """Adds an event to the job's events. Write errors never fail a job."""
        try:
            append(self.folders / id / EVENTS, event)
        except (OSError, ValueError) as error:
            log.warning("job %s: an event could not be written: %s", id, error)


def _samples(path: Path) -> list[ParityImage]:
    """The trainer's results for some images, if it has written them."""
    if not path.exists():
        return []
    found = ParitySamples.model_validate_json(path.read_bytes()).samples
    return [
        ParityImage(one.name, one.image, [_vector(data) for data in one.features], one.probabilities) for one in found
    ]


def _vector(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32)


_DISK_FULL = ("disk_full", "the disk was full for a day; free some space and start the job again")


class DiskFull(Exception):
    """The trainer or the server has found the disk full. `since`: monotonic seconds."""

    def __init__(self, reached: Reached = (0, 0)) -> None:
        super().__init__("the disk is full")
        self.reached, self.since, self.told = reached, time.monotonic(), False


def _disk_full(error: Exception) -> DiskFull | None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFull()
    return error if isinstance(error, DiskFull) else None
