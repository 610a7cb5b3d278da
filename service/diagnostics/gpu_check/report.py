"""The table that is printed while the checks run."""

from collections import Counter
from collections.abc import Sequence

from service.diagnostics.gpu_check.records import CheckResult, GpuReport
from service.diagnostics.gpu_check.runner import BUDGET_S, GpuCheck

WIDTH = 22  # of a check's name


def header(checks: Sequence[GpuCheck], rehearse: bool) -> str:
    where = "on the CPU as a rehearsal, so that no figure counts" if rehearse else "on the GPU"
    return f"{len(checks)} checks {where}, at most {BUDGET_S / 60:.0f} minutes"


def row(result: CheckResult) -> str:
    """Returns one check: status, name, seconds, summary; then its problems and what was expected."""
    lines = [f"{result.status:9}  {result.name:{WIDTH}} {result.seconds:6.1f} s  {result.summary}"]
    lines += [f"    ! {line}" for problem in result.problems for line in problem.splitlines()]
    lines += [f"    expected: {result.expected}"] if result.problems else []
    return "\n".join(lines)


def footer(document: GpuReport) -> str:
    """Returns the verdict in one sentence."""
    if document.verdict == "no gpu":
        return f"No GPU can be used: {document.reason}"
    counts = Counter(result.status for result in document.checks)
    counted = ", ".join(f"{count} {status}" for status, count in counts.items())
    device = "the CPU (rehearsal)" if document.rehearsal else document.gpu or "an unknown GPU"
    return f"{document.verdict} on {device} in {document.seconds:.0f} s: {counted}"
