"""The trainer process, seen from the server.

started -> imports what training needs (seconds) -> begin(folder) -> events ... -> result.json, end
           a spare one waits here
"""

import json
import logging
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from models.training.job.job_files import JobSpec
from models.training.job.request import FinetuneRequest
from service.datasets import resolve
from service.settings import Settings

log = logging.getLogger(__name__)

TRAINER = (sys.executable, "-P", "-m", "models.training")  # -P: what lies in the current folder is not imported
SPARE_S = 600.0  # a trainer that waits for a job holds some 250 MB
LOG = "trainer.log"
LOG_BYTES = 2**20  # of the trainer's stderr; the rest is dropped
LINE_BYTES = 65_536
SECRETS = ("IMAGO_ADMIN_KEY", "IMAGO_API_KEY", "IMAGO_JOBS_DATABASE")


def order_of(settings: Settings, request: FinetuneRequest) -> JobSpec:
    """The order for a trainer. Resolves the dataset anew each time, as it may have moved. Raises DatasetError."""
    dataset = resolve(settings.datasets, request.dataset)
    return JobSpec(
        request=request.model_copy(update={"dataset": dataset}),
        weights=settings.weights.resolve(),
        cache=(settings.data / "features").resolve(),
        threads=settings.trainer_cores,
        limits=settings.limits(),
        device="cuda" if settings.device.startswith("cuda") else "cpu" if settings.device == "cpu" else "auto",
    )


def visible_gpus(device: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The environment that shows a trainer the GPUs of the setting `device`, and no others.

    `cuda:1` is the second that the server itself sees: where CUDA_VISIBLE_DEVICES lists some, by index or by UUID, the second of these.
    """
    if device == "cpu":
        return {"CUDA_VISIBLE_DEVICES": ""}
    index = device.partition(":")[2]
    if not index:
        return {}
    listed = environment.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return {"CUDA_VISIBLE_DEVICES": index}
    entries = [entry.strip() for entry in listed.split(",")]
    return {"CUDA_VISIBLE_DEVICES": entries[int(index)] if int(index) < len(entries) else ""}


class TrainerProcess:
    """A process with a session of its own, ended as a group with all processes that it started. It ends when its stdin does.

    `device`: the setting; the process sees the GPUs that this names.
    """

    def __init__(self, threads: int, command: Sequence[str] = TRAINER, device: str = "auto") -> None:
        environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
        # A thread that waits for work sleeps: the server needs the core.
        environment |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE", "PYTHONUNBUFFERED": "1"}
        environment |= visible_gpus(device, os.environ)
        self._process = subprocess.Popen(  # noqa: S603  (our own module)
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
        self._half_line = b""
        self._log: BinaryIO | None = None
        self._selector = selectors.DefaultSelector()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is None:
                raise RuntimeError("the trainer's outputs are pipes")
            self._selector.register(stream, selectors.EVENT_READ)

    def begin(self, folder: Path, dry_run: bool = False) -> None:
        """Starts the job of this folder; the trainer's stderr goes to a file there."""
        self._log = (folder / LOG).open("ab")
        self._say(json.dumps({"folder": str(folder.resolve()), "dry_run": dry_run}))

    def events(self, within_s: float) -> list[dict[str, Any]]:
        """The trainer's events since the last call; waits for them at most `within_s`."""
        events: list[dict[str, Any]] = []
        if not self._selector.get_map():  # both streams are at their end, and the process is about to be
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(within_s)
        for key, _ in self._selector.select(within_s) if self._selector.get_map() else ():
            stream: Any = key.fileobj
            data = os.read(stream.fileno(), LINE_BYTES)
            if not data:
                self._selector.unregister(stream)
            elif stream is self._process.stderr:
                self._keep(data)
            else:
                events += self._parse(data)
        return events

    def _parse(self, data: bytes) -> list[dict[str, Any]]:
        *lines, self._half_line = (self._half_line + data).split(b"\n")
        if len(self._half_line) > LINE_BYTES:
            self._half_line = b""
        events = []
        for line in lines:
            try:
                event = json.loads(line)
            except ValueError:
                log.warning("the trainer wrote a line that is no event")
                continue
            events.append(event)
        return events

    def _keep(self, data: bytes) -> None:
        """Writes the trainer's stderr to its log; write errors are ignored."""
        with suppress(OSError):
            if self._log is not None:
                self._log.write(data[: max(0, LOG_BYTES - self._log.tell())])
                self._log.flush()

    @property
    def returncode(self) -> int | None:
        """None while it runs, negative for a signal. Its last events may still be unread."""
        return self._process.poll()

    def memory_bytes(self) -> int:
        """Resident memory, files that are mapped not counted; 0 once it has ended."""
        try:
            fields = Path(f"/proc/{self._process.pid}/statm").read_text().split()
        except OSError:
            return 0
        return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")

    def cpu_seconds(self) -> float:
        """CPU time of the process and of those it has started, as long as they run."""
        ticks = 0
        for path in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                fields = path.read_text(errors="replace").rpartition(")")[2].split()  # from the third, the state, on
                if int(fields[3]) == self._process.pid:  # its session
                    ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def ask_to_stop(self) -> None:
        """Asks it to end after its current step and to keep the best; may be repeated."""
        self._say("stop")

    def _say(self, line: str) -> None:
        if self._process.stdin is None:
            raise RuntimeError("the trainer's input is a pipe")
        with suppress(OSError):  # it has just ended
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def end(self, grace_s: float) -> None:
        """Sends SIGTERM, and SIGKILL after `grace_s`. Returns when no process of the group is left."""
        if self._process.poll() is None:
            self._signal(signal.SIGTERM)
            ends = time.monotonic() + grace_s
            while self._process.poll() is None and time.monotonic() < ends:
                self.events(0.05)  # reads on, or a full pipe would keep it from ending
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._close()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)

    def _close(self) -> None:
        self._selector.close()
        for stream in (self._log, self._process.stdin, self._process.stdout, self._process.stderr):
            with suppress(OSError):  # what could not be flushed goes nowhere now
                if stream is not None:
                    stream.close()


