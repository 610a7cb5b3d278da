"""All that it takes to make a version again: what it was made of, by which command, and with which code."""

import importlib.metadata
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from models.training.bases import Base
from models.training.job import Job
from models.training.request import command

MAX_NAMED_BAD_FILES = 100


def lineage_of(job: Job) -> dict[str, Any]:
    """`seconds` are of this process alone, when it resumed another's work."""
    data, audit = job.data, job.data.audit
    names = [base.name for base in job.bases]
    return {
        "run": job.run.run,
        "command": command(job.request),
        "dataset": {
            "name": data.name,
            "sha256": data.sha256,
            "split": data.split,
            "images": {part: len(rows) for part, rows in data.rows.items()},
            "skipped": audit.totals["bad"],
            "skipped_files": [file.model_dump() for file in audit.bad[:MAX_NAMED_BAD_FILES]],
        },
        "base": names[0] if len(names) == 1 else names,
        "base_model": [_ancestry(job, base) for base in job.bases] if job.mode != "scratch" else None,
        "mode": job.mode,
        "hyperparameters": asdict(job.settings),
        "metadata": job.request.metadata,
        "code": {"version": _package_version(), "commit": _commit(), "torch": torch.__version__},
        "seconds": round(sum(job.clock.seconds.values()), 1),
    }


def _ancestry(job: Job, base: Base) -> dict[str, Any]:
    """Which model a run started from, and how that one was made, down to the first of the line."""
    lineage = job.store.config(base.name, base.version).lineage
    return {"model": base.name, "version": base.version, "backbone_sha256": base.stored.sha256, "lineage": lineage}


def _package_version() -> str | None:
    try:
        return importlib.metadata.version("imago")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file lies in; None where it is installed without one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
