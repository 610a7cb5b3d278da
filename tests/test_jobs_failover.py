"""Two servers on one PostgreSQL, of which one is lost: its job goes on at the other."""

import asyncio
import logging
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, cast

import pytest
from support.postgres_server import database as database
from support.postgres_server import postgres as postgres
from test_jobs import PATIENCE_S, command_of, ended, eventually, jobs_in, until, wanting

from service.jobs import Jobs, failover
from service.jobs.failover import Heartbeat
from service.jobs.table import JobTable, Submission
from service.jobs.worker import Worker

pytestmark = pytest.mark.anyio


def serve(root: Path, url: str) -> None:
    """The server `first`, in a process of its own, with a job that waits to be stopped."""
    failover.BEAT_S = 0.1

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


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failover, "BEAT_S", 0.1)
    monkeypatch.setattr(failover, "LOST_S", 3.0)


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


def anywhere(job: str) -> bool:
    return True


@pytest.fixture
def tables(database: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[JobTable]]:
    """Of the servers `first`, which was heard of long ago and has begun a job, `second` and `third`."""
    monkeypatch.setattr(failover, "LOST_S", -1.0)
    tables = [JobTable(database, name) for name in ("first", "second", "third")]
    tables[0].add(Submission("job", {"name": "n", "dataset": "d", "mode": "head"}, None, ""), 1)
    Heartbeat(tables[0])
    tables[0].begin(str(tables[0].claim(anywhere)))
    yield tables
    for table in tables:
        table.close()


def test_one_of_several_takes_it(tables: list[JobTable], monkeypatch: pytest.MonkeyPatch) -> None:
    _, second, third = tables
    heartbeats = [Heartbeat(second), Heartbeat(third)]
    assert second.claim(anywhere) is None
    heartbeats[0]._forget_lost()
    monkeypatch.setattr(failover, "LOST_S", 60.0)
    for heartbeat in heartbeats:
        heartbeat._turn()
    assert (second.claim(anywhere), third.claim(anywhere)) == ("job", None)


def test_a_server_that_was_only_away_keeps_what_nobody_has_claimed(tables: list[JobTable]) -> None:
    first, second, _ = tables
    away, heartbeat = Heartbeat(first), Heartbeat(second)
    heartbeat._forget_lost()
    away._beat()
    assert second.claim(anywhere) is None
    assert first.control("job").status == "running"


def test_a_server_that_starts_again_has_its_jobs_at_once(tables: list[JobTable], database: str) -> None:
    again = JobTable(database, "first")
    Heartbeat(again)
    assert tables[1].claim(anywhere) is None
    assert again.claim(lambda job: False) == "job"
    again.close()


def test_a_job_out_of_reach_is_left_to_others(tmp_path: Path, database: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    lost, table = JobTable(database, "lost"), JobTable(database)
    lost.add(Submission("job", {"name": "n", "dataset": "d", "mode": "head"}, None, ""), 1)
    lost.begin(str(lost.claim(anywhere)))
    worker = Worker(cast(Any, None), cast(Any, None), table, tmp_path, lambda *_: None, lambda: False, cast(Any, None))
    for _ in range(2):
        assert table.claim(worker._reaches) is None
    assert caplog.text.count("is not in") == 1
    (tmp_path / "job").mkdir()
    assert table.claim(worker._reaches) == "job"
    for each in (lost, table):
        each.close()


def test_a_server_that_is_heard_keeps_its_job(tables: list[JobTable], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failover, "LOST_S", 60.0)
    Heartbeat(tables[1])._forget_lost()
    assert tables[1].claim(anywhere) is None


class Clock:
    now = 1000.0

    def monotonic(self) -> float:
        return self.now


def test_after_an_outage_of_the_database_all_get_time_to_come_back(
    tables: list[JobTable], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(failover, "time", clock)
    monkeypatch.setattr(failover, "LOST_S", 60.0)
    server = Heartbeat(tables[1])
    looked = list[float]()
    monkeypatch.setattr(server, "_forget_lost", lambda: looked.append(clock.now))
    for clock.now in (1020.0, 1040.0, 1060.0, 1100.0, 1120.0, 1140.0, 1159.0, 1160.0):
        server._turn()
    assert looked == [1060.0, 1160.0]
