"""A PostgreSQL server of the tests' own: a cluster in a temporary folder, on a free port of the loopback."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

STARTS_S = 60


def _program(name: str) -> str | None:
    """PATH first, then where Debian keeps them, the newest version last in the alphabet."""
    kept = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))
    return shutil.which(name) or (str(kept[-1]) if kept else None)


def _owner() -> str | None:
    """PostgreSQL refuses to run as root: who it is to run as then."""
    if os.getuid() != 0:
        return None
    names = {entry.pw_name for entry in pwd.getpwall()}
    return next((name for name in ("postgres", "nobody") if name in names), None)


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Its URL; the test skips where PostgreSQL is not installed."""
    initdb, server = _program("initdb"), _program("postgres")
    if initdb is None or server is None:
        pytest.skip("PostgreSQL is not installed (Debian: apt install postgresql)")
    owner, folder = _owner(), tmp_path_factory.mktemp("postgres")
    if owner is not None:
        shutil.chown(folder, owner)
        for parent in folder.parents[:3]:  # pytest's own folders are for their owner alone
            parent.chmod(parent.stat().st_mode | 0o011)
    data, port = folder / "cluster", _free_port()
    options = ["--auth=trust", "--username=imago", "--no-sync", "--encoding=UTF8", "--locale=C"]
    subprocess.run([initdb, *options, "-D", str(data)], user=owner, check=True, capture_output=True, cwd="/")
    command = [server, "-D", str(data), "-h", "127.0.0.1", "-p", str(port), "-k", "", "-c", "fsync=off"]
    with (folder.parent / "postgres.log").open("wb") as log:
        process = subprocess.Popen(command, user=owner, stderr=log, cwd="/")
    try:
        _await(port, process)
        yield f"postgresql://imago@127.0.0.1:{port}/postgres"
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(STARTS_S)


@pytest.fixture
def database(postgres: str) -> str:
    """The URL of a database of the test's own."""
    import psycopg

    name = f"imago_{time.monotonic_ns()}"
    with psycopg.connect(postgres, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
    return postgres.rpartition("/")[0] + f"/{name}"


def _await(port: int, process: "subprocess.Popen[bytes]") -> None:
    import psycopg

    for _ in range(STARTS_S * 10):
        try:
            psycopg.connect(host="127.0.0.1", port=port, user="imago", dbname="postgres").close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None, "PostgreSQL did not start"
            signal.sigtimedwait([], 0.1)
    raise AssertionError("PostgreSQL did not start in time")
