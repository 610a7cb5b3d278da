"""The trainer process: what it tells, how it ends, and that it ends with its server."""

import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch

from models.errors import DatasetError
from models.files.records import read_record, to_json
from models.images.cost import Limits
from models.training import run as finetune
from models.training import trainer_process as child
from models.training.dry_run import dry_run
from models.training.job.job_files import DRY_RUN, EXIT_DEVICE_LOST, EXIT_DISK_FULL, JOB, NO_DATASET, JobResult, JobSpec
from models.training.job.parent_process import explain
from models.training.job.request import Event, FinetuneRequest
from models.training.trainer_process import EXIT_ORPHANED, Reporter, rehearsal, work
from service.jobs.trainer import visible_gpus

PATIENCE_S = 120  # for what takes a second on a machine that has nothing else to do
DONE = JobResult(status="succeeded", model="pets", version=1, deployment="activate")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    request = FinetuneRequest(dataset=tmp_path, name="pets")
    paths = {"weights": tmp_path / "weights", "cache": tmp_path / "cache"}
    order = JobSpec(request=request, **paths, threads=1, limits=Limits(max_side=7))
    (tmp_path / JOB).write_bytes(to_json(order))
    return tmp_path


def never() -> bool:
    return False


@pytest.mark.abuse("J2")
@pytest.mark.parametrize("name", ["", "photos"])
def test_a_dataset_that_became_a_link_since_the_server_looked_is_refused(
    folder: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "outside" / "photos").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    request = FinetuneRequest(dataset=tmp_path / "link" / name, name="pets")
    order = JobSpec(request=request, weights=tmp_path / "weights", cache=tmp_path / "cache", threads=1)
    (folder / JOB).write_bytes(to_json(order))
    result = work(folder, lambda *given, **named: DONE, print, never)
    assert result.error is not None
    assert (result.error.code, result.error.message) == ("invalid_dataset", NO_DATASET)


@pytest.mark.abuse("J2")
def test_the_servers_trainer_follows_no_links(folder: Path) -> None:
    given: dict[str, object] = {}

    def noted(*_: object, **named: object) -> JobResult:
        given.update(named)
        return DONE

    assert work(folder, noted, print, never) == DONE
    assert "follow_links" not in given
    assert signature(finetune.run).parameters["follow_links"].default is False
    assert signature(dry_run).parameters["follow_links"].default is False


def test_an_order_for_a_gpu_fails_where_there_is_none(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    order = read_record(folder / JOB, JobSpec)
    (folder / JOB).write_bytes(to_json(order.model_copy(update={"device": "cuda"})))
    for result in (work(folder, finetune.run, print, never), rehearsal(folder, dry_run, print)):
        assert result.error is not None
        assert result.error.code == "device_unavailable"
        assert "CUDA_VISIBLE_DEVICES" in result.error.message


VISIBLE = "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("device", "server", "trainer"),
    [
        pytest.param("cpu", {}, {VISIBLE: ""}, id="cpu"),
        pytest.param("cpu", {VISIBLE: "0,1"}, {VISIBLE: ""}, id="cpu beside GPUs"),
        pytest.param("auto", {}, {}, id="auto"),
        pytest.param("cuda", {VISIBLE: "2,3"}, {}, id="all that the server sees"),
        pytest.param("cuda:1", {}, {VISIBLE: "1"}, id="by number"),
        pytest.param("cuda:1", {VISIBLE: "2, 5"}, {VISIBLE: "5"}, id="by the server's list"),
        pytest.param("cuda:1", {VISIBLE: "GPU-8a, GPU-b1,GPU-c2"}, {VISIBLE: "GPU-b1"}, id="by UUID"),
        pytest.param("cuda:3", {VISIBLE: "2,5"}, {VISIBLE: ""}, id="not there"),
    ],
)
def test_a_trainer_sees_the_gpus_of_the_setting(device: str, server: dict[str, str], trainer: dict[str, str]) -> None:
    assert visible_gpus(device, server) == trainer


def test_the_run_gets_what_the_order_says(folder: Path) -> None:
    given: dict[str, Any] = {}

    def run(request: FinetuneRequest, store: Any, progress: Any, **rest: Any) -> JobResult:
        given.update(rest, name=request.name, weights=store.root, threads=torch.get_num_threads())
        return DONE

    threads = torch.get_num_threads()
    assert work(folder, run, print, never) == DONE
    torch.set_num_threads(threads)
    paths = {"job_dir": folder, "cache": folder / "cache", "weights": folder / "weights"}
    assert given == {
        **paths,
        "stop": never,
        "name": "pets",
        "threads": 1,
        "device": "auto",
        "limits": Limits(max_side=7),
    }


