"""Jobs from request to result, with the real worker and trainers that are processes, if of no substance."""

import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import psutil
import pytest
from support.postgres_server import postgres as postgres
from support.service_fakes import FakeEngine, FakeStore

from models.errors import DatasetError, ModelNotFound, NameConflict
from models.training.job.request import FinetuneRequest
from service import datasets
from service.errors import IdempotencyMismatch, InsufficientStorage, JobFinished, ReportNotFound, TrainerUnavailable
from service.inference.registry.loader import ModelStatus
from service.inference.results import ParityImage
from service.jobs import Job, Jobs, trainer
from service.jobs.trainer import Trainers
from service.settings import Settings

pytestmark = pytest.mark.anyio
PATIENCE_S = 120  # for what takes a second on a machine that has nothing else to do
TRAINER = (sys.executable, str(Path(__file__).parent / "support" / "fake_trainer.py"))


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


def settings_in(root: Path, **settings: Any) -> Settings:
    (root / "datasets" / "photos").mkdir(parents=True, exist_ok=True)
    return Settings(data=root / "data", datasets=root / "datasets", weights=root / "weights", **settings)


async def deploy(engine: FakeEngine, name: str, version: int, samples: Sequence[ParityImage]) -> ModelStatus:
    """Deploys models of any name, but for version 9, which does not load."""
    if version == 9:
        raise ModelNotFound("no version 9")
    engine.asked[name] = (version, [(sample.name, sample.data) for sample in samples])
    return ModelStatus(name=name, default=False, state="ready", version=version)


@asynccontextmanager
async def jobs_in(root: Path, **settings: Any) -> AsyncIterator[Jobs]:
    store = FakeStore()
    jobs = Jobs(settings_in(root, **settings), FakeEngine(store), store, TRAINER)
    with mock.patch("service.jobs.service.deploy", deploy):
        jobs.start()
        yield jobs
        await jobs.close()


@pytest.fixture(scope="module")
async def jobs(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Jobs]:
    """One server's jobs for all tests here that do not restart it: opening takes a second."""
    async with jobs_in(tmp_path_factory.mktemp("jobs"), trainer_memory_mb=100) as jobs:
        yield jobs


names = (f"model-{number}" for number in range(1000))


def wanting(do: str, **fields: Any) -> FinetuneRequest:
    return FinetuneRequest.model_validate(
        {"dataset": "photos", "name": next(names), "metadata": {"do": do}, "deploy": "always", **fields}
    )


async def until(jobs: Jobs, id: str, happened: Callable[[Job], object]) -> Job:
    async with asyncio.timeout(PATIENCE_S):
        while not happened(job := await jobs.get(id)):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return job


async def ended(jobs: Jobs, id: str) -> Job:
    return await until(jobs, id, lambda job: job.terminal)


async def waiting(jobs: Jobs, name: str = "") -> Job:
    """A job whose trainer has written its checkpoint, and waits to be stopped."""
    job, _ = await jobs.create(wanting("wait", **({"name": name} if name else {})))
    return await until(jobs, job.id, lambda job: job.phase == "train")


async def messages(jobs: Jobs, id: str) -> list[str]:
    return [event["message"] for event in await jobs.events(id, 0, 100) if "message" in event]


# The course of a job


async def test_a_job_succeeds_and_its_model_serves(jobs: Jobs) -> None:
    created, _ = await jobs.create(wanting("succeed", name="pets"))
    job = await ended(jobs, created.id)
    assert (job.status, job.model, job.version, job.deployment) == ("succeeded", "pets", 2, "activated")
    assert (job.progress, job.attempt, job.effective) == (1.0, 1, {"lr": 0.1})
    assert cast(FakeEngine, jobs.engine).asked["pets"] == (2, [("cat/1.jpg", b"image")])


async def test_its_events_are_numbered_and_tell_everything(jobs: Jobs) -> None:
    job, _ = await jobs.create(wanting("succeed"))
    await ended(jobs, job.id)
    await asyncio.sleep(0.1)  # the last event comes just after the last status
    events = await jobs.events(job.id, 0, 100)
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert [event["status"] for event in events if "status" in event] == ["queued", "running", "succeeded"]
    assert "skipped notes.txt: not an image" in await messages(jobs, job.id)
    assert await jobs.events(job.id, events[1]["seq"], 1) == [events[2]]


