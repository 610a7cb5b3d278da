"""The table of jobs, one row each: the only record of a job's state, and of the server that runs it.

A status changes by `UPDATE ... WHERE id = ? AND status IN (...)`, and the row count says who won:

    queued -> running -> succeeded | failed          queued -> cancelled
              running -> cancelling -> cancelled     (not in the phase `deploy`: then it is too late)

A server runs the jobs whose row has its session. It claims a job by a conditional UPDATE of this column, and each change that it makes
later has its session as a condition: a server that stood still, and whose job another has claimed meanwhile, changes nothing.
"""

import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from models.errors import NameConflict
from service.errors import (
    BadRequest,
    IdempotencyMismatch,
    JobActive,
    JobFinished,
    JobNotFound,
    JobNotStarted,
    QueueFull,
)
from service.jobs.database import JOBS, SERVERS, Database
from service.jobs.eta import Reached
from service.jobs.job import ACTIVE, TERMINAL, Job, JobError, Status

KEY_TTL_S = 24 * 3600  # an Idempotency-Key is forgotten after so long
_NO_JOB = "no job has this id; GET /finetune lists those there are"

_ahead = JOBS.alias()
_position = (
    sa.select(sa.func.count())
    .where(_ahead.c.status == "queued", _ahead.c.number <= JOBS.c.number)
    .correlate(JOBS)
    .scalar_subquery()
)
_shown = sa.select(JOBS, _position.label("position"))


@dataclass(frozen=True)
class Submission:
    """A job to add: `key` is the caller's Idempotency-Key, `body_sha256` the hash of the request."""

    id: str
    request: dict[str, Any]
    key: str | None
    body_sha256: str


@dataclass(frozen=True)
class JobControl:
    """The state of a running job, with the callers' requests to cancel or stop it."""

    status: Status
    phase: str | None
    stop: bool


class Interrupted(BaseException):
    """The job is not for this server to go on with: it leaves, or another one has claimed the job.

    No Exception, so that no handler of errors takes it for a failure of the job.
    """


