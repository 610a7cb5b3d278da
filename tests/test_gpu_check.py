"""The runner of `imago doctor --gpu`: what a check may do without taking the others along, the time, the document, the exit codes."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result
from pydantic import BaseModel, ValidationError

from service.cli import main
from service.diagnostics.gpu_check import checks, report, runner
from service.diagnostics.gpu_check.records import CheckResult, GpuReport, Measurement
from service.diagnostics.gpu_check.runner import GpuCheck, GpuCheckRun

FAKES = "support.gpu_checks"
TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _fakes_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(runner, "GRACE_S", 0.3)


def fake(name: str, limit_s: float = 30.0, least_s: float = 0.0) -> GpuCheck:
    return GpuCheck(name, f"{FAKES}:{name}", "something", limit_s, least_s)


def ran(*fakes: GpuCheck, **how: Any) -> GpuReport:
    return runner.run(fakes, GpuCheckRun(child=FAKES, **how), lambda result: None)


def statuses(document: GpuReport) -> list[str]:
    return [result.status for result in document.checks]


# One check


def test_a_check_that_passes() -> None:
    document = ran(fake("passes"))
    [result] = document.checks
    assert (result.status, result.summary, result.figures["rate"]) == ("passed", "42 images/s", 42.0)
    assert (document.verdict, document.exit_code, document.gpu) == ("passed", 0, "Fake GPU")


def test_a_check_that_fails_says_why() -> None:
    document = ran(fake("fails"))
    assert document.checks[0].problems == ("7 images/s are too few",)
    assert (statuses(document), document.exit_code) == (["failed"], 1)


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        pytest.param("raises", "crashed", "unspecified launch failure", id="raises"),
        pytest.param("dies", "crashed", "ended by SIGSEGV", id="dies by a signal"),
        pytest.param("leaves_early", "crashed", "ended with exit code 0", id="ends without a result"),
        pytest.param("returns_rubbish", "crashed", "ValidationError", id="returns something else"),
        pytest.param("writes_rubbish", "crashed", "its result cannot be read", id="leaves half a result"),
        pytest.param("prints_rubbish", "passed", "", id="prints rubbish"),
        pytest.param("missing", "crashed", "AttributeError", id="is not there"),
    ],
)
def test_a_check_costs_its_own_result_only(name: str, status: str, said: str) -> None:
    document = ran(fake(name), fake("passes"))
    assert statuses(document) == [status, "passed"]
    assert said in " ".join(document.checks[0].problems)


def test_a_check_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    document = ran(fake("hangs", limit_s=1.0), fake("passes"))
    assert statuses(document) == ["timed out", "passed"]
    assert document.checks[0].problems == ("no result within 1 s", "compiling")
    assert document.exit_code == 1


def test_a_check_that_ignores_sigterm_is_killed() -> None:
    began = time.monotonic()
    assert statuses(ran(fake("ignores_sigterm", limit_s=1.0))) == ["timed out"]
    assert time.monotonic() - began < 10


def test_nothing_that_a_check_started_outlives_it() -> None:
    [result] = ran(fake("starts_a_server")).checks
    pid = result.figures["pid"]
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_check_sees_one_gpu_and_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGO_DATA", "/var/lib/imago/data")
    monkeypatch.setenv("IMAGO_ADMIN_KEY", "k" * 40)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    first, second = ran(fake("shows_its_surroundings"), fake("shows_its_surroundings")).checks
    assert first.figures["environment"] == dict.fromkeys(first.figures["environment"])
    assert second.figures["environment"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert first.figures["folder"] != second.figures["folder"]
    assert not Path(first.figures["folder"]).exists()


@pytest.mark.parametrize(
    ("visible", "gpu", "expected"),
    [
        pytest.param(None, None, None, id="all"),
        pytest.param(None, 1, "1", id="the second"),
        pytest.param("2,GPU-5", 1, "GPU-5", id="the second of those visible"),
        pytest.param("2", 1, "", id="not there"),
    ],
)
def test_which_gpu_is_checked(
    visible: str | None, gpu: int | None, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert runner.environment(GpuCheckRun(gpu=gpu)).get("CUDA_VISIBLE_DEVICES") == expected


def test_a_rehearsal_hides_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert runner.environment(GpuCheckRun(rehearse=True))["CUDA_VISIBLE_DEVICES"] == ""


# The time


def test_a_check_that_takes_all_the_time_leaves_a_document() -> None:
    document = ran(fake("hangs"), fake("passes", least_s=1.0), fake("fails", least_s=1.0), budget_s=2.0)
    assert statuses(document) == ["timed out", "skipped", "skipped"]
    assert document.checks[1].summary == "not enough time was left"
    assert document.seconds < 8


def test_checks_that_were_left_out_make_a_run_incomplete() -> None:
    document = ran(fake("passes"), fake("passes", least_s=1000.0))
    assert (statuses(document), document.verdict, document.exit_code) == (["passed", "skipped"], "incomplete", 4)


def test_a_check_that_skips_itself_leaves_a_run_complete() -> None:
    document = ran(fake("skips"), fake("passes"))
    assert document.checks[0].summary == "needs two GPUs"
    assert document.exit_code == 0


@pytest.mark.parametrize("count", [1, 2])
def test_an_interrupted_run_has_a_document(count: int) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        interrupt = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
        interrupt.start()
        document = ran(*[fake("hangs"), fake("passes")][:count])
        interrupt.join()
    finally:
        signal.signal(signal.SIGINT, before)
    assert [(result.status, result.summary) for result in document.checks] == [("skipped", "interrupted")] * count
    assert document.verdict == "incomplete"


def test_without_a_gpu_the_run_ends_at_once() -> None:
    document = ran(fake("finds_no_gpu"), fake("passes"))
    assert (document.verdict, document.exit_code, len(document.checks)) == ("no gpu", 3, 1)
    assert report.footer(document) == "No GPU can be used: there is no NVIDIA driver; install one"


# The document and the table


def test_the_document_is_one_line_of_json_that_reads_back() -> None:
    document = ran(fake("passes"), fake("fails"), fake("is_not_finite"))
    line = document.line()
    assert "\n" not in line
    assert json.loads(line, parse_constant=pytest.fail)["checks"][2]["figures"] == {"rate": None, "loss": None}
    assert GpuReport.model_validate_json(line).checks[:2] == document.checks[:2]


def test_an_unknown_field_is_refused() -> None:
    with pytest.raises(ValidationError):
        Measurement.model_validate({"figures": {}, "speed": 1})


def test_the_table_shows_problems_and_what_was_expected() -> None:
    result = CheckResult(
        name="heads", status="failed", expected="few waits", seconds=4.25, summary="9 waits", problems=("too many",)
    )
    assert report.row(result).splitlines() == [
        "failed     heads                     4.2 s  9 waits",
        "    ! too many",
        "    expected: few waits",
    ]


def test_the_last_line_counts() -> None:
    document = ran(fake("passes"), fake("fails"), fake("passes"))
    assert report.footer(document).startswith("failed on Fake GPU in ")
    assert report.footer(document).endswith("2 passed, 1 failed")


# The checks


def test_every_check_can_be_imported_and_fits_the_time() -> None:
    for check in checks.CHECKS:
        module, _, function = check.target.partition(":")
        assert callable(getattr(import_module(module), function))
        assert check.least_s <= check.limit_s < runner.BUDGET_S
    names = [check.name for check in checks.CHECKS]
    assert (names[0], len(set(names))) == ("facts", len(names))
    assert runner.BUDGET_S + runner.GRACE_S < 480


def test_facts_come_first_whatever_is_selected() -> None:
    assert [check.name for check in checks.selected(["graphs", "errors"])] == ["facts", "errors", "graphs"]
    with pytest.raises(ValueError, match="unknown check 'grafs'"):
        checks.selected(["grafs"])


# The command


def doctor(*words: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *words], prog_name="imago")


@pytest.fixture
def _only_fakes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "CHECKS", (fake("passes"), fake("fails")))
    monkeypatch.setattr(runner.GpuCheckRun, "__init__", _with_fake_child(runner.GpuCheckRun.__init__))


def _with_fake_child(init: Any) -> Any:
    return lambda self, *args, **named: init(self, *args, **{**named, "child": FAKES})


@pytest.mark.usefixtures("_only_fakes")
def test_the_command_prints_a_table_and_the_document_last() -> None:
    result = doctor("--gpu")
    table, document = result.stdout.splitlines()[:-1], GpuReport.model_validate_json(result.stdout.splitlines()[-1])
    assert (result.exit_code, document.verdict) == (1, "failed")
    assert table[0] == "2 checks on the GPU, at most 8 minutes"
    assert table[1].startswith("passed     passes")


@pytest.mark.usefixtures("_only_fakes")
def test_the_document_goes_to_a_file_or_stands_alone() -> None:
    assert doctor("--gpu", "--json", "gpu.json").stdout.splitlines()[-1].startswith("failed on Fake GPU")
    assert GpuReport.model_validate_json(Path("gpu.json").read_bytes()).verdict == "failed"
    assert GpuReport.model_validate_json(doctor("--gpu", "--json").stdout).verdict == "failed"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--rehearse",), "need --gpu"),
        (("--check", "heads"), "need --gpu"),
        (("--gpu", "--check", "haeds"), "unknown check 'haeds'"),
        (("--gpu", "--device", "cpu"), "the device is set to cpu"),
    ],
)
def test_wrong_options(words: tuple[str, ...], said: str) -> None:
    result = doctor(*words)
    assert (result.exit_code, said in result.stderr) == (2, True)


def test_without_a_gpu_the_command_says_so(tmp_path: Path) -> None:
    """The real command, on a machine whose GPUs are hidden."""
    done = subprocess.run(
        [sys.executable, "-m", "service.cli", "doctor", "--gpu"],
        cwd=tmp_path,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(TESTS.parent)},
        capture_output=True,
        text=True,
        check=False,
    )
    *_, sentence, line = done.stdout.splitlines()
    document: BaseModel = GpuReport.model_validate_json(line)
    assert done.returncode == 3
    assert sentence.startswith("No GPU can be used: ")
    assert isinstance(document, GpuReport)
    assert document.reason is not None
    assert document.reason in sentence


def test_make_gpu_check_runs_the_command() -> None:
    makefile = (TESTS.parent / "Makefile").read_text()
    assert "gpu-check: $(STAMP)\n\t@exec $(BIN)/imago doctor --gpu $(ARGS)\n" in makefile
