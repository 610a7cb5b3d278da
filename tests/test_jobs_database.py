"""The jobs database is taken away while the server runs: the admin routes say so, images are classified all the same."""

import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import pytest
from support.service_fakes import ADMIN, GOOD, Service, client_of
from support.small_disk import disk as disk

from service.jobs import database as module


@contextmanager
def locked(database: Path) -> Iterator[None]:
    other = sqlite3.connect(database, isolation_level=None, timeout=30)
    other.execute("BEGIN EXCLUSIVE")
    yield
    other.close()


@contextmanager
def deleted(database: Path) -> Iterator[None]:
    database.rename(database.with_suffix(".gone"))
    yield
    database.with_suffix(".gone").rename(database)


@contextmanager
def replaced(database: Path) -> Iterator[None]:
    with deleted(database):
        database.write_bytes(b"something else")
        yield


@pytest.mark.abuse("J13")
@pytest.mark.parametrize(
    ("taken", "reason"),
    [
        pytest.param(locked, "locked", id="locked"),
        pytest.param(deleted, "deleted or replaced", id="deleted"),
        pytest.param(replaced, "deleted or replaced", id="replaced"),
    ],
)
async def test_a_database_that_is_taken_away_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: Callable[[Path], AbstractContextManager[None]], reason: str
) -> None:
    monkeypatch.setattr(module, "BUSY_S", 0.1)
    async with client_of(Service(tmp_path / "data")) as http:
        assert (await http.get("/finetune", headers=ADMIN)).status_code == 200
        with taken(tmp_path / "data" / "jobs.sqlite"):
            refused, predicted = await both(http)
        again, _ = await both(http)
    error = refused.json()["error"]
    assert (refused.status_code, error["code"], predicted.status_code) == (503, "trainer_unavailable", 200)
    assert reason in error["message"]
    assert refused.headers["retry-after"] == "10"
    assert again.status_code == 200


async def both(http: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
    return await http.get("/finetune", headers=ADMIN), await http.post("/predict", content=GOOD)


@pytest.mark.abuse("J13")
async def test_a_database_on_a_disk_that_is_read_only(disk: Path) -> None:
    async with client_of(Service(disk / "data")) as http:
        assert (await http.get("/finetune", headers=ADMIN)).status_code == 200
    remount(disk, "ro")
    async with client_of(Service(disk / "data")) as http:
        refused, predicted = await both(http)
        remount(disk, "rw")
        again, _ = await both(http)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "trainer_unavailable")
    assert (predicted.status_code, again.status_code) == (200, 200)


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", disk], check=True)
