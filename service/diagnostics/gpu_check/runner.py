"""Runs the checks one after the other, each in a process of its own, within a total time.

start -> wait, at most its limit -> end the whole process group -> read outcome.json -> CheckResult

A check that fails, hangs, dies or writes rubbish costs its own result only. The document is always complete: a check that does not
fit into the time left is skipped with that reason.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from pydantic import ValidationError

from service.diagnostics.gpu_check.child import OUTCOME
from service.diagnostics.gpu_check.records import (
    CheckResult,
    CheckStatus,
    GpuCheckSpec,
    GpuReport,
    Measurement,
    verdict_of,
)
from service.settings import PREFIX

ROOT = Path(__file__).parents[3]
BUDGET_S = 465.0  # of the whole run; with the end of the last check and the report it stays below eight minutes
GRACE_S = 3.0  # for a process group to end after SIGTERM
REHEARSAL_SLACK = 3.0  # on the limit of a check: a CPU may be slow and busy
LOG_CHARACTERS = 600  # of a crashed check's output, in its result


@dataclass(frozen=True)
class GpuCheck:
    """A check, by the import path of its function.

    expected: what it has to show to pass. limit_s: its process is ended after it. least_s: with less time left it does not start.
    """

    name: str
    target: str
    expected: str
    limit_s: float
    least_s: float = 10.0


@dataclass(frozen=True)
class GpuCheckRun:
    """How the checks run. `gpu`: the number of the GPU to check, as torch counts them; None: the first. `child`: see child.py."""

    rehearse: bool = False
    dataset: Path | None = None
    gpu: int | None = None
    budget_s: float = BUDGET_S
    child: str = "service.diagnostics.gpu_check.child"


def run(checks: Sequence[GpuCheck], how: GpuCheckRun, on_result: Callable[[CheckResult], None]) -> GpuReport:
    """Runs the checks and calls `on_result` after each. SIGTERM and Ctrl-C end the current check and skip the others."""
    began, started = time.monotonic(), datetime.now(UTC)
    results: list[CheckResult] = []
    left_out, gpu, no_gpu = False, None, None
    reason = "not enough time was left"
    for check in checks:
        left_s = how.budget_s - (time.monotonic() - began)
        if no_gpu is not None:
            break
        if left_s < check.least_s:
            result, left_out = skipped(check, reason), True
        else:
            try:
                result, measurement = run_one(
                    check, how, min(check.limit_s * (REHEARSAL_SLACK if how.rehearse else 1), left_s)
                )
                no_gpu, gpu = measurement.no_gpu, gpu or measurement.figures.get("gpu")
                how = replace(how, gpu=how.gpu or 0)  # after the first check, which looks at all of them
            except KeyboardInterrupt:
                reason, left_out, began = "interrupted", True, time.monotonic() - how.budget_s
                result = skipped(check, reason)
        results.append(result)
        on_result(result)
    return GpuReport(
        imago=version("imago"),
        started=started,
        seconds=round((datetime.now(UTC) - started).total_seconds(), 1),
        rehearsal=how.rehearse,
        gpu=gpu,
        verdict="no gpu" if no_gpu is not None else verdict_of(results, left_out),
        reason=no_gpu,
        checks=tuple(results),
    )


def skipped(check: GpuCheck, reason: str) -> CheckResult:
    return CheckResult(name=check.name, status="skipped", expected=check.expected, seconds=0.0, summary=reason)


def run_one(check: GpuCheck, how: GpuCheckRun, limit_s: float) -> tuple[CheckResult, Measurement]:
    """Returns the check's result, and what it measured: empty if it did not run to its end."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="imago-gpu-check-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        order = GpuCheckSpec(target=check.target, folder=folder, rehearse=how.rehearse, dataset=how.dataset)
        with (folder / "check.log").open("wb") as log, _process(order, how, log.fileno()) as process:
            try:
                code: int | None = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                code = None
        status, measurement = _outcome(folder, code, limit_s)
    seconds = round(time.monotonic() - began, 1)
    summary = measurement.summary or measurement.skipped or measurement.no_gpu or "; ".join(measurement.problems[:1])
    result = CheckResult(
        name=check.name,
        status=status,
        expected=check.expected,
        seconds=seconds,
        summary=summary,
        figures=measurement.figures,
        problems=measurement.problems,
    )
    return result, measurement


@contextlib.contextmanager
def _process(order: GpuCheckSpec, how: GpuCheckRun, log: int) -> Iterator["subprocess.Popen[bytes]"]:
    """Starts a child in its own process group, which is ended with the block."""
    command = [sys.executable, "-m", how.child, order.model_dump_json()]
    process = subprocess.Popen(  # noqa: S603  (our own module)
        command,
        cwd=order.folder,
        env=environment(how),
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        _end_group(process)


def environment(how: GpuCheckRun) -> dict[str, str]:
    """Returns the children's environment: one GPU, and none of the server's settings, so that a check never touches the user's store or
    data."""
    variables = {name: value for name, value in os.environ.items() if not name.upper().startswith(PREFIX)}
    if not {"site-packages", "dist-packages"} & set(ROOT.parts):  # a checkout
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    if how.rehearse:
        variables["CUDA_VISIBLE_DEVICES"] = ""
    elif how.gpu is not None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = [str(number) for number in range(how.gpu + 1)] if visible is None else visible.split(",")
        variables["CUDA_VISIBLE_DEVICES"] = names[how.gpu].strip() if how.gpu < len(names) else ""
    return variables


def _end_group(process: "subprocess.Popen[bytes]") -> None:
    """Ends the child and all that it started: a server and its trainer by SIGTERM, the rest by SIGKILL."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    ends = time.monotonic() + GRACE_S
    while _group_lives(process) and time.monotonic() < ends:
        time.sleep(0.02)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _group_lives(process: "subprocess.Popen[bytes]") -> bool:
    process.poll()  # a zombie would count as alive
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def _outcome(folder: Path, code: int | None, limit_s: float) -> tuple[CheckStatus, Measurement]:
    """Returns the result from what the child left; `code` is None if its time was over."""
    if code is None:
        return "timed out", Measurement(problems=(f"no result within {limit_s:.0f} s", *_log_end(folder)))
    try:
        measurement = Measurement.model_validate_json((folder / OUTCOME).read_bytes())
    except FileNotFoundError:
        ended = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return "crashed", Measurement(problems=(f"the process {ended}", *_log_end(folder)))
    except ValidationError as error:
        return "crashed", Measurement(problems=(f"its result cannot be read: {error.errors()[0]['msg']}",))
    if measurement.skipped is not None or measurement.no_gpu is not None:
        return "skipped", measurement
    return "failed" if measurement.problems else "passed", measurement


def _log_end(folder: Path) -> tuple[str, ...]:
    text = (folder / "check.log").read_text(errors="replace").strip()
    return (text[-LOG_CHARACTERS:],) if text else ()
