"""What the API says of jobs: one row each, in SQLite or PostgreSQL.

A status changes by `UPDATE ... WHERE id = ? AND status IN (...)`, and the row count says who won:

    queued -> running -> succeeded | failed          queued -> cancelled
              running -> cancelling -> cancelled     (not in the phase `deploy`: then it is too late)

SQLite keeps its rollback journal: older versions of it can lose commits in WAL mode with more than one connection.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from models.errors import NameConflict
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
from service.jobs.job import ACTIVE, TERMINAL, Job, JobError, Status
from service.jobs.pace import Reached

SCHEMA_VERSION = 1
KEY_TTL_S = 24 * 3600  # an Idempotency-Key is forgotten after so long
BUSY_S = 10  # how long SQLite waits for another writer
_NO_JOB = "no job has this id; GET /finetune lists those there are"

_meta = sa.MetaData()
_schema = sa.Table("imago_schema", _meta, sa.Column("version", sa.Integer, primary_key=True))
_jobs = sa.Table(
    "imago_jobs",
    _meta,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),  # the order of arrival
    sa.Column("id", sa.String(64), unique=True, nullable=False),
    sa.Column("name", sa.String(64), nullable=False),  # of the model that comes of it
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("phase", sa.String(16)),
    sa.Column("progress", sa.Float, nullable=False, default=0.0),
    sa.Column("eta_seconds", sa.Float),
    sa.Column("created_at", sa.Float, nullable=False),  # seconds since the epoch, as are all times here
    sa.Column("started_at", sa.Float),
    sa.Column("finished_at", sa.Float),
    sa.Column("stop_requested", sa.Boolean, nullable=False, default=False),
    sa.Column("stop_reason", sa.String(32)),
    sa.Column("attempt", sa.Integer, nullable=False, default=0),
    sa.Column("crashes", sa.Integer, nullable=False, default=0),  # since the trainer last got further
    sa.Column("crash_point", sa.JSON(none_as_null=True)),  # how far it had come at most when it crashed
    sa.Column("request", sa.JSON, nullable=False),
    sa.Column("effective", sa.JSON(none_as_null=True)),
    sa.Column("error", sa.JSON(none_as_null=True)),
    sa.Column("model", sa.String(64)),
    sa.Column("version", sa.Integer),
    sa.Column("deployment", sa.Text),
    sa.Column("idempotency_key", sa.String(255), unique=True),
    sa.Column("body_sha256", sa.String(64), nullable=False),
)
sa.Index(
    "imago_jobs_one_per_name",
    _jobs.c.name,
    unique=True,
    sqlite_where=_jobs.c.status.in_(ACTIVE),
    postgresql_where=_jobs.c.status.in_(ACTIVE),
)
_ahead = _jobs.alias()
_position = (
    sa.select(sa.func.count())
    .where(_ahead.c.status == "queued", _ahead.c.number <= _jobs.c.number)
    .correlate(_jobs)
    .scalar_subquery()
)
_shown = sa.select(_jobs, _position.label("position"))


@dataclass(frozen=True)
class Submission:
    """A job to be: `key` is the caller's Idempotency-Key, `body_sha256` the hash of the request."""

    id: str
    request: dict[str, Any]
    key: str | None
    body_sha256: str


@dataclass(frozen=True)
class Wish:
    """What is wanted of a running job by now."""

    status: Status
    stop: bool


