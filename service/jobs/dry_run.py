"""Dry runs: what the trainer finds in a dataset, how it would split it, and how long it would take. Needs no database."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.errors import DatasetError
from models.files.atomic_files import replace, staging
from models.files.records import read_record, to_json
from models.training.job.job_files import DRY_RUN, JOB, RESULT, JobResult
from models.training.job.request import FinetuneRequest
from service.errors import DeadlineExceeded, Draining, TrainerUnavailable, error_of
from service.jobs.trainer import Trainers, order_of
from service.settings import Settings

DRY_RUN_S = 300.0
STAGING_LOCK = ".staging"  # of the folders of dry runs


def dry_run(
    settings: Settings, folders: Path, trainers: Trainers, request: FinetuneRequest, leaving: Callable[[], bool]
) -> dict[str, Any]:
    """Blocking. Fails as the job would; raises Draining once `leaving` says so, DatasetError, DeadlineExceeded, TrainerUnavailable."""
    with staging(folders, folders / STAGING_LOCK) as folder:
        replace(folder / JOB, to_json(order_of(settings, request)))
        _run(settings, folder, trainers, leaving)
        result = read_record(folder / RESULT, JobResult)
        if result.error is not None:
            raise error_of(result.error.code, result.error.message, result.error.param)
        found: dict[str, Any] = json.loads((folder / DRY_RUN).read_bytes())
        return found


def _run(settings: Settings, folder: Path, trainers: Trainers, leaving: Callable[[], bool]) -> None:
    ends = time.monotonic() + DRY_RUN_S
    process = trainers.take()
    try:
        process.begin(folder, dry_run=True)
        while process.returncode is None:
            process.events(0.1)
            if leaving():
                raise Draining("the server is shutting down")
            if process.memory_bytes() > settings.trainer_bytes:
                limit = f"the {settings.trainer_bytes >> 20} MB that trainer_memory_mb allows"
                raise DatasetError(f"the dry run took more than {limit}; split the dataset, or raise the limit")
            if time.monotonic() > ends:
                raise DeadlineExceeded(f"the dry run took more than {DRY_RUN_S:.0f} s; start the job instead")
    finally:
        process.end(grace_s=1.0)
        trainers.prepare()  # the job itself is likely to follow
    if not (folder / RESULT).exists():
        raise TrainerUnavailable("the trainer ended without a result; the dataset may be too large for its memory")
