"""The trainer process. A crash, a leak or exhausted memory here does not affect the server.

job.json -> run -> result.json     stdout: one JSON event per line     stderr: diagnostics

stdin: a JSON line that names the folder, if the command line does not; a line "stop" ends the run early and keeps the best result; the end
of stdin means that the server has ended, and ends the process. SIGTERM ends it at once: checkpoints are written atomically, so nothing has
to be cleaned up. This module imports nothing heavy by itself: torch is imported after the process has lowered its priority.
"""

import importlib
import json
import math
import os
import select
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from models.training.job.parent_process import die_with_parent, explain, ran_out_of_disk

if TYPE_CHECKING:
    from models.store.store import ModelStore
    from models.training.job.job_files import JobResult, JobSpec
    from models.training.job.request import Event

RunFunction = Callable[..., "JobResult"]  # `models.training.run.run`
DryRunFunction = Callable[..., dict[str, Any]]  # `models.training.dry_run.dry_run`

EVENT_S = 0.25  # shortest time between two plain progress events
NICE = 19
OOM_SCORE = 500  # of 1000: when memory runs out, the kernel ends the trainer before the server
EXIT_ORPHANED = 1  # the server has ended
STDIN = 0


def be_modest() -> None:
    """Give way to serving, for the CPU and when memory runs out. Threads that are started afterwards inherit it."""
    os.nice(NICE)
    if sys.platform == "linux":
        with suppress(OSError):  # otherwise the kernel weighs the session as one, whatever its processes' niceness
            Path("/proc/self/autogroup").write_text(str(NICE))
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        with suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(str(OOM_SCORE))


def main(
    folder: Path | None = None,
    run: RunFunction | None = None,
    rehearse: DryRunFunction | None = None,
    *,
    dry_run: bool = False,
) -> int:
    """Run the job of this folder, or its dry run, and return the exit code.

    It is 0 if result.json says how the job ended; EXIT_DISK_FULL and EXIT_DEVICE_LOST come without one. Without a folder the process
    imports what it needs, and waits until stdin names one; if stdin ends instead, nothing is done.
    """
    die_with_parent()  # before any import, which takes long at low priority
    _end_orphaned()
    from models.training.job.job_files import EXIT_DEVICE_LOST, EXIT_DISK_FULL

    events = _take_stdout()
    if folder is None:
        _get_ready()
        if (line := _read_line(STDIN)) is None:
            return 0
        told = json.loads(line)
        folder, dry_run = Path(told["folder"]), told["dry_run"]
    stop = threading.Event()
    threading.Thread(target=_listen, args=(stop,), daemon=True).start()
    reporter = Reporter(events)
    if dry_run:
        return _hand_over(folder, rehearsal(folder, rehearse or _rehearse, reporter))
    result = work(folder, run or _run, reporter, stop.is_set)
    if result.error is not None and result.error.code == "disk_full":
        return EXIT_DISK_FULL  # without a result: the server starts it again when there is space
    if result.error is not None and result.error.code == "device_lost":
        return EXIT_DEVICE_LOST  # a new process resumes from the checkpoint
    return _hand_over(folder, result)


def work(folder: Path, run: RunFunction, progress: Callable[["Event"], None], stop: Callable[[], bool]) -> "JobResult":
    """Do the run of `job.json`. Every failure is a result too."""

    def trained(job: "JobSpec", store: "ModelStore") -> "JobResult":
        options: dict[str, Any] = {"job_dir": folder, "stop": stop}
        return run(job.request, store, progress, cache=job.cache, device=job.device, limits=job.limits, **options)

    return _result(folder, trained)


def rehearsal(folder: Path, dry_run: DryRunFunction, progress: Callable[["Event"], None]) -> "JobResult":
    """Do the dry run of `job.json`, and write `dry_run.json`."""
    from models.files.atomic_files import replace
    from models.training.job.job_files import DRY_RUN, JobResult

    def planned(job: "JobSpec", store: "ModelStore") -> "JobResult":
        found = dry_run(job.request, store, progress, cache=job.cache, device=job.device, limits=job.limits)
        replace(folder / DRY_RUN, json.dumps(found, allow_nan=False).encode())
        return JobResult(status="succeeded")

    return _result(folder, planned)