class JobTable(Database):
    def __init__(self, url: str, server: str = "imago") -> None:
        super().__init__(url, server)
        self.session = f"{server}-{secrets.token_hex(4)}"
        self._mine = JOBS.c.session == self.session
        abandoned = JOBS.c.session.not_in(sa.select(SERVERS.c.session))
        free = JOBS.c.status.in_(ACTIVE) & (JOBS.c.session.is_(None) | self._mine | abandoned)
        self._claimable = sa.select(JOBS.c.id, JOBS.c.status, JOBS.c.session).where(free).order_by(JOBS.c.number)

    # Jobs arrive

    def add(self, new: Submission, max_queued: int) -> tuple[Job, bool]:
        """Stores a queued job; or returns the job of a known Idempotency-Key, and True.

        Raises IdempotencyMismatch, NameConflict, QueueFull.
        """
        try:
            with self.transaction() as connection:
                if new.key and (known := self._replayed(connection, new)):
                    return known, True
                self._check_room(connection, max_queued)
                connection.execute(JOBS.insert().values(_row_of(new)))
                return self._get(connection, new.id), False
        except IntegrityError:  # in the same moment: another request with this key, or for this name
            if known := self.replayed(new):
                return known, True
            name = new.request["name"]
            raise NameConflict(
                f"another job is making {name!r}; wait for it, cancel it, or take another name"
            ) from None

    def replayed(self, new: Submission) -> Job | None:
        """The job of this Idempotency-Key, if there is one. Raises IdempotencyMismatch if its request was another."""
        if new.key is None:
            return None
        with self.transaction() as connection:
            return self._replayed(connection, new)

    def _replayed(self, connection: sa.Connection, new: Submission) -> Job | None:
        expired = (JOBS.c.idempotency_key == new.key) & (JOBS.c.created_at < time.time() - KEY_TTL_S)
        connection.execute(JOBS.update().where(expired).values(idempotency_key=None))
        row = connection.execute(_shown.where(JOBS.c.idempotency_key == new.key)).mappings().first()
        if row is not None and row["body_sha256"] != new.body_sha256:
            raise IdempotencyMismatch("this Idempotency-Key came with another request before; take a new key")
        return None if row is None else _job_of(row)

    def _check_room(self, connection: sa.Connection, max_queued: int) -> None:
        queued = connection.execute(sa.select(sa.func.count()).where(JOBS.c.status == "queued")).scalar() or 0
        if queued >= max_queued:
            raise QueueFull(f"{queued} jobs are waiting already; try again when some are done", retry_after_s=60.0)

    # Reads

    def get(self, id: str) -> Job:
        """Raises JobNotFound."""
        with self.transaction() as connection:
            return self._get(connection, id)

    def _get(self, connection: sa.Connection, id: str) -> Job:
        row = connection.execute(_shown.where(JOBS.c.id == id)).mappings().first()
        if row is None:
            raise JobNotFound(_NO_JOB)
        return _job_of(row)

    def page(self, after: str | None, limit: int) -> tuple[list[Job], bool]:
        """Returns at most `limit` jobs from the latest on, older than the job `after`; and True if there are more."""
        query = _shown.order_by(JOBS.c.number.desc()).limit(limit + 1)
        with self.transaction() as connection:
            if after is not None:
                number = connection.execute(sa.select(JOBS.c.number).where(JOBS.c.id == after)).scalar()
                if number is None:
                    raise BadRequest("`after` is the id of a job of the page before", param="after")
                query = query.where(JOBS.c.number < number)
            jobs = [_job_of(row) for row in connection.execute(query).mappings()]
        return jobs[:limit], len(jobs) > limit

    def using(self, dataset: Path) -> str | None:
        """The id of an unfinished job on this dataset, if there is one."""
        with self.transaction() as connection:
            jobs = connection.execute(sa.select(JOBS.c.id, JOBS.c.request).where(JOBS.c.status.in_(ACTIVE)))
            return next((job.id for job in jobs if Path(job.request["dataset"]) == dataset), None)

    def ids(self) -> set[str]:
        """The ids of all jobs."""
        with self.transaction() as connection:
            return set(connection.execute(sa.select(JOBS.c.id)).scalars())

    def counts(self) -> dict[str, int]:
        """Number of jobs by status, without statuses that no job has."""
        by_status = sa.select(JOBS.c.status, sa.func.count()).group_by(JOBS.c.status)
        with self.transaction() as connection:
            return {row[0]: row[1] for row in connection.execute(by_status)}

    # Callers change jobs

    def cancel(self, id: str) -> Job:
        """Queued becomes cancelled, running becomes cancelling; both stay as they are. Raises JobFinished."""
        if not self._change(id, ("queued",), status="cancelled", finished_at=_now_or(JOBS.c.created_at)):
            not_deploying = sa.func.coalesce(JOBS.c.phase, "") != "deploy"
            self._change(id, ("running",), not_deploying, status="cancelling")
        job = self.get(id)
        if job.status == "running":
            raise JobFinished("the job is done and its model is being deployed: it is too late to cancel it")
        if job.status in ("succeeded", "failed"):
            raise JobFinished(f"the job has {job.status}: there is nothing to cancel")
        return job

    def stop(self, id: str) -> Job:
        """Asks a running job to end early and keep the best. Raises JobNotStarted, JobFinished."""
        if self._change(id, ("running",), stop_requested=True):
            return self.get(id)
        job = self.get(id)
        if job.status == "queued":
            raise JobNotStarted("the job has not begun, so it has nothing to keep; cancel it instead")
        raise JobFinished(f"the job is {job.status}: there is nothing to stop")

    def delete(self, id: str) -> None:
        """Raises JobNotFound, and JobActive for an unfinished job."""
        with self.transaction() as connection:
            done = connection.execute(JOBS.delete().where(JOBS.c.id == id, JOBS.c.status.in_(TERMINAL)))
            if done.rowcount == 0:
                job = self._get(connection, id)
                raise JobActive(f"the job is {job.status}; cancel it and delete it then")

    # The worker changes jobs

    def claim(self, reaches: Callable[[str], bool]) -> str | None:
        """Claims the oldest job that no living server runs. Returns its id, or None if there is none.

        `reaches`: True if this server has the folder of a job that another one has begun.
        """
        with self.transaction() as connection:
            for id, status, session in connection.execute(self._claimable).all():
                if status == "queued" or session == self.session or reaches(id):
                    as_read = (JOBS.c.status == status) & JOBS.c.session.is_not_distinct_from(session)
                    claim = JOBS.update().where(JOBS.c.id == id, as_read).values(session=self.session)
                    if connection.execute(claim).rowcount == 1:
                        return str(id)
        return None

    def control(self, id: str) -> JobControl:
        """Raises JobNotFound, and Interrupted where another server has claimed the job."""
        job = sa.select(JOBS.c.status, JOBS.c.phase, JOBS.c.stop_requested, self._mine).where(JOBS.c.id == id)
        with self.transaction() as connection:
            row = connection.execute(job).first()
        if row is None:
            raise JobNotFound(_NO_JOB)
        status, phase, stop, mine = row
        if not mine:
            raise Interrupted(f"another server has claimed job {id}")
        return JobControl(status, phase, stop)

    def begin(self, id: str) -> bool:
        """Counts an attempt, before a trainer starts. Returns False if the job has ended or is being cancelled."""
        started = sa.func.coalesce(JOBS.c.started_at, _now_or(JOBS.c.created_at))
        values = {"status": "running", "started_at": started, "attempt": JOBS.c.attempt + 1, "eta_seconds": None}
        return self._change(id, ("queued", "running"), self._mine, **values)

    def progress(self, id: str, phase: str, progress: float, eta_seconds: float | None) -> None:
        self._change(id, ("running",), self._mine, phase=phase, progress=progress, eta_seconds=eta_seconds)

    def crashed(self, id: str, reached: Reached) -> int:
        """Counts a crash. Returns the number of crashes since a trainer last got further. Raises JobNotFound."""
        with self.transaction() as connection:
            row = connection.execute(sa.select(JOBS.c.crashes, JOBS.c.crash_point).where(JOBS.c.id == id)).first()
            if row is None:
                raise JobNotFound(_NO_JOB)
            further = row.crash_point is not None and reached > tuple(row.crash_point)
            crashes = 1 if further else row.crashes + 1
            point = max(reached, tuple(row.crash_point or reached))
            running = (JOBS.c.id == id) & self._mine & (JOBS.c.status == "running")
            connection.execute(JOBS.update().where(running).values(crashes=crashes, crash_point=list(point)))
        return crashes

    def uncount(self, id: str) -> None:
        """Takes back an attempt that ended through no fault of the job."""
        self._change(id, ACTIVE, self._mine, attempt=sa.case((JOBS.c.attempt > 0, JOBS.c.attempt - 1), else_=0))

    def deploying(self, id: str, values: Mapping[str, Any]) -> bool:
        """Begins the phase `deploy`, in which nobody can cancel. Returns False if somebody has."""
        return self._change(id, ("running",), self._mine, phase="deploy", eta_seconds=None, **values)

    def finish(self, id: str, status: Status, **values: Any) -> bool:
        """Ends a job. A job that is being cancelled can only become cancelled, and no other can."""
        before: tuple[Status, ...] = ("cancelling",) if status == "cancelled" else ("running",)
        finished = _now_or(sa.func.coalesce(JOBS.c.started_at, JOBS.c.created_at))
        return self._change(id, before, self._mine, status=status, finished_at=finished, eta_seconds=None, **values)

    def _change(self, id: str, before: tuple[Status, ...], *conditions: sa.ColumnElement[bool], **values: Any) -> bool:
        where = (JOBS.c.id == id, JOBS.c.status.in_(before), *conditions)
        with self.transaction() as connection:
            return connection.execute(JOBS.update().where(*where).values(values)).rowcount == 1


def _now_or(earlier: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """The time, or the earlier event's time if the clock was set back since."""
    now = time.time()
    return sa.case((earlier > now, earlier), else_=now)


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
