"""Two servers on one PostgreSQL, of which one is lost: its job goes on at the other."""

import asyncio
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from support.postgres_server import postgres as postgres
from test_jobs import PATIENCE_S, command_of, ended, eventually, jobs_in, until, wanting

from service.jobs import Jobs, takeover
from service.jobs.table import JobTable
from service.jobs.takeover import Takeover

pytestmark = pytest.mark.anyio


def serve(root: Path, url: str) -> None:
    """The server `first`, in a process of its own, with a job that waits to be stopped."""
    takeover.BEAT_S = 0.1

    async def main() -> None:
        async with jobs_in(root, jobs_database=url, server_name="first") as jobs:
            await jobs.create(wanting("wait", name="pets"), "key")
            await asyncio.sleep(10 * PATIENCE_S)

    asyncio.run(main())


@contextmanager
def first_server(root: Path, url: str) -> Iterator[int]:
    """Its process id, once its trainer trains; killed at the end."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["service.app"])
    process = context.Process(target=serve, args=(root, url))
    process.start()
    assert process.pid is not None
    try:
        eventually(lambda: list(root.glob("data/jobs/*/checkpoint")))
        yield process.pid
    finally:
        process.kill()
        process.join()


@asynccontextmanager
async def second_server(root: Path, url: str) -> AsyncIterator[Jobs]:
    async with jobs_in(root, jobs_database=url, server_name="second") as jobs:
        await jobs.page(None, 1)
        yield jobs


@pytest.fixture
def database(postgres: str, tmp_path: Path) -> str:
    """A database of the test's own."""
    import psycopg

    name = f"imago_{time.monotonic_ns()}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgres.rpartition("/")[0] + f"/{name}"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover, "BEAT_S", 0.1)
    monkeypatch.setattr(takeover, "LOST_S", 3.0)


async def test_the_job_of_a_server_that_does_not_come_back(tmp_path: Path, database: str) -> None:
    with first_server(tmp_path, database) as pid:
        async with second_server(tmp_path, database) as jobs:
            (job,), _ = await jobs.page(None, 1)
            os.kill(pid, signal.SIGKILL)
            await until(jobs, job.id, lambda job: job.attempt == 2 and job.phase == "train")
            await jobs.stop(job.id)
            assert (await ended(jobs, job.id)).effective == {"begun": 2}  # from its checkpoint


async def test_a_server_that_was_only_away_ends_its_trainer(tmp_path: Path, database: str) -> None:
    with first_server(tmp_path, database) as pid:
        async with second_server(tmp_path, database) as jobs:
            (job,), _ = await jobs.page(None, 1)
            trainer = int((jobs.folders / job.id / "pid").read_text())
            os.kill(pid, signal.SIGSTOP)
            await until(jobs, job.id, lambda job: job.attempt == 2 and job.phase == "train")
            os.kill(pid, signal.SIGCONT)
            await asyncio.to_thread(eventually, lambda: command_of(trainer) == b"")
            await jobs.stop(job.id)
            assert (await ended(jobs, job.id)).attempt == 2


class Lost:
    """A queue in which the server `first` holds one job; what is put back."""

    def __init__(self) -> None:
        self.put = list[str]()

    def held_by(self, server: str) -> list[str]:
        return ["job"] if server == "first" else []

    def put_back(self, job: str) -> None:
        self.put.append(job)


def standing_by(table: JobTable, folders: Path, name: str = "second") -> tuple[Takeover, Lost]:
    queue = Lost()
    found = Takeover(table, name, folders, lambda: None)
    found._queue = cast(Any, queue)
    return found, queue


@pytest.fixture
def table(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobTable]:
    """In which `first` was heard of long ago."""
    monkeypatch.setattr(takeover, "LOST_S", -1.0)
    table = JobTable(database)
    Takeover(table, "first", tmp_path, lambda: None)
    yield table
    table.close()


def test_one_of_several_takes_it(table: JobTable, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    (one, first), (other, second) = standing_by(table, tmp_path, "second"), standing_by(table, tmp_path, "third")
    one._take_over()
    other._take_over()
    assert (first.put, second.put) == (["job"], [])


def test_a_job_out_of_reach_is_left_to_others(
    table: JobTable, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    apart, out_of_reach = standing_by(table, tmp_path / "elsewhere")
    apart._take_over()
    apart._take_over()
    assert out_of_reach.put == []
    assert caplog.text.count("is not in") == 1
    (tmp_path / "job").mkdir()
    near, reached = standing_by(table, tmp_path)
    near._take_over()
    assert reached.put == ["job"]


def test_who_is_heard_keeps_its_job(table: JobTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(takeover, "LOST_S", 60.0)
    (tmp_path / "job").mkdir()
    server, queue = standing_by(table, tmp_path)
    server._take_over()
    assert queue.put == []


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_after_an_outage_of_the_database_all_get_time_to_come_back(
    table: JobTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(takeover, "time", clock)
    monkeypatch.setattr(takeover, "LOST_S", 60.0)
    (tmp_path / "job").mkdir()
    server, _ = standing_by(table, tmp_path)
    looked = list[float]()
    monkeypatch.setattr(server, "_take_over", lambda: looked.append(clock.now))
    for clock.now in (1020.0, 1040.0, 1060.0, 1100.0, 1120.0, 1140.0, 1159.0, 1160.0):
        server._turn()
    assert looked == [1060.0, 1160.0]