@pytest.mark.parametrize(
    ("error", "code", "told"),
    [
        pytest.param(DatasetError("one class only"), "invalid_dataset", "one class only", id="ours"),
        pytest.param(MemoryError(), "out_of_memory", "smaller batch_size", id="memory"),
        pytest.param(torch.OutOfMemoryError("CUDA"), "out_of_memory", "smaller batch_size", id="memory of the device"),
        pytest.param(
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory", "", id="torch's"
        ),
        pytest.param(OSError(errno.ENOSPC, "No space left on device"), "disk_full", "free some space", id="disk"),
        pytest.param(OSError(errno.EDQUOT, "Quota"), "disk_full", "free some space", id="quota"),
        pytest.param(RuntimeError("I/O error: No space left on device (os error 28)"), "disk_full", "", id="wrapped"),
        pytest.param(ZeroDivisionError("secret"), "internal", "ZeroDivisionError in the trainer", id="a bug"),
    ],
)
def test_every_failure_is_a_result(
    folder: Path, error: Exception, code: str, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def run(*args: Any, **rest: Any) -> JobResult:
        raise error

    result = work(folder, run, print, never)
    assert result.error is not None
    assert (result.status, result.error.code) == ("failed", code)
    assert told in result.error.message
    assert "secret" not in result.error.message
    assert type(error).__name__ in capfd.readouterr().err  # the traceback


def test_a_full_disk_is_found_behind_other_errors() -> None:
    error = DatasetError("could not be written")
    error.__cause__ = OSError(errno.ENOSPC, "full")
    assert explain(error).code == "disk_full"


def test_a_dry_run_writes_what_it_found(folder: Path) -> None:
    result = rehearsal(folder, lambda *args, **rest: {"audit": {"images": 3}}, print)
    assert result == JobResult(status="succeeded")
    assert json.loads((folder / DRY_RUN).read_text()) == {"audit": {"images": 3}}


def told(*events: Event) -> list[dict[str, Any]]:
    out = io.StringIO()
    reporter = Reporter(out)
    for event in events:
        reporter(event)
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_plain_progress_is_told_a_few_times_a_second_and_the_rest_always() -> None:
    plain = [Event("features", i / 1000) for i in range(1000)]
    news = [Event("features", 1.0), Event("train", 0.0), Event("train", 0.1, epoch=1), Event("train", 0.1, message="m")]
    assert [event["progress"] for event in told(*plain, *news)] == [0.0, 1.0, 0.0, 0.1, 0.1]


def test_what_json_cannot_say_is_left_out() -> None:
    (event,) = told(Event("train", 0.5, epoch=2, loss=float("nan"), accuracy=0.5))
    assert event.keys() == {"phase", "progress", "epoch", "accuracy", "at"}


# As a process

MAIN = """
import os, sys, time
from pathlib import Path
from models.training.trainer_process import be_modest, main
from models.training.job.job_files import JobResult
from models.training.job.request import Event

def run(request, store, progress, *, job_dir, cache, stop, device, limits):
    print("a library's chatter")
    progress(Event("train", 0.5, epoch=1))
    while not stop():
        time.sleep(0.02)
    return JobResult(status="succeeded", model=request.name, version=1, stop_reason="stopped")

be_modest()
print(os.nice(0) >= 10, os.sched_getscheduler(0) == os.SCHED_BATCH, file=sys.stderr, flush=True)
sys.exit(main(Path(sys.argv[1]), run))
"""
# A process that never comes to import torch, which takes seconds: it marks its folder, and sleeps.
IDLE = """
import sys, time
from pathlib import Path
from models.training import trainer_process

def idle(folder, *rest):
    (folder / "idle").touch()
    time.sleep(600)

trainer_process.work = idle
trainer_process._get_ready = lambda: None
sys.exit(trainer_process.main(*map(Path, sys.argv[1:])))
"""


@contextmanager
def process(script: str, *words: Path, **options: Any) -> Iterator["subprocess.Popen[str]"]:
    child = subprocess.Popen([sys.executable, "-c", script, *map(str, words)], text=True, **options)
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        for stream in (child.stdin, child.stdout, child.stderr):
            if stream is not None:
                stream.close()


def test_events_and_nothing_else_on_stdout_and_stop_on_stdin(folder: Path) -> None:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with process(MAIN, folder, **pipes) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        first = json.loads(child.stdout.readline())
        child.stdin.write("stop\n")
        child.stdin.flush()
        rest, chatter = child.stdout.read(), child.stderr.read()
        assert child.wait(PATIENCE_S) == 0
    assert (first["phase"], first["epoch"], rest) == ("train", 1, "")
    assert chatter.splitlines()[0] == "True True"  # its niceness, and SCHED_BATCH
    assert "a library's chatter" in chatter
    result = JobResult.model_validate_json((folder / "result.json").read_bytes())
    assert (result.model, result.stop_reason) == ("pets", "stopped")


@pytest.mark.parametrize("failure", ["disk", "device"])
def test_a_full_disk_and_a_lost_gpu_are_no_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: str
) -> None:
    """In this process: `main` leaves its descriptors and signals alone."""
    error: Exception = OSError(errno.ENOSPC, "No space left on device")
    if failure == "device":
        error = RuntimeError("CUDA error: unspecified launch failure\nCompile with ...")
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        assert "(CUDA error: unspecified launch failure)" in explain(error).message
    full = JobResult(status="failed", error=explain(error))
    for name, stand_in in {"die_with_parent": lambda: None, "_take_stdout": io.StringIO, "_listen": print}.items():
        monkeypatch.setattr(child, name, stand_in)
    monkeypatch.setattr(child, "work", lambda *given: full)
    assert child.main(tmp_path) == (EXIT_DISK_FULL if failure == "disk" else EXIT_DEVICE_LOST)
    assert not list(tmp_path.iterdir())


