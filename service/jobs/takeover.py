"""Several servers on one PostgreSQL: what one of them has left unfinished, and does not come back for, another takes up.

every BEAT_S   this server says that it is here, by the database's clock
               another's last word is LOST_S old -> its jobs are enqueued again, while its row is locked: one server does it

A server that finds its own row gone was taken for lost, because it stood still or could not reach the database: what it works on is
another's by now, and it ends its trainer.
"""

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path

import sqlalchemy as sa

from service.jobs.queue import Queue
from service.jobs.table import JobTable

log = logging.getLogger(__name__)

BEAT_S = 5.0
LOST_S = 60.0
CLOSE_S = 5.0

_servers = sa.Table(
    "imago_servers",
    sa.MetaData(),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("seen_at", sa.Float, nullable=False),  # seconds since the epoch
)
_now = sa.extract("epoch", sa.func.clock_timestamp())


class Takeover:
    """This server's word to the others, and its ear for theirs: a thread of its own, from `start` to `close`."""

    def __init__(self, table: JobTable, server: str, folders: Path, lost: Callable[[], None]) -> None:
        """Says at once that this server is here, lest others take what it is about to take up itself. `lost` is called in the thread
        when this server turns out to have been taken for lost. Raises TrainerUnavailable."""
        self._table, self._server, self._folders, self._lost = table, server, folders, lost
        self._stop = threading.Event()
        self._left = set[str]()  # jobs of others that cannot be taken, and were told
        with table.transaction() as connection:
            _servers.create(connection, checkfirst=True)
        self._beat()
        self._beaten = self._steady = time.monotonic()

    def start(self, queue: Queue) -> None:
        self._queue = queue
        self._thread = threading.Thread(target=self._run, name="takeover", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Its row stays: what this server has left is taken by another if it does not come back."""
        self._stop.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self._turn()
            except Exception as error:  # whatever the database or DBOS make of an outage
                log.warning("the servers that share the jobs cannot be asked: %s", error)

    def _turn(self) -> None:
        if not self._beat():
            log.warning("this server was taken for lost; another goes on with its job")
            self._lost()
        now = time.monotonic()
        if now - self._beaten > LOST_S / 2:  # the database may have been away, and with it every server's word
            self._steady = now
        self._beaten = now
        if now - self._steady >= LOST_S:
            self._take_over()

    def _beat(self) -> bool:
        """False where this server had no row."""
        with self._table.transaction() as connection:
            own = _servers.update().where(_servers.c.name == self._server).values(seen_at=_now)
            if connection.execute(own).rowcount:
                return True
            connection.execute(_servers.insert().values(name=self._server, seen_at=_now))
            return False

    def _take_over(self) -> None:
        lost = sa.select(_servers.c.name).where(_servers.c.seen_at < _now - LOST_S).with_for_update(skip_locked=True)
        with self._table.transaction() as connection:
            for server in connection.execute(lost).scalars().all():
                if self._take_from(server):
                    connection.execute(_servers.delete().where(_servers.c.name == server))

    def _take_from(self, server: str) -> bool:
        """False where something had to be left to it, or to a server that reaches more."""
        jobs = self._queue.held_by(server)
        reached = [job for job in jobs if (self._folders / job).is_dir()]
        for job in reached:
            log.warning("server %s was last heard of %.0f s ago or more; its job %s is taken over", server, LOST_S, job)
            self._queue.put_back(job)
        for job in {*jobs} - {*reached} - self._left:
            log.error(
                "server %s is lost, but its job %s is not in %s: share its data folder", server, job, self._folders
            )
            self._left.add(job)
        return len(reached) == len(jobs)