async def test_its_report(jobs: Jobs) -> None:
    job, _ = await jobs.create(wanting("succeed"))
    await ended(jobs, job.id)
    assert json.loads(await jobs.report(job.id, page=False)) == {"schema": 1}
    assert (await jobs.report(job.id, page=True)).startswith(b"<!doctype html>")


@pytest.mark.abuse("J8")
@pytest.mark.parametrize(
    ("do", "status", "told"),
    [
        pytest.param("reject", "succeeded", "rejected: 3 points worse", id="rejected by the gate"),
        pytest.param("broken", "succeeded", "failed: no version 9", id="does not load"),
        pytest.param("fail", "failed", "invalid_dataset: one class only", id="failed"),
        pytest.param("crash:2", "succeeded", "activated", id="crashed twice"),
        pytest.param(
            "crash:9", "failed", "trainer_crashed: the trainer ended 3 times, at last by SIGKILL", id="crashed"
        ),
        pytest.param("greedy", "failed", "out_of_memory: the trainer took more than the 100 MB", id="memory"),
    ],
)
async def test_how_a_job_ends(jobs: Jobs, do: str, status: str, told: str) -> None:
    created, _ = await jobs.create(wanting(do))
    job = await ended(jobs, created.id)
    outcome = f"{job.error.code}: {job.error.message}" if job.error else job.deployment
    assert job.status == status
    assert str(outcome).startswith(told)


@pytest.mark.abuse("A1601")
@pytest.mark.parametrize(("times", "status", "attempt"), [(1, "succeeded", 2), (3, "failed", 3)])
async def test_a_trainer_that_stands_still_is_ended_and_begun_again(
    jobs: Jobs, monkeypatch: pytest.MonkeyPatch, times: int, status: str, attempt: int
) -> None:
    monkeypatch.setattr("service.jobs.watch.IDLE_S", 0.6)
    monkeypatch.setattr("service.jobs.watch.CPU_LOOK_S", 0.2)
    monkeypatch.setattr("service.jobs.worker.GRACE_S", 0.1)
    created, _ = await jobs.create(wanting(f"stopped:{times}"))
    job = await ended(jobs, created.id)
    assert (job.status, job.attempt) == (status, attempt)
    messages = [str(event.get("message")) for event in await jobs.events(created.id, 0, 100)]
    assert "ended by the server: neither progress nor CPU time for 1 s; it goes on" in " ".join(messages)
    assert job.error is None or job.error.code == "trainer_crashed"


@pytest.mark.abuse("A903")
async def test_a_dry_run_has_the_bound_on_memory_too(jobs: Jobs) -> None:
    with pytest.raises(DatasetError, match="took more than the 100 MB that trainer_memory_mb allows"):
        await jobs.dry_run(wanting("greedy"))


async def test_a_crash_is_told_and_counts_as_an_attempt(jobs: Jobs) -> None:
    created, _ = await jobs.create(wanting("crash:1"))
    job = await ended(jobs, created.id)
    assert job.attempt == 2
    assert "the trainer ended by SIGKILL; it goes on from its checkpoint" in await messages(jobs, job.id)
    assert not list((jobs.folders / job.id).glob(".tmp-*"))


async def test_stop_keeps_the_best(jobs: Jobs) -> None:
    job = await waiting(jobs)
    assert (job.status, job.progress > 0, job.eta_seconds is not None) == ("running", True, True)
    await jobs.stop(job.id)
    job = await ended(jobs, job.id)
    assert (job.status, job.stop_reason) == ("succeeded", "stopped")


