"""The jobs database, SQLite or PostgreSQL: its tables, their upgrade, and transactions.

SQLite keeps its rollback journal: older versions of it can lose commits in WAL mode with more than one connection.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from service.errors import TrainerUnavailable
from service.jobs.job import ACTIVE

SCHEMA_VERSION = 2
BUSY_S = 10  # how long SQLite waits for another writer

_meta = sa.MetaData()
_schema = sa.Table("imago_schema", _meta, sa.Column("version", sa.Integer, primary_key=True))
JOBS = sa.Table(
    "imago_jobs",
    _meta,
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=True),  # the order of arrival
    sa.Column("id", sa.String(64), unique=True, nullable=False),
    sa.Column("name", sa.String(64), nullable=False),  # of the model that the job makes
    sa.Column("status", sa.String(16), nullable=False, index=True),
    sa.Column("session", sa.String(80)),  # of the server that runs the job, or ran it last; only this one may change it
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
    sa.Column("crash_point", sa.JSON(none_as_null=True)),  # the furthest point of a trainer that crashed
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
    JOBS.c.name,
    unique=True,
    sqlite_where=JOBS.c.status.in_(ACTIVE),
    postgresql_where=JOBS.c.status.in_(ACTIVE),
)
# The servers that share a PostgreSQL database. A server has a new session at each start.
SERVERS = sa.Table(
    "imago_servers",
    _meta,
    sa.Column("session", sa.String(80), primary_key=True),
    sa.Column("name", sa.String(64), nullable=False),
    sa.Column("seen_at", sa.Float, nullable=False),  # by the database's clock, never by a server's
)
DATABASE_NOW = sa.extract("epoch", sa.func.clock_timestamp())


class Database:
    """Blocking; safe from any thread. Where the database cannot be reached, every method raises TrainerUnavailable."""

    def __init__(self, url: str, server: str = "imago") -> None:
        """Opens the database for the server of this name. Makes and upgrades the tables; refuses those of a newer Imago."""
        self.server = server
        self._engine = _engine(sa.make_url(url))
        self.shared = self._engine.dialect.name == "postgresql"  # other servers may use it
        self._file, self._inode = _file_of(self._engine), None
        try:
            with self.transaction() as connection:
                self._upgrade(connection)
        except BaseException:
            self.close()
            raise
        self._inode = _inode(self._file)

    def close(self) -> None:
        self._engine.dispose()

    def hold_name(self) -> sa.Connection:
        """PostgreSQL: a connection that holds this server's name while it is open. Raises TrainerUnavailable if another one does."""
        with _reported():
            connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            lock = sa.func.pg_try_advisory_lock(sa.func.hashtext(f"imago {self.server}"))
            if connection.execute(sa.select(lock)).scalar():
                return connection
            connection.close()
        raise TrainerUnavailable(
            "another server of this name uses the jobs database; give each a `server_name` of its own"
        )

    @contextmanager
    def transaction(self) -> Iterator[sa.Connection]:
        """Commits at its end. Raises TrainerUnavailable."""
        if self._inode is not None and _inode(self._file) != self._inode:  # what is written now would be lost with it
            raise TrainerUnavailable(
                "the jobs database was deleted or replaced while the server ran; put it back, or restart the server",
                retry_after_s=10.0,
            )
        with _reported(), self._engine.begin() as connection:
            yield connection

    def _upgrade(self, connection: sa.Connection) -> None:
        _schema.create(connection, checkfirst=True)
        version = connection.execute(sa.select(sa.func.max(_schema.c.version))).scalar()
        if version is not None and version > SCHEMA_VERSION:
            raise TrainerUnavailable("the jobs database is of a newer Imago; update this one, or name another database")
        if version != SCHEMA_VERSION:  # written first: SQLite begins no transaction for the statements below alone
            connection.execute(_schema.insert().values(version=SCHEMA_VERSION))
        if version == 1:
            self._upgrade_from_dbos(connection)
        _meta.create_all(connection)

    def _upgrade_from_dbos(self, connection: sa.Connection) -> None:
        """Version 1 had its queue in DBOS, whose tables stay as they are, unread."""
        if sa.inspect(connection).has_table("imago_servers"):
            seen = sa.text("SELECT name FROM imago_servers WHERE name != :own AND seen_at > :now - 60")
            now = connection.execute(sa.select(DATABASE_NOW)).scalar()
            if other := connection.execute(seen, {"own": self.server, "now": now}).scalar():
                raise TrainerUnavailable(
                    f"the server {other!r} uses the jobs database with an older Imago; stop it, and wait a minute"
                )
            connection.execute(sa.text("DROP TABLE imago_servers"))
        connection.execute(sa.text("ALTER TABLE imago_jobs ADD COLUMN session VARCHAR(80)"))


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
        # A transaction that writes takes its lock first, and cannot lose it half way.
        connection.isolation_level = "IMMEDIATE"

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