def test_a_server_that_is_gone_is_no_failure_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """os._exit cannot be caught by the run's own `except Exception`; the exception that stands for it cannot either."""

    def leave(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr(os, "_exit", leave)
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(SystemExit, match=str(EXIT_ORPHANED)):
        Reporter(os.fdopen(writing, "w", closefd=False))(Event("train", 0.5, epoch=1))
    os.close(writing)


def test_it_ends_when_its_stdin_does(folder: Path) -> None:
    with process(IDLE, folder, stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(PATIENCE_S) == 1


def test_it_waits_for_the_folder_to_be_named(folder: Path) -> None:
    with process(IDLE, stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.write(json.dumps({"folder": str(folder), "dry_run": False}) + "\n")
        child.stdin.flush()
        eventually((folder / "idle").exists)


def test_a_spare_one_ends_with_its_stdin() -> None:
    with process(IDLE, stdin=subprocess.PIPE) as child:
        assert child.stdin is not None
        child.stdin.close()
        assert child.wait(PATIENCE_S) in (0, EXIT_ORPHANED)  # it waited already, or not yet


@pytest.mark.abuse("J7")
def test_it_does_not_even_begin_its_imports_where_its_server_is_gone() -> None:
    """They take ten seconds on a busy machine, and more."""
    reading, writing = os.pipe()
    os.close(writing)
    with process(IDLE.replace("lambda: None", "lambda: time.sleep(600)"), stdin=reading) as child:
        os.close(reading)
        assert child.wait(PATIENCE_S) == EXIT_ORPHANED


@pytest.mark.abuse("J7")
def test_it_dies_with_its_parent_even_where_stdin_stays_open(folder: Path) -> None:
    """The parent is a process in between, which starts it and is killed; stdin is a pipe of ours."""
    parent = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {IDLE!r}, sys.argv[1]])
print(child.pid, flush=True)
time.sleep(600)
"""
    ours, theirs = os.pipe()
    with process(parent, folder, stdin=ours, stdout=subprocess.PIPE) as between:
        assert between.stdout is not None
        pid = int(between.stdout.readline())
        eventually((folder / "idle").exists)
        between.kill()
        eventually(lambda: not status(pid) or "State:\tZ" in status(pid))
    os.close(ours)
    os.close(theirs)


def test_sigterm_ends_it_at_once(folder: Path) -> None:
    with process(IDLE, folder, stdin=subprocess.PIPE) as child:
        eventually((folder / "idle").exists)
        child.send_signal(signal.SIGTERM)
        assert child.wait(PATIENCE_S) == -signal.SIGTERM


def status(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return ""


def eventually(happened: Callable[[], object]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.02)
