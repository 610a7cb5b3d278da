"""The trainer process. A crash, a leak or an out-of-memory here never touches the server.

job.json -> run -> result.json     stdout: one JSON event a line     stderr: what people debug with

stdin: a JSON line that names the folder, where the command line does not; a line "stop" ends the run early and keeps the best; its
end means that the server is gone, and ends the process. SIGTERM ends it at once: checkpoints are written beside and renamed, so
there is nothing to tidy. This module imports nothing heavy by itself: torch is imported once the process has made itself modest.
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
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from models.training.job.parent_process import die_with_parent, explain, ran_out_of_disk

if TYPE_CHECKING:
    from models.images.cost import Limits
    from models.store.store import ModelStore
    from models.training.job.job_files import JobResult, JobSpec
    from models.training.job.request import Event, FinetuneRequest

EVENT_S = 0.25  # at most one plain sign of progress in so many seconds
NICE = 19
OOM_SCORE = 500  # of 1000: where memory runs out, the kernel takes the trainer before the server
EXIT_ORPHANED = 1  # the server is gone
STDIN = 0


class RunFunction(Protocol):
    """`models.training.run.run`: trains, publishes, and says what came of it. `stop` becomes true when the run is to end early."""

    def __call__(
        self,
        request: "FinetuneRequest",
        store: "ModelStore",
        progress: Callable[["Event"], None],
        *,
        job_dir: Path,
        cache: Path,
        stop: Callable[[], bool],
        device: str,
        limits: "Limits",
    ) -> "JobResult": ...


class DryRunFunction(Protocol):
    """`models.training.dry_run.dry_run`: the audit, the split and the estimate, fit for JSON."""

    def __call__(
        self,
        request: "FinetuneRequest",
        store: "ModelStore",
        progress: Callable[["Event"], None],
        *,
        cache: Path,
        device: str,
        limits: "Limits",
    ) -> dict[str, Any]: ...


def be_modest() -> None:
    """Serving goes first: on the CPU, and when memory runs out. Threads started from here on inherit it."""
    os.nice(NICE)
    if sys.platform == "linux":
        with suppress(OSError):  # outside a container every session is weighed as one, whatever its processes' niceness
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
    """Runs the job of this folder, or its dry run, and returns the exit code: 0 once result.json says how it ended, without one
    EXIT_DISK_FULL where the disk is full and EXIT_DEVICE_LOST where the GPU is lost.

    Without a folder it gets ready, and waits until stdin names one; nothing is done where stdin ends instead.
    """
    die_with_parent()  # before any import, which takes its time once this process is modest
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
        return EXIT_DISK_FULL  # and no result: the server begins again once there is space
    if result.error is not None and result.error.code == "device_lost":
        return EXIT_DEVICE_LOST  # a new process goes on from the checkpoint
    return _hand_over(folder, result)


def work(folder: Path, run: RunFunction, progress: Callable[["Event"], None], stop: Callable[[], bool]) -> "JobResult":
    """The run of `job.json`; every failure is a result too."""
    from models.training.job.job_files import JobResult

    try:
        order, store = _prepare(folder)
        return run(
            order.request,
            store,
            progress,
            job_dir=folder,
            cache=order.cache,
            stop=stop,
            device=order.device,
            limits=order.limits,
        )
    except Exception as error:
        traceback.print_exc()
        return JobResult(status="failed", error=explain(error))


def rehearsal(folder: Path, dry_run: DryRunFunction, progress: Callable[["Event"], None]) -> "JobResult":
    """The dry run of `job.json`: writes `dry_run.json`."""
    from models.files.atomic_files import replace
    from models.training.job.job_files import DRY_RUN, JobResult

    try:
        order, store = _prepare(folder)
        found = dry_run(order.request, store, progress, cache=order.cache, device=order.device, limits=order.limits)
        replace(folder / DRY_RUN, json.dumps(found, allow_nan=False).encode())
        return JobResult(status="succeeded")
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
    if os.path.realpath(order.request.dataset) != str(order.request.dataset):  # a link has come since the server looked
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
    """Writes result.json. Whoever finds none where the process ended by itself looks at the exit code."""
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
    """Writes events to the server: each message, epoch, change of phase and end of one, and otherwise a few a second."""

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
        except BrokenPipeError:  # no failure of the run: the next server goes on from its checkpoint
            os._exit(EXIT_ORPHANED)


def _sayable(value: Any) -> bool:
    """JSON has no NaN, and None goes without saying."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _take_stdout() -> TextIO:
    """The real stdout, for events alone: what a library prints goes to stderr from now on."""
    sys.stdout.flush()
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return events


# stdin is read by its descriptor: a thread that holds the lock of sys.stdin makes the interpreter abort at its end.


def _get_ready() -> None:
    """Imports what a run will import; what only some runs do, seconds as well, while no job is waiting."""
    modules = ["models.training.run", "models.training.dry_run"]
    if not select.select([STDIN], [], [], 0)[0]:
        modules += ["torchvision.models", *filter(find_spec, ["tensorboardX"])]
    for module in modules:
        importlib.import_module(module)


def _read_line(stdin: int) -> bytes | None:
    """None at the end. Byte by byte, so that it takes nothing of the next line."""
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
    """A parent that ended before it could be watched has left a pipe that nobody writes to."""
    stdin = select.poll()
    stdin.register(STDIN, 0)
    if any(event & select.POLLHUP for _, event in stdin.poll(0)):
        os._exit(EXIT_ORPHANED)