async def test_what_a_cancelled_job_has_published_is_removed(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    store = cast(Any, jobs.store)
    monkeypatch.setattr(store, "versions", lambda name: [1, 2], raising=False)
    lineages = {1: {"run": "another"}, 2: {"run": "this"}}
    monkeypatch.setattr(
        store,
        "config",
        lambda name, version: SimpleNamespace(lineage=lineages[version], version=version),
        raising=False,
    )
    job = await waiting(jobs)
    (jobs.folders / job.id / "run.json").write_text('{"run": "this"}')
    await jobs.cancel(job.id)
    await ended(jobs, job.id)
    assert store.calls == [("remove", job.request["name"], 2)]


@pytest.mark.abuse("J6")
@pytest.mark.parametrize(
    "do",
    [
        pytest.param("wait", id="willing"),
        pytest.param("deaf", id="deaf to SIGTERM"),
        pytest.param("save", id="in a checkpoint"),
    ],
)
async def test_cancel_ends_it_within_5_s_and_leaves_nothing(jobs: Jobs, do: str) -> None:
    job, _ = await jobs.create(wanting(do))
    await until(jobs, job.id, lambda job: job.phase == "train")
    started = time.monotonic()
    assert (await jobs.cancel(job.id)).status == "cancelling"
    assert (await ended(jobs, job.id)).status == "cancelled"
    assert time.monotonic() - started < 5
    assert [entry.name for entry in (jobs.folders / job.id).iterdir()] == ["events.jsonl"]
    with pytest.raises(ReportNotFound):
        await jobs.report(job.id, page=False)


@pytest.mark.abuse("J4")
async def test_a_job_waits_for_the_one_before_it(jobs: Jobs) -> None:
    first = await waiting(jobs)
    second, _ = await jobs.create(wanting("succeed"))
    third, _ = await jobs.create(wanting("succeed"))
    assert ((await jobs.get(second.id)).queue_position, third.queue_position) == (1, 2)
    assert (await jobs.cancel(second.id)).status == "cancelled"
    await jobs.stop(first.id)
    assert (await ended(jobs, third.id)).status == "succeeded"
    assert (await jobs.get(second.id)).attempt == 0


@pytest.mark.abuse("J4")
async def test_the_same_name_twice(jobs: Jobs) -> None:
    first = await waiting(jobs)
    with pytest.raises(NameConflict):
        await jobs.create(wanting("succeed", name=first.request["name"]))
    await jobs.cancel(first.id)
    await ended(jobs, first.id)


async def test_a_deleted_job_takes_its_folder_with_it(jobs: Jobs) -> None:
    job, _ = await jobs.create(wanting("succeed"))
    await ended(jobs, job.id)
    with pytest.raises(JobFinished):
        await jobs.cancel(job.id)
    await jobs.delete(job.id)
    assert not (jobs.folders / job.id).exists()


async def test_the_same_key_gives_the_same_job(jobs: Jobs) -> None:
    request = wanting("succeed")
    first, replayed = await jobs.create(request, "key")
    again, replayed_again = await jobs.create(request, "key")
    assert (first.id == again.id, replayed, replayed_again) == (True, False, True)


@pytest.mark.abuse("J10")
async def test_too_little_disk(jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "_NEEDED_BYTES", 2**60)
    with pytest.raises(InsufficientStorage):
        await jobs.create(wanting("succeed"))


async def test_a_dry_run_starts_nothing(jobs: Jobs) -> None:
    (before,), _ = await jobs.page(None, 1)
    found = await jobs.dry_run(wanting("succeed"))
    assert found["audit"] == {"images": 12}
    assert Path(found["dataset"]).is_absolute()
    assert (await jobs.page(None, 1))[0][0].id == before.id
    assert not list(jobs.folders.glob(".tmp-*"))


async def test_a_dry_run_fails_as_the_job_would(jobs: Jobs) -> None:
    with pytest.raises(DatasetError, match="one class only"):
        await jobs.dry_run(wanting("fail"))


@pytest.mark.abuse("J13")
async def test_a_database_that_is_gone_is_said_and_forgotten_once_it_is_back(tmp_path: Path) -> None:
    (tmp_path / "data" / "jobs.sqlite").mkdir(parents=True)
    async with jobs_in(tmp_path) as jobs:
        with pytest.raises(TrainerUnavailable, match="unable to open database file"):
            await jobs.page(None, 1)


async def test_nothing_is_opened_before_the_first_call(tmp_path: Path) -> None:
    async with jobs_in(tmp_path):
        await asyncio.sleep(0.05)
    assert not (tmp_path / "data").exists()


async def test_a_spare_trainer_stands_ready_for_the_next_job(jobs: Jobs) -> None:
    job, _ = await jobs.create(wanting("succeed"))
    await ended(jobs, job.id)
    async with asyncio.timeout(PATIENCE_S):
        while len(spare := children()) != 1:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    job, _ = await jobs.create(wanting("succeed"))
    await ended(jobs, job.id)
    assert int((jobs.folders / job.id / "pid").read_text()) == spare[0]


async def test_a_job_takes_the_spare_trainer_that_was_started_during_the_one_before(jobs: Jobs) -> None:
    first = await waiting(jobs)
    at_work = int((jobs.folders / first.id / "pid").read_text())
    async with asyncio.timeout(PATIENCE_S):
        while not (spare := {*children()} - {at_work}):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    second, _ = await jobs.create(wanting("succeed"))
    await jobs.stop(first.id)
    await ended(jobs, second.id)
    assert {int((jobs.folders / second.id / "pid").read_text())} == spare


def test_a_spare_trainer_that_has_died_or_waited_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = shutil.copy(TRAINER[1], tmp_path / "own_trainer.py")  # to be told from the spare one of the jobs above
    trainers = Trainers(1, (sys.executable, str(own)))
    trainers.prepare()
    eventually(lambda: children("own_trainer.py") != [])  # its command line is there a moment after it has started
    (dead,) = children("own_trainer.py")
    os.kill(dead, signal.SIGKILL)
    monkeypatch.setattr(trainer, "SPARE_S", 0.1)
    eventually(lambda: command_of(dead) == b"")
    trainers.prepare()
    eventually(lambda: children("own_trainer.py") == [])
    trainers.take().end(0.0)


@pytest.mark.parametrize(("device", "seen"), [("cpu", ""), ("cuda:1", "GPU-b"), ("cuda", "GPU-a,GPU-b")])
def test_a_trainer_and_a_spare_one_see_the_gpus_of_the_setting(
    monkeypatch: pytest.MonkeyPatch, device: str, seen: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    trainers = Trainers(1, ("/usr/bin/env",), device)
    trainers.prepare()
    for process in (trainers.take(), trainers.take()):
        lines = b""
        while data := os.read(process._process.stdout.fileno(), 65536):  # type: ignore[union-attr]
            lines += data
        assert f"CUDA_VISIBLE_DEVICES={seen}" in lines.decode().splitlines()
        process.end(0.0)


# Restarts


async def test_a_server_that_leaves_takes_its_trainer_along_and_the_next_goes_on(tmp_path: Path) -> None:
    before = {*children()}  # the spare trainer of the jobs above
    async with jobs_in(tmp_path) as jobs:
        job = await waiting(jobs, "pets")
        second, _ = await jobs.create(wanting("succeed"))
    assert {*children()} <= before
    async with jobs_in(tmp_path) as jobs:
        await until(jobs, job.id, lambda job: job.attempt == 2 and job.phase == "train")
        await jobs.stop(job.id)
        job = await ended(jobs, job.id)
        assert (job.status, job.effective) == ("succeeded", {"begun": 2})  # from its checkpoint
        assert (await ended(jobs, second.id)).status == "succeeded"


@pytest.mark.abuse("G11")
async def test_a_server_that_drains_ends_its_trainer_at_once(tmp_path: Path) -> None:
    async with jobs_in(tmp_path) as jobs:
        job = await waiting(jobs)
        jobs.engine.draining = True
        async with asyncio.timeout(PATIENCE_S):
            while trainers_of(tmp_path):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert (await jobs.get(job.id)).status == "running"  # and so the next start takes it up


@pytest.mark.abuse("J5")
async def test_a_key_is_known_after_a_restart(tmp_path: Path) -> None:
    request = wanting("wait")
    async with jobs_in(tmp_path) as jobs:
        first, _ = await jobs.create(request, "key")
    async with jobs_in(tmp_path) as jobs:
        again, replayed = await jobs.create(request, "key")
        with pytest.raises(IdempotencyMismatch):
            await jobs.create(wanting("succeed"), "key")
        assert (again.id, replayed) == (first.id, True)
        assert len((await jobs.page(None, 10))[0]) == 1


async def test_two_servers_on_one_data_folder(tmp_path: Path) -> None:
    async with jobs_in(tmp_path) as jobs:
        await jobs.page(None, 1)
        async with jobs_in(tmp_path) as others:
            with pytest.raises(TrainerUnavailable, match="another server runs the jobs"):
                await others.page(None, 1)


async def test_the_same_on_postgresql(tmp_path: Path, postgres: str) -> None:
    async with jobs_in(tmp_path, jobs_database=postgres) as jobs:
        job = await waiting(jobs)
    async with jobs_in(tmp_path, jobs_database=postgres) as jobs:
        await until(jobs, job.id, lambda job: job.attempt == 2 and job.phase == "train")
        await jobs.stop(job.id)
        assert (await ended(jobs, job.id)).effective == {"begun": 2}
    assert not (tmp_path / "data" / "jobs.sqlite").exists()


def trainers_of(root: Path) -> list[int]:
    """The trainers of jobs under `root` that are alive."""
    pids = [int(path.read_text()) for path in root.glob("data/jobs/*/pid")]
    return [pid for pid in pids if b"fake_trainer.py" in command_of(pid)]


def children(script: str = "fake_trainer.py") -> list[int]:
    """Trainers that this process has started, spare ones included."""
    return [child.pid for child in psutil.Process().children() if script.encode() in command_of(child.pid)]


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def serve_jobs(root: Path, requests: list[dict[str, Any]]) -> None:
    """A server of jobs in a process of its own, until it is killed: submits `requests` and works."""

    async def main() -> None:
        async with jobs_in(root) as jobs:
            for request in requests:
                await jobs.create(FinetuneRequest.model_validate(request), "key")
            await asyncio.sleep(10 * PATIENCE_S)

    (root / "imported.json").write_text(json.dumps(list(sys.modules)))
    asyncio.run(main())


@contextmanager
def server_of(root: Path, *requests: FinetuneRequest) -> Iterator[int]:
    """`serve_jobs` in a process, killed with -9 at the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["service.app"])
    documents = [request.model_dump(mode="json", exclude_none=True) for request in requests]
    process = context.Process(target=serve_jobs, args=(root, documents))
    process.start()
    assert process.pid is not None
    yield process.pid
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def eventually(happened: Callable[[], object]) -> None:
    ends = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < ends
        time.sleep(0.05)


@pytest.mark.abuse("J7")
async def test_a_server_killed_with_9_loses_no_job(tmp_path: Path) -> None:
    with server_of(tmp_path, wanting("wait")):
        eventually(lambda: list(tmp_path.glob("data/jobs/*/checkpoint")))
    eventually(lambda: not trainers_of(tmp_path))
    async with jobs_in(tmp_path) as jobs:
        (job,), _ = await jobs.page(None, 10)
        await until(jobs, job.id, lambda job: job.attempt == 2 and job.phase == "train")
        await jobs.stop(job.id)
        assert (await ended(jobs, job.id)).effective == {"begun": 2}
    imported = json.loads((tmp_path / "imported.json").read_text())
    assert not {"sqlalchemy", "psycopg", "torchvision"} & set(imported)
    assert {m for m in imported if "models.training" in m} <= {
        "models.training",
        "models.training.job",
        "models.training.job.hyperparameters",
        "models.training.job.request",
        "models.training.job.job_files",
    }


# Counting


async def test_nothing_is_opened_to_be_counted(tmp_path: Path) -> None:
    async with jobs_in(tmp_path) as jobs:
        assert set((await jobs.counts()).values()) == {0}
    assert not (tmp_path / "data" / "jobs.sqlite").exists()


async def test_jobs_are_counted_by_status(tmp_path: Path) -> None:
    async with jobs_in(tmp_path) as jobs:
        job, _ = await jobs.create(wanting("succeed"))
        await ended(jobs, job.id)
        counts = await jobs.counts()
    assert (counts["succeeded"], counts["cancelling"]) == (1, 0)


async def test_a_database_that_does_not_answer_holds_nobody_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.jobs.service.COUNT_S", 0.02)
    monkeypatch.setattr("service.jobs.table.JobTable.counts", lambda self: time.sleep(2))
    async with jobs_in(tmp_path) as jobs:
        await jobs.page(None, 1)
        started = time.monotonic()
        assert await jobs.counts() == {}
        assert time.monotonic() - started < 1.5