class JobTable:
    """Blocking; safe from any thread. Where the database cannot be reached, every method raises TrainerUnavailable."""

    def __init__(self, url: str) -> None:
        """Opens the database and makes the tables where they are missing; refuses those of a newer Imago."""
        self._engine = _engine(sa.make_url(url))
        self._file, self._inode = _file_of(self._engine), None
        with self.transaction() as connection:
            _meta.create_all(connection)
            version = connection.execute(sa.select(sa.func.max(_schema.c.version))).scalar()
            if version is None:
                connection.execute(_schema.insert().values(version=SCHEMA_VERSION))
            elif version > SCHEMA_VERSION:
                raise TrainerUnavailable(
                    "the jobs database is of a newer Imago; update this one, or name another database"
                )
        self._inode = _inode(self._file)

    def close(self) -> None:
        self._engine.dispose()

    def hold(self, server: str) -> "sa.Connection | None":
        """PostgreSQL: a connection that is this server's alone as long as it lives; None where another one holds that name."""
        with _reported():
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            if connection.execute(
                sa.select(sa.func.pg_try_advisory_lock(sa.func.hashtext(f"imago {server}")))
            ).scalar():
                return connection
            connection.close()
            return None

    # Jobs come

    def add(self, new: Submission, max_queued: int) -> tuple[Job, bool]:
        """Stores a queued job; or, for a known Idempotency-Key, gives the job that has it, and True.

        Raises IdempotencyMismatch, NameConflict, QueueFull.
        """
        try:
            with self.transaction() as connection:
                if new.key and (known := self._replayed(connection, new)):
                    return known, True
                self._check_room(connection, max_queued)
                connection.execute(_jobs.insert().values(_row_of(new)))
                return self._get(connection, new.id), False
        except IntegrityError:  # in the same moment: another request with this key, or for this name
            if known := self.replayed(new):
                return known, True
            name = new.request["name"]
            raise NameConflict(
                f"another job is making {name!r}; wait for it, cancel it, or take another name"
            ) from None

    def replayed(self, new: Submission) -> Job | None:
        """The job that came with this Idempotency-Key before. Raises IdempotencyMismatch where it came with another request."""
        if new.key is None:
            return None
        with self.transaction() as connection:
            return self._replayed(connection, new)

    def _replayed(self, connection: sa.Connection, new: Submission) -> Job | None:
        expired = (_jobs.c.idempotency_key == new.key) & (_jobs.c.created_at < time.time() - KEY_TTL_S)
        connection.execute(_jobs.update().where(expired).values(idempotency_key=None))
        row = connection.execute(_shown.where(_jobs.c.idempotency_key == new.key)).mappings().first()
        if row is not None and row["body_sha256"] != new.body_sha256:
            raise IdempotencyMismatch("this Idempotency-Key came with another request before; take a new key")
        return None if row is None else _job_of(row)

    def _check_room(self, connection: sa.Connection, max_queued: int) -> None:
        queued = connection.execute(sa.select(sa.func.count()).where(_jobs.c.status == "queued")).scalar() or 0
        if queued >= max_queued:
            raise QueueFull(f"{queued} jobs are waiting already; try again when some are done", retry_after_s=60.0)

    # Jobs are looked at

    def get(self, id: str) -> Job:
        """Raises JobNotFound."""
        with self.transaction() as connection:
            return self._get(connection, id)

    def _get(self, connection: sa.Connection, id: str) -> Job:
        row = connection.execute(_shown.where(_jobs.c.id == id)).mappings().first()
        if row is None:
            raise JobNotFound(_NO_JOB)
        return _job_of(row)

    def page(self, after: str | None, limit: int) -> tuple[list[Job], bool]:
        """Jobs from the latest to the first, at most `limit`, older than the job `after`; and whether there are more."""
        query = _shown.order_by(_jobs.c.number.desc()).limit(limit + 1)
        with self.transaction() as connection:
            if after is not None:
                number = connection.execute(sa.select(_jobs.c.number).where(_jobs.c.id == after)).scalar()
                if number is None:
                    raise BadRequest("`after` is the id of a job of the page before", param="after")
                query = query.where(_jobs.c.number < number)
            jobs = [_job_of(row) for row in connection.execute(query).mappings()]
        return jobs[:limit], len(jobs) > limit

    def unfinished(self) -> list[str]:
        """The ids of all jobs that are to be worked on, the oldest first."""
        with self.transaction() as connection:
            query = sa.select(_jobs.c.id).where(_jobs.c.status.in_(ACTIVE)).order_by(_jobs.c.number)
            return list(connection.execute(query).scalars())

    def using(self, dataset: Path) -> str | None:
        """The id of a job that is not at its end and has this dataset, if there is one."""
        with self.transaction() as connection:
            jobs = connection.execute(sa.select(_jobs.c.id, _jobs.c.request).where(_jobs.c.status.in_(ACTIVE)))
            return next((job.id for job in jobs if Path(job.request["dataset"]) == dataset), None)

    def ids(self) -> set[str]:
        """Of all jobs there are."""
        with self.transaction() as connection:
            return set(connection.execute(sa.select(_jobs.c.id)).scalars())

    def counts(self) -> dict[str, int]:
        """How many jobs there are, by status; one that no job has is left out."""
        by_status = sa.select(_jobs.c.status, sa.func.count()).group_by(_jobs.c.status)
        with self.transaction() as connection:
            return {row[0]: row[1] for row in connection.execute(by_status)}

    def wish(self, id: str) -> Wish:
        """Raises JobNotFound."""
        job = sa.select(_jobs.c.status, _jobs.c.stop_requested).where(_jobs.c.id == id)
        with self.transaction() as connection:
            row = connection.execute(job).first()
        if row is None:
            raise JobNotFound(_NO_JOB)
        return Wish(row.status, row.stop_requested)

    # Callers change them

    def cancel(self, id: str) -> Job:
        """Queued: cancelled. Running: cancelling. Cancelled or about to be: as it is. Raises JobFinished."""
        if not self._move(id, ("queued",), status="cancelled", finished_at=_now_or(_jobs.c.created_at)):
            self._change((_jobs.c.id == id) & (_jobs.c.status == "running") & _not_deploying(), status="cancelling")
        job = self.get(id)
        if job.status == "running":
            raise JobFinished("the job is done and its model is being put to service: it is too late to cancel it")
        if job.status in ("succeeded", "failed"):
            raise JobFinished(f"the job has {job.status}: there is nothing to cancel")
        return job

    def stop(self, id: str) -> Job:
        """Asks a running job to end early and keep the best. Raises JobNotStarted, JobFinished."""
        if self._move(id, ("running",), stop_requested=True):
            return self.get(id)
        job = self.get(id)
        if job.status == "queued":
            raise JobNotStarted("the job has not begun, so it has nothing to keep; cancel it instead")
        raise JobFinished(f"the job is {job.status}: there is nothing to stop")

    def delete(self, id: str) -> None:
        """Raises JobNotFound, and JobActive for a job that is not at its end."""
        with self.transaction() as connection:
            done = connection.execute(_jobs.delete().where(_jobs.c.id == id, _jobs.c.status.in_(TERMINAL)))
            if done.rowcount == 0:
                job = self._get(connection, id)
                raise JobActive(f"the job is {job.status}; cancel it and delete it then")

    # The worker changes them

    def begin(self, id: str) -> bool:
        """A trainer is about to start for this job: False if it is not to be worked on any more."""
        started = sa.func.coalesce(_jobs.c.started_at, _now_or(_jobs.c.created_at))
        return self._move(
            id,
            ("queued", "running"),
            status="running",
            started_at=started,
            attempt=_jobs.c.attempt + 1,
            eta_seconds=None,
        )

    def progress(self, id: str, phase: str, progress: float, eta_seconds: float | None) -> None:
        self._move(id, ("running",), phase=phase, progress=progress, eta_seconds=eta_seconds)

    def crashed(self, id: str, reached: Reached) -> int:
        """Notes that a trainer ended without a result, and gives how many have since one last got further. Raises JobNotFound."""
        with self.transaction() as connection:
            row = connection.execute(sa.select(_jobs.c.crashes, _jobs.c.crash_point).where(_jobs.c.id == id)).first()
            if row is None:
                raise JobNotFound(_NO_JOB)
            further = row.crash_point is not None and reached > tuple(row.crash_point)
            crashes = 1 if further else row.crashes + 1
            point = max(reached, tuple(row.crash_point or reached))
            running = (_jobs.c.id == id) & (_jobs.c.status == "running")
            connection.execute(_jobs.update().where(running).values(crashes=crashes, crash_point=list(point)))
        return crashes

    def uncount(self, id: str) -> None:
        """Takes back an attempt that the job is not to blame for."""
        self._change((_jobs.c.id == id) & (_jobs.c.attempt > 0), attempt=_jobs.c.attempt - 1)

    def deploying(self, id: str, values: Mapping[str, Any]) -> bool:
        """The trainer has succeeded; from here on nobody can cancel. False if somebody has."""
        return self._move(id, ("running",), phase="deploy", eta_seconds=None, **values)

    def finish(self, id: str, status: Status, **values: Any) -> bool:
        """The last change. A job that is being cancelled can only become cancelled, and no other can."""
        before: tuple[Status, ...] = ("cancelling",) if status == "cancelled" else ("running",)
        finished = _now_or(sa.func.coalesce(_jobs.c.started_at, _jobs.c.created_at))
        return self._move(id, before, status=status, finished_at=finished, eta_seconds=None, **values)

    def _move(self, id: str, before: tuple[Status, ...], **values: Any) -> bool:
        return self._change((_jobs.c.id == id) & _jobs.c.status.in_(before), **values)

    def _change(self, where: sa.ColumnElement[bool], **values: Any) -> bool:
        with self.transaction() as connection:
            return connection.execute(_jobs.update().where(where).values(values)).rowcount == 1

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Committed at its end. Raises TrainerUnavailable."""
        if self._inode is not None and _inode(self._file) != self._inode:  # what went into it now would be lost with it
            raise TrainerUnavailable(
                "the jobs database was deleted or replaced while the server ran; put it back, or restart the server",
                retry_after_s=10.0,
            )
        with _reported(), self._engine.begin() as connection:
            yield connection


@contextmanager
def _reported() -> Iterator[None]:
    try:
        yield
    except IntegrityError:
        raise
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).strip().splitlines()[0]
        raise TrainerUnavailable(f"the jobs database cannot be used: {reason}", retry_after_s=10.0) from error


def _engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() == "postgresql":
        return sa.create_engine(
            url.set(drivername="postgresql+psycopg"), pool_pre_ping=True, connect_args={"connect_timeout": BUSY_S}
        )
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_S})

    @sa.event.listens_for(engine, "connect")
    def _immediate(connection: Any, _: Any) -> None:
        connection.isolation_level = (
            "IMMEDIATE"  # a transaction that writes takes its lock first, and cannot lose it half way
        )

    return engine


def _file_of(engine: sa.Engine) -> Path | None:
    """SQLite's file; None for PostgreSQL, and for a database in memory."""
    name = engine.url.database if engine.url.get_backend_name() == "sqlite" else None
    return Path(name) if name else None