class Trainers:
    """Starts trainers, and keeps a spare one for a while, which saves the next job the seconds of its imports."""

    def __init__(self, threads: int, command: Sequence[str] = TRAINER, device: str = "auto") -> None:
        self._threads, self._command, self._device = threads, command, device
        self._lock = threading.Lock()
        self._spare: TrainerProcess | None = None
        self._timer: threading.Timer | None = None

    def take(self) -> TrainerProcess:
        """Returns the spare trainer, or a new one."""
        spare = self._swap(None)
        if spare is not None and spare.returncode is None:
            return spare
        self._end(spare)
        return TrainerProcess(self._threads, self._command, self._device)

    def prepare(self) -> None:
        """Keeps a spare trainer for the next SPARE_S seconds, if one can start. The kernel ends it with the calling thread."""
        spare = self._swap(None)
        if spare is None or spare.returncode is not None:
            self._end(spare)
            try:
                spare = TrainerProcess(self._threads, self._command, self._device)
            except OSError as error:  # the running job does not fail for it
                log.warning("no spare trainer: %s", error)
                return
        self._end(self._swap(spare))

    def close(self) -> None:
        self._end(self._swap(None))

    def _swap(self, spare: TrainerProcess | None) -> TrainerProcess | None:
        """Makes this the spare trainer, and returns the one before."""
        with self._lock:
            before, self._spare = self._spare, spare
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(SPARE_S, self.close) if spare is not None else None
            if self._timer is not None:
                self._timer.daemon = True
                self._timer.start()
        return before

    def _end(self, trainer: TrainerProcess | None) -> None:
        if trainer is not None:
            trainer.end(grace_s=0.0)


def signal_name(returncode: int) -> str:
    """How a process ended, for people: the signal's name, or its exit code."""
    if returncode < 0:
        with suppress(ValueError):
            return signal.Signals(-returncode).name
        return f"signal {-returncode}"
    return f"exit code {returncode}"
