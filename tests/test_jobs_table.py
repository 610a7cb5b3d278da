"""The table of jobs: transitions with one winner, idempotency, pages; on SQLite and on PostgreSQL."""

import sqlite3
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from support.postgres_server import database as database
from support.postgres_server import postgres as postgres

from models.errors import NameConflict
from service.diagnostics import doctor
from service.errors import (
    BadRequest,
    IdempotencyMismatch,
    JobActive,
    JobFinished,
    JobNotFound,
    JobNotStarted,
    QueueFull,
    TrainerUnavailable,
)
from service.jobs.database import JOBS
from service.jobs.failover import Heartbeat
from service.jobs.job import Job
from service.jobs.table import Interrupted, JobTable, Submission
from service.settings import Settings

MANY = 1000


@pytest.fixture(params=["sqlite", "postgresql"])
def table(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[JobTable]:
    kind: str = request.param
    url = f"sqlite:///{tmp_path}/jobs.sqlite" if kind == "sqlite" else request.getfixturevalue("postgres")
    table = JobTable(url)
    with table._engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM imago_jobs"))
        connection.execute(sa.text("DELETE FROM imago_servers"))
    yield table
    table.close()


def submission(id: str = "a", name: str = "pets", key: str | None = None, body: str = "0") -> Submission:
    return Submission(id, {"name": name, "dataset": "d", "mode": "head"}, key, body)


def add(table: JobTable, id: str = "a", **fields: Any) -> Job:
    return table.add(submission(id, **{"name": id, **fields}), MANY)[0]


def begin(table: JobTable, id: str = "a") -> bool:
    """Begins a job, whoever's turn it is."""
    with table.transaction() as connection:
        connection.execute(JOBS.update().where(JOBS.c.id == id).values(session=table.session))
    return table.begin(id)


def test_a_job_is_queued_and_knows_its_place(table: JobTable) -> None:
    jobs = [add(table, id) for id in "abc"]
    assert [(job.status, job.terminal, job.queue_position) for job in jobs] == [("queued", False, n) for n in (1, 2, 3)]
    table.cancel("a")
    assert [table.get(id).queue_position for id in "abc"] == [None, 1, 2]


def test_its_life(table: JobTable) -> None:
    add(table)
    assert begin(table)
    table.progress("a", "features", 0.4, 12.34)
    running = table.get("a")
    assert (running.status, running.phase, running.progress, running.eta_seconds) == ("running", "features", 0.4, 12.3)
    assert table.deploying("a", {"model": "pets", "version": 3, "effective": {"lr": 0.1}})
    assert table.finish("a", "succeeded", deployment="activated")
    done = table.get("a")
    assert (done.status, done.terminal, done.version, done.deployment) == ("succeeded", True, 3, "activated")
    assert done.finished_at is not None
    assert done.started_at is not None
    assert done.created_at <= done.started_at <= done.finished_at


def test_each_attempt_counts_and_the_first_start_stays(table: JobTable) -> None:
    add(table)
    begin(table)
    first = table.get("a").started_at
    assert begin(table)
    assert [table.crashed("a", reached) for reached in ((2, 1), (2, 1), (1, 0))] == [1, 2, 3]
    assert (table.get("a").attempt, table.get("a").started_at) == (2, first)


def test_crashes_count_anew_once_it_got_further(table: JobTable) -> None:
    add(table)
    begin(table)
    reached = ((2, 1), (2, 1), (2, 2), (2, 0), (3, 0))  # the resumed run of the fourth did not come so far
    assert [table.crashed("a", point) for point in reached] == [1, 2, 1, 2, 1]


def test_an_attempt_is_taken_back(table: JobTable) -> None:
    add(table)
    begin(table)
    for _ in range(2):
        table.uncount("a")
    assert table.get("a").attempt == 0


def test_a_job_that_was_deleted(table: JobTable) -> None:
    for ask in (table.control, lambda id: table.crashed(id, (0, 0))):
        with pytest.raises(JobNotFound):
            ask("a")
    assert table.ids() == set()


@pytest.mark.abuse("J6")
def test_a_queued_job_is_cancelled_at_once(table: JobTable) -> None:
    add(table)
    assert table.cancel("a").status == "cancelled"
    assert not begin(table)
    assert table.cancel("a").status == "cancelled"  # twice does no harm


@pytest.mark.abuse("J6")
def test_a_running_job_that_is_cancelled_cannot_succeed(table: JobTable) -> None:
    add(table)
    begin(table)
    assert [table.cancel("a").status for _ in range(2)] == ["cancelling", "cancelling"]
    assert not table.deploying("a", {})
    assert not table.finish("a", "failed")
    assert table.finish("a", "cancelled")


@pytest.mark.abuse("J6")
def test_a_job_that_is_being_deployed_cannot_be_cancelled(table: JobTable) -> None:
    add(table)
    begin(table)
    table.deploying("a", {})
    with pytest.raises(JobFinished, match="too late"):
        table.cancel("a")
    assert table.get("a").status == "running"


@pytest.mark.abuse("J6")
def test_of_cancel_and_success_at_the_same_moment_one_wins(table: JobTable) -> None:
    for number in range(10):
        id = str(number)
        add(table, id)
        begin(table, id)
        with ThreadPoolExecutor(2) as pool:
            deploying = pool.submit(table.deploying, id, {})
            cancelling = pool.submit(outcome, table.cancel, id)
        assert (deploying.result(), cancelling.result()) in ((True, "JobFinished"), (False, "cancelling"))


def outcome(call: Any, id: str) -> str:
    try:
        return str(call(id).status)
    except JobFinished as error:
        return type(error).__name__


@pytest.mark.abuse("J6")
def test_what_is_at_its_end_is_neither_cancelled_nor_stopped(table: JobTable) -> None:
    add(table)
    begin(table)
    table.finish("a", "failed", error={"code": "x", "message": "y"})
    for call in (table.cancel, table.stop):
        with pytest.raises(JobFinished):
            call("a")


def test_stop_is_for_running_jobs(table: JobTable) -> None:
    add(table)
    with pytest.raises(JobNotStarted, match="cancel it instead"):
        table.stop("a")
    begin(table)
    table.stop("a")
    assert table.control("a").stop


def test_only_what_is_at_its_end_is_deleted(table: JobTable) -> None:
    add(table)
    with pytest.raises(JobActive):
        table.delete("a")
    table.cancel("a")
    table.delete("a")
    with pytest.raises(JobNotFound):
        table.delete("a")


@pytest.mark.abuse("J5")
def test_the_same_key_and_body_give_the_same_job(table: JobTable) -> None:
    first, _ = table.add(submission("a", key="k"), MANY)
    again, replayed = table.add(submission("b", key="k"), MANY)
    assert (again.id, replayed) == (first.id, True)


@pytest.mark.abuse("J5")
def test_the_same_key_with_another_body_is_refused(table: JobTable) -> None:
    table.add(submission("a", key="k"), MANY)
    with pytest.raises(IdempotencyMismatch):
        table.add(submission("b", key="k", body="1"), MANY)


@pytest.mark.abuse("J5")
def test_a_key_is_forgotten_after_a_day(table: JobTable, monkeypatch: pytest.MonkeyPatch) -> None:
    table.add(submission("a", key="k"), MANY)
    later = time.time() + 25 * 3600
    monkeypatch.setattr(time, "time", lambda: later)
    assert not table.add(submission("b", name="other", key="k", body="1"), MANY)[1]


@pytest.mark.abuse("J5")
def test_one_key_in_ten_requests_at_once_is_one_job(table: JobTable) -> None:
    with ThreadPoolExecutor(10) as pool:
        added = list(pool.map(lambda n: table.add(submission(str(n), key="k"), MANY), range(10)))
    assert len({job.id for job, _ in added}) == 1
    assert [replayed for _, replayed in added].count(False) == 1


@pytest.mark.abuse("J4")
def test_two_jobs_for_one_name(table: JobTable) -> None:
    table.add(submission("a"), MANY)
    with pytest.raises(NameConflict, match="'pets'"):
        table.add(submission("b"), MANY)
    table.cancel("a")
    assert table.add(submission("b"), MANY)[0].status == "queued"


def test_no_more_than_so_many_wait(table: JobTable) -> None:
    add(table, "a")
    with pytest.raises(QueueFull) as refused:
        table.add(submission("b", name="b"), 1)
    assert refused.value.retry_after_s


def test_pages_from_the_latest_on(table: JobTable) -> None:
    for id in "abcde":
        add(table, id)
    first, more = table.page(None, 2)
    second, _ = table.page(first[-1].id, 2)
    last, no_more = table.page(second[-1].id, 2)
    assert ["".join(job.id for job in page) for page in (first, second, last)] == ["ed", "cb", "a"]
    assert (more, no_more) == (True, False)
    with pytest.raises(BadRequest):
        table.page("nobody", 2)


# Whose turn it is


@pytest.fixture
def other(table: JobTable) -> Iterator[JobTable]:
    """Another server's view of the same table."""
    other = JobTable(table._engine.url.render_as_string(hide_password=False), "other")
    yield other
    other.close()


def anywhere(job: str) -> bool:
    return True


def test_jobs_are_claimed_from_the_oldest_on(table: JobTable) -> None:
    for id in "abc":
        add(table, id)
    table.cancel("a")
    assert claim_all(table) == ["b", "c"]


def test_one_job_is_claimed_by_one_of_many_servers(table: JobTable) -> None:
    if not table.shared:
        pytest.skip("SQLite is for one server")
    url = table._engine.url.render_as_string(hide_password=False)
    servers = [JobTable(url, f"server-{number}") for number in range(4)]
    for server in servers:
        Heartbeat(server)
    for number in range(40):
        add(table, str(number))
    with ThreadPoolExecutor(4) as pool:
        claimed = list(pool.map(claim_all, servers))
    assert sorted(int(id) for ids in claimed for id in ids) == list(range(40))
    for server in servers:
        server.close()


def claim_all(table: JobTable) -> list[str]:
    claimed = []
    while id := table.claim(anywhere):
        claimed.append(id)
        table.begin(id)
        table.finish(id, "failed")
    return claimed


def test_a_server_whose_job_another_has_claimed_changes_nothing(table: JobTable, other: JobTable) -> None:
    """As a server that was stopped for minutes, and goes on."""
    add(table)
    begin(table)
    table.progress("a", "train", 0.5, None)
    assert other.claim(anywhere) == "a"  # the first has no heartbeat
    assert other.begin("a")
    table.progress("a", "train", 0.9, None)
    table.uncount("a")
    table.crashed("a", (1, 1))
    assert not any((table.begin("a"), table.deploying("a", {}), table.finish("a", "failed")))
    with pytest.raises(Interrupted):
        table.control("a")
    job = other.get("a")
    assert (job.status, job.progress, job.attempt, other.crashed("a", (1, 1))) == ("running", 0.5, 2, 1)
    assert other.finish("a", "succeeded")


def test_a_begun_job_is_claimed_by_a_server_that_has_its_folder(table: JobTable, other: JobTable) -> None:
    for id in "ab":
        add(table, id)
    begin(table)
    assert other.claim(lambda job: False) == "b"
    assert table.claim(lambda job: False) == "a"  # it is its own


@pytest.mark.abuse("J14")
def test_pages_of_many_are_quick(tmp_path: Path) -> None:
    """In CPU time, since other tests may run beside it."""
    table = JobTable(f"sqlite:///{tmp_path}/jobs.sqlite")
    row = {"status": "cancelled", "created_at": 0.0, "request": {}, "body_sha256": "", "name": "n"}
    with table._engine.begin() as connection:
        connection.execute(JOBS.insert(), [row | {"id": str(number)} for number in range(100_000)])
    for number in range(100):
        add(table, f"queued {number}")
    took = []
    for after in [None, *(str(number) for number in range(99_000, 0, -1000))]:
        started = time.thread_time()
        page, _ = table.page(after, 100)
        took.append(time.thread_time() - started)
        assert page[0].id == (str(int(after) - 1) if after else "queued 99")
    assert sorted(took)[98] < 0.05
    table.close()


@pytest.mark.abuse("J14")
def test_no_job_ends_before_it_began_where_the_clock_is_set_back(
    table: JobTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([5000.0, 4000.0, 4000.0, 3000.0, 2000.0])
    monkeypatch.setattr(time, "time", lambda: next(clock))
    add(table)
    begin(table)
    begin(table)
    table.finish("a", "failed")
    job = table.get("a")
    assert job.started_at is not None
    assert job.finished_at is not None
    assert job.created_at <= job.started_at <= job.finished_at


@pytest.mark.abuse("J14")
def test_durations_are_by_a_clock_that_nobody_sets() -> None:
    """`time.time()` only where a time is shown, or compared with one that another process has written."""
    root = Path(__file__).parents[1]
    paths = [path for package in ("service", "models") for path in (root / package).rglob("*.py")]
    users = {
        str(path.relative_to(root)) for path in paths if "time.time()" in path.read_text().replace("# time.time()", "")
    }
    assert users == {"service/jobs/table.py", "service/inference/results.py"}


@pytest.mark.abuse("J13")
def test_a_database_of_a_newer_imago_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.sqlite"
    table = JobTable(url)
    with table._engine.begin() as connection:
        connection.execute(sa.text("UPDATE imago_schema SET version = 99"))
    table.close()
    with pytest.raises(TrainerUnavailable, match="newer Imago"):
        JobTable(url)


V1 = """
CREATE TABLE imago_schema (version INTEGER PRIMARY KEY);
INSERT INTO imago_schema VALUES (1);
CREATE TABLE imago_jobs (number INTEGER NOT NULL, id VARCHAR(64) NOT NULL, name VARCHAR(64) NOT NULL,
    status VARCHAR(16) NOT NULL, phase VARCHAR(16), progress FLOAT NOT NULL, eta_seconds FLOAT, created_at FLOAT NOT NULL,
    started_at FLOAT, finished_at FLOAT, stop_requested BOOLEAN NOT NULL, stop_reason VARCHAR(32),
    attempt INTEGER NOT NULL, crashes INTEGER NOT NULL, crash_point JSON, request JSON NOT NULL, effective JSON,
    error JSON, model VARCHAR(64), version INTEGER, deployment TEXT, idempotency_key VARCHAR(255),
    body_sha256 VARCHAR(64) NOT NULL, PRIMARY KEY (number), UNIQUE (id), UNIQUE (idempotency_key));
INSERT INTO imago_jobs (number, id, name, status, progress, created_at, stop_requested, attempt, crashes, request, body_sha256)
    VALUES (1, 'a', 'n', 'running', 0.5, 0, false, 1, 0, '{"name": "n", "dataset": "d"}', ''),
           (2, 'b', 'm', 'queued', 0, 0, false, 0, 0, '{"name": "m", "dataset": "d"}', '');
CREATE TABLE workflow_status (workflow_uuid TEXT);
INSERT INTO workflow_status VALUES ('a');
"""


def test_jobs_of_a_database_from_before_are_claimed(tmp_path: Path) -> None:
    """One with the tables of DBOS in it, which stay."""
    with sqlite3.connect(tmp_path / "jobs.sqlite") as connection:
        connection.executescript(V1)
    connection.close()
    for _ in range(2):
        table = JobTable(f"sqlite:///{tmp_path}/jobs.sqlite")
        assert table.claim(anywhere) == "a"
        table.close()
    with closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as connection:
        assert connection.execute("SELECT * FROM workflow_status").fetchall() == [("a",)]
        assert connection.execute("SELECT max(version) FROM imago_schema").fetchone() == (2,)


def test_a_shared_database_is_upgraded_once_no_older_server_uses_it(database: str) -> None:
    import psycopg

    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(V1.encode())
        connection.execute("CREATE TABLE imago_servers (name VARCHAR(64) PRIMARY KEY, seen_at FLOAT NOT NULL)")
        connection.execute("INSERT INTO imago_servers VALUES ('old', extract(epoch FROM now()))")
        with pytest.raises(TrainerUnavailable, match="'old' uses the jobs database with an older Imago; stop it"):
            JobTable(database, "new")
        assert connection.execute("SELECT max(version) FROM imago_schema").fetchone() == (1,)
        connection.execute("UPDATE imago_servers SET seen_at = seen_at - 61")
    table = JobTable(database, "new")
    Heartbeat(table)
    assert table.claim(anywhere) == "a"
    table.close()


@pytest.mark.abuse("J13")
def test_a_database_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(TrainerUnavailable, match="unable to open database file"):
        JobTable(f"sqlite:///{tmp_path}/none/jobs.sqlite")


def test_sqlite_keeps_its_rollback_journal(tmp_path: Path) -> None:
    table = JobTable(f"sqlite:///{tmp_path}/jobs.sqlite")
    with table._engine.connect() as connection:
        assert connection.execute(sa.text("PRAGMA journal_mode")).scalar() == "delete"
    table.close()


def test_two_servers_of_one_name_on_postgresql(postgres: str) -> None:
    one, same, other = (JobTable(postgres, name) for name in ("one", "one", "two"))
    held = [one.hold_name(), other.hold_name()]
    with pytest.raises(TrainerUnavailable, match="another server of this name"):
        same.hold_name()
    for connection in held:
        connection.close()
    for table in (one, same, other):
        table.close()


def test_jobs_are_counted_by_status(table: JobTable) -> None:
    for id in "abc":
        add(table, id)
    table.cancel("b")
    assert table.counts() == {"queued": 2, "cancelled": 1}


def test_the_doctor_counts_the_same(table: JobTable, tmp_path: Path) -> None:
    add(table)
    url, section = table._engine.url, doctor.Section("jobs")
    shared = url.get_backend_name() == "postgresql"
    settings = Settings(data=tmp_path, jobs_database=url.render_as_string(hide_password=False) if shared else None)
    doctor._jobs(section, settings)
    assert (section.facts["queued"], section.problems) == (1, [])