def _inode(file: Path | None) -> int | None:
    try:
        return None if file is None else file.stat().st_ino
    except OSError:
        return None


def _now_or(earlier: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """The time, or that of what came before, where the clock was set back meanwhile."""
    now = time.time()
    return sa.case((earlier > now, earlier), else_=now)


def _not_deploying() -> sa.ColumnElement[bool]:
    return sa.func.coalesce(_jobs.c.phase, "") != "deploy"


def _row_of(new: Submission) -> dict[str, Any]:
    return {
        "id": new.id,
        "name": new.request["name"],
        "status": "queued",
        "created_at": time.time(),
        "request": new.request,
        "idempotency_key": new.key,
        "body_sha256": new.body_sha256,
    }


def _job_of(row: sa.RowMapping) -> Job:
    plain = ("id", "status", "phase", "progress", "stop_reason", "attempt", "request", "effective", "model", "version")
    fields = {name: row[name] for name in plain} | {name: _time(row[name]) for name in row if name.endswith("_at")}
    return Job(
        **fields,
        terminal=row["status"] in TERMINAL,
        eta_seconds=None if row["eta_seconds"] is None else round(row["eta_seconds"], 1),
        queue_position=row["position"] if row["status"] == "queued" else None,
        error=JobError(**row["error"]) if row["error"] else None,
        deployment=row["deployment"],
    )


def _time(seconds: float | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)