def _result(folder: Path, function: Callable[["JobSpec", "ModelStore"], "JobResult"]) -> "JobResult":
    """Return the function's result, or that of its failure."""
    from models.training.job.job_files import JobResult

    try:
        return function(*_prepare(folder))
    except Exception as error:
        traceback.print_exc()
        return JobResult(status="failed", error=explain(error))


def _prepare(folder: Path) -> tuple["JobSpec", "ModelStore"]:
    import torch

    from models.errors import DatasetError
    from models.files.records import read_record
    from models.store.store import ModelStore
    from models.training.job.job_files import JOB, NO_DATASET, JobSpec

    order = read_record(folder / JOB, JobSpec)
    if os.path.realpath(order.request.dataset) != str(
        order.request.dataset
    ):  # a link was put there after the server's check
        raise DatasetError(NO_DATASET)
    torch.set_num_threads(order.threads)
    return order, ModelStore(order.weights)


def _run(*args: Any, **kwargs: Any) -> "JobResult":
    from models.training.run import run

    return run(*args, **kwargs)


def _rehearse(*args: Any, **kwargs: Any) -> dict[str, Any]:
    from models.training.dry_run import dry_run

    return dry_run(*args, **kwargs)


def _hand_over(folder: Path, result: "JobResult") -> int:
    """Write result.json. If it is missing, the exit code says why."""
    from models.files.atomic_files import replace
    from models.files.records import to_json
    from models.training.job.job_files import EXIT_DISK_FULL, RESULT

    try:
        replace(folder / RESULT, to_json(result))
    except OSError as error:
        traceback.print_exc()
        return EXIT_DISK_FULL if ran_out_of_disk(error) else 1
    return 0


# Between the trainer and the server


class Reporter:
    """Writes events to the server: every message, epoch, and start and end of a phase, and otherwise a few per second."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._phase: str | None = None
        self._wrote = 0.0

    def __call__(self, event: "Event") -> None:
        plain = event.message is None and event.epoch is None and event.progress < 1 and event.phase == self._phase
        if plain and time.monotonic() - self._wrote < EVENT_S:
            return
        self._phase, self._wrote = event.phase, time.monotonic()
        fields = {name: value for name, value in asdict(event).items() if _sayable(value)}
        fields["at"] = datetime.now(UTC).isoformat(timespec="milliseconds")
        try:
            self._out.write(json.dumps(fields) + "\n")
            self._out.flush()
        except BrokenPipeError:  # not a failure of the run: the next server resumes it
            os._exit(EXIT_ORPHANED)


def _sayable(value: Any) -> bool:
    """Return whether an event shows the value: not None, and a number that JSON has."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _take_stdout() -> TextIO:
    """Return the real stdout, for events only; what libraries print goes to stderr from now on."""
    sys.stdout.flush()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return events


# stdin is read by its descriptor: a thread that holds the lock of sys.stdin makes the interpreter abort when it ends.


def _get_ready() -> None:
    """Import what a run needs; if no job is waiting, also what only some runs need, which takes seconds."""
    modules = ["models.training.run", "models.training.dry_run"]
    if not select.select([STDIN], [], [], 0)[0]:
        modules += ["torchvision.models", *filter(find_spec, ["tensorboardX"])]
    for module in modules:
        importlib.import_module(module)


def _read_line(stdin: int) -> bytes | None:
    """Return a line, or None at the end. Reads byte by byte, so that nothing of the next line is taken."""
    line = b""
    while byte := os.read(stdin, 1):
        if byte == b"\n":
            return line
        line += byte
    return None


def _listen(stop: threading.Event) -> None:
    while (line := _read_line(STDIN)) is not None:
        if line == b"stop":
            stop.set()
    os._exit(EXIT_ORPHANED)


def _end_orphaned() -> None:
    """Exit if the parent ended before it could be watched, which leaves a pipe without a writer."""
    stdin = select.poll()
    stdin.register(STDIN, 0)
    if any(event & select.POLLHUP for _, event in stdin.poll(0)):
        os._exit(EXIT_ORPHANED)
