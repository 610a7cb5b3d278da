"""What servers that were killed and jobs that were deleted leave behind."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from support.service_fakes import FakeEngine, FakeStore

from models.files.atomic_files import staging
from service.jobs import Jobs
from service.jobs import queue as module
from service.jobs.jobs import STAGING_LOCK
from service.jobs.queue import Queue
from service.settings import Settings

pytestmark = pytest.mark.system

KNOWN, LOST = "ftjob-" + "0" * 32, "ftjob-" + "1" * 32


def test_folders_that_are_left_over_are_swept(tmp_path: Path) -> None:
    store = FakeStore()
    jobs = Jobs(Settings(data=tmp_path), FakeEngine(store), store)
    for name in (".tmp-old", KNOWN, LOST, "notes"):
        (jobs.folders / name).mkdir(parents=True)
    with staging(jobs.folders, jobs.folders / STAGING_LOCK) as under_way:  # a dry run
        (jobs.folders / ".tmp-old").mkdir(exist_ok=True)
        jobs._sweep(lambda: {KNOWN})
        assert {folder.name for folder in jobs.folders.iterdir()} == {under_way.name, KNOWN, "notes", STAGING_LOCK}


@pytest.mark.parametrize(
    ("status", "deleted"),
    [
        pytest.param("PENDING", [], id="at work"),
        pytest.param("ENQUEUED", [], id="waiting"),
        pytest.param("SUCCESS", ["a"], id="done"),
        pytest.param(None, [], id="unknown"),
    ],
)
def test_a_workflow_is_not_deleted_under_its_feet(
    monkeypatch: pytest.MonkeyPatch, status: str | None, deleted: list[str]
) -> None:
    gone: list[str] = []
    known = None if status is None else SimpleNamespace(status=status)
    fake = SimpleNamespace(get_workflow_status=lambda id: known, delete_workflow=gone.append)
    monkeypatch.setattr(module, "DBOS", fake)
    Queue.forget(cast(Any, None), "a")
    assert gone == deleted
