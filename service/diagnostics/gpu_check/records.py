"""Records of a GPU check: what a check measures, and the document of a whole run.

Without torch, so that a broken torch cannot stop the report.
"""

from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

CheckStatus = Literal["passed", "failed", "skipped", "timed out", "crashed"]
GpuVerdict = Literal["passed", "failed", "incomplete", "no gpu"]
EXIT_CODES: dict[GpuVerdict, int] = {"passed": 0, "failed": 1, "no gpu": 3, "incomplete": 4}  # 2 is a wrong option
FAILURES: tuple[CheckStatus, ...] = ("failed", "timed out", "crashed")


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class GpuCheckSpec(_Record):
    """What a child process runs. `target`: `module:function`."""

    target: str
    folder: Path
    rehearse: bool = False
    dataset: Path | None = None


class Measurement(_Record):
    """What a check returns. It passed if it has no `problems`, one sentence each.

    skipped: why nothing was measured. no_gpu: why no GPU can be used, which ends the run.
    """

    summary: str = ""
    figures: dict[str, Any] = {}
    problems: tuple[str, ...] = ()
    skipped: str | None = None
    no_gpu: str | None = None


class CheckResult(_Record):
    """One check in the document. `expected`: what it has to show to pass. `seconds`: of the process, imports included."""

    name: str
    status: CheckStatus
    expected: str
    seconds: float
    summary: str
    figures: dict[str, Any] = {}
    problems: tuple[str, ...] = ()


class GpuReport(_Record):
    """A whole run. `rehearsal`: on the CPU with tiny sizes, so that no figure counts. `gpu`: name of the GPU."""

    schema_version: Literal[1] = 1
    imago: str
    started: datetime
    seconds: float
    rehearsal: bool
    gpu: str | None
    verdict: GpuVerdict
    reason: str | None = Field(default=None, description="Why no GPU can be used")
    checks: tuple[CheckResult, ...]

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]

    def line(self) -> str:
        """The document as one line of JSON; a number that is not finite becomes null."""
        return self.model_dump_json()


def problems(*expectations: tuple[bool, str]) -> tuple[str, ...]:
    """The sentences of the expectations that do not hold."""
    return tuple(sentence for holds, sentence in expectations if not holds)


def verdict_of(results: Iterable[CheckResult], left_out: bool) -> GpuVerdict:
    """left_out: a check did not run, for lack of time or because the run was interrupted."""
    if any(result.status in FAILURES for result in results):
        return "failed"
    return "incomplete" if left_out else "passed"
