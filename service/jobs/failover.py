"""Several servers on one PostgreSQL: the jobs of a server that is lost go on at another.

every BEAT_S   this server writes the database's time into its row
               rows that are LOST_S old are deleted, and with them goes the claim to their jobs: `JobTable.claim`

A server that was only away writes its row anew. It keeps the jobs that nobody has claimed meanwhile, and ends the trainer of one that
somebody has: the row of the job has another session then.
"""

import logging
import threading
import time

import sqlalchemy as sa

from service.jobs.database import DATABASE_NOW, JOBS, SERVERS
from service.jobs.table import JobTable

log = logging.getLogger(__name__)

BEAT_S = 5.0
LOST_S = 60.0
CLOSE_S = 5.0


class Heartbeat:
    """Sends this server's heartbeat and watches the others', in a thread from `start` to `close`."""

    def __init__(self, table: JobTable) -> None:
        """Registers this server, with the jobs of its last session. Raises TrainerUnavailable."""
        self._table = table
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        before = SERVERS.c.name == table.server
        theirs = JOBS.c.session.in_(sa.select(SERVERS.c.session).where(before))
        with table.transaction() as connection:  # one, or another server could claim the jobs in between
            connection.execute(JOBS.update().where(theirs).values(session=table.session))
            connection.execute(SERVERS.delete().where(before))
            self._write(connection)
        self._beaten = self._steady = time.monotonic()

    def start(self) -> "Heartbeat":
        self._thread.start()
        return self

    def close(self) -> None:
        """Its row stays: another server takes its job if it does not come back."""
        self._stop.set()
        self._thread.join(CLOSE_S)

    def _run(self) -> None:
        while not self._stop.wait(BEAT_S):
            try:
                self._turn()
            except Exception as error:  # a thread that ended would make this server look lost
                log.warning("no heartbeat: %s", error)

    def _turn(self) -> None:
        self._beat()
        now = time.monotonic()
        if now - self._beaten > LOST_S / 2:  # the database may have been away, and all heartbeats with it
            self._steady = now
        self._beaten = now
        if now - self._steady >= LOST_S:
            self._forget_lost()

    def _beat(self) -> None:
        with self._table.transaction() as connection:
            own = SERVERS.update().where(SERVERS.c.session == self._table.session).values(seen_at=DATABASE_NOW)
            if connection.execute(own).rowcount == 0:
                self._write(connection)

    def _write(self, connection: sa.Connection) -> None:
        row = {"session": self._table.session, "name": self._table.server, "seen_at": DATABASE_NOW}
        connection.execute(SERVERS.insert().values(row))

    def _forget_lost(self) -> None:
        lost = SERVERS.delete().where(SERVERS.c.seen_at < DATABASE_NOW - LOST_S).returning(SERVERS.c.name)
        with self._table.transaction() as connection:
            for name in connection.execute(lost).scalars():
                log.warning("the server %s sent no heartbeat for %.0f s: its jobs go on at others", name, LOST_S)
