"""What servers that were killed and jobs that were deleted leave behind."""

from pathlib import Path

import pytest
from support.service_fakes import FakeEngine, FakeStore

from models.files.atomic_files import staging
from service.jobs import Jobs
from service.jobs.dry_run import STAGING_LOCK
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
