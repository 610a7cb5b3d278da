"""Follows one trainer process, from its start to its end."""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from service.errors import TrainerUnavailable
from service.jobs.eta import Eta, Reached
from service.jobs.job import Job
from service.jobs.table import Interrupted, JobTable
from service.jobs.trainer import TrainerProcess, Trainers
from service.settings import Settings

log = logging.getLogger(__name__)

POLL_S = 0.25  # longest wait for the trainer's next events
LOOK_S = 0.5  # between two writes of the progress to the table, and reads of `stop` and `cancel`
EVENT_S, EVENT_STEP = 10.0, 0.02  # plain progress becomes an event after so long, or so much of a phase
IDLE_S, IDLE_CPU_S = 120.0, 0.1  # neither an event nor CPU time; at nice 19 beside a full load it gets 1 s and more
SILENT_S = 3600.0  # no event, whatever it computes: far more than any batch, file or fit takes
CPU_LOOK_S = 10.0  # how often a silent trainer's CPU time is read


class Host(Protocol):
    """The part of the worker that a Watch needs."""

    settings: Settings
    table: JobTable
    trainers: Trainers
    leaving: Callable[[], bool]

    def note(self, id: str, event: dict[str, Any]) -> None: ...


class Watch:
    """One trainer process: its lines become events and progress, and callers' `stop` and `cancel` reach it."""

    def __init__(self, host: Host, job: Job, process: TrainerProcess) -> None:
        self._host, self._job, self._process = host, job, process
        self._limit = host.settings.trainer_bytes
        self._eta = Eta(job.request["mode"], job.progress)
        self._phase: str | None = None
        self._looked = self._noted = 0.0  # monotonic seconds
        self._noted_at = 0.0  # progress of the phase at the last event
        self._told = -1.0  # progress of the job in the table
        self._asked = self._prepared = False
        self._stall = Stall(process)
        self.stalled: str | None = None  # the reason if it was ended

    @property
    def reached(self) -> Reached:
        return self._eta.reached

    def follow(self) -> bool:
        """Returns when the process has ended or has to be ended: True if it takes too much memory. Raises Interrupted."""
        while True:
            ended = self._process.returncode is not None  # read first: its last events are read below
            events = self._process.events(POLL_S)
            for event in events:
                self._hear(event)
            if ended and not events:
                return False
            if self._host.leaving():
                raise Interrupted("the server leaves")
            if self._process.memory_bytes() > self._limit:
                return True
            if not ended and (stalled := self._stall.reason(events)):
                self.stalled = f"the server: {stalled}"
                return False
            if time.monotonic() - self._looked >= LOOK_S and not self._look():
                return False

    def _look(self) -> bool:
        """Writes the progress to the table, and reads `stop` and `cancel` from it. Returns False for `cancel`."""
        self._looked = time.monotonic()
        try:
            if self._phase is not None and self._told != self._eta.progress:
                self._host.table.progress(self._job.id, self._phase, self._eta.progress, self._eta.eta_seconds)
                self._told = self._eta.progress
            control = self._host.table.control(self._job.id)
        except TrainerUnavailable as error:  # the trainer goes on meanwhile
            log.warning("job %s: %s", self._job.id, error)
            return True
        if control.stop and not self._asked:
            self._process.ask_to_stop()
            self._asked = True
        return control.status != "cancelling"

    def _hear(self, event: dict[str, Any]) -> None:
        phase, progress = str(event["phase"]), float(event["progress"])
        self._eta.update(phase, progress, event.get("epoch"))
        changed, self._phase = phase != self._phase, phase
        if changed:
            self._looked = 0.0  # the table is written at once
            self._prepare()
        now = time.monotonic()
        moved = abs(progress - self._noted_at) >= EVENT_STEP or now - self._noted >= EVENT_S
        if changed or moved or progress >= 1 or "message" in event or "epoch" in event:
            self._noted, self._noted_at = now, progress
            self._host.note(self._job.id, {"level": "info", **event})

    def _prepare(self) -> None:
        """Starts the spare trainer for the next job, once this one is past its imports and its audit."""
        if self._phase in ("features", "select", "train") and not self._prepared:
            self._prepared = True
            self._host.trainers.prepare()


class Stall:
    """Notices a trainer process that stands still: stopped, in a dead lock, waiting for a disk that does not answer, or in an endless loop.

    Its events prove progress (batches, files, epochs). A phase may be silent for minutes, but then it computes.
    """

    def __init__(self, process: TrainerProcess) -> None:
        self._process = process
        self._heard = self._computed = self._looked = time.monotonic()
        self._cpu = 0.0  # seconds, when it was last seen to compute

    def reason(self, events: Sequence[dict[str, Any]]) -> str | None:
        """The reason to end the trainer, if there is one. `events`: those since the last call."""
        now = time.monotonic()
        if events:
            self._heard = self._computed = now
        if now - self._heard > SILENT_S:
            return f"no progress for {SILENT_S:.0f} s"
        if now - max(self._heard, self._looked) > CPU_LOOK_S:
            self._looked, cpu = now, self._process.cpu_seconds()
            if abs(cpu - self._cpu) > IDLE_CPU_S:  # less, where a process of its session has ended
                self._cpu, self._computed = cpu, now
            elif now - self._computed > IDLE_S:
                return f"neither progress nor CPU time for {IDLE_S:.0f} s"
        return None
