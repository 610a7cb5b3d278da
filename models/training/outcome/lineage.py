"""All that it takes to make a version again: what it was made of, by which command, and with which code."""

import importlib.metadata
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from models.data.dataset import LoadedDataset
from models.store.store import ModelStore
from models.training.bases import Base
from models.training.context import TrainingContext
from models.training.job.command import command

MAX_NAMED_BAD_FILES = 100


def lineage_of(job: TrainingContext, fresh: Sequence[str]) -> dict[str, Any]:
    """`fresh`: the stages that were initialised anew. `seconds` are of this process alone, when it resumed another's work."""
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
        "fresh_stages": list(fresh),
        "hyperparameters": job.settings.model_dump(),
        "metadata": job.request.metadata,
        "code": {"version": _package_version(), "commit": _commit(), "torch": torch.__version__},
        "seconds": round(sum(job.clock.seconds.values()), 1),
    }


def _ancestry(job: TrainingContext, base: Base) -> dict[str, Any]:
    """Which model a run started from, and how that one was made, down to the first of the line."""
    lineage = job.store.config(base.name, base.version).lineage
    return {"model": base.name, "version": base.version, "backbone_sha256": base.stored.sha256, "lineage": lineage}


# What the bases have seen


def seen_before(bases: Sequence[Base], data: LoadedDataset, store: ModelStore) -> list[str]:
    """A sentence where a base was trained on what is held out here, or may have been; none where its lineage does not say so."""
    found: dict[str, list[str]] = {}
    for base in bases:
        if base.ref is not None and (how := _overlap(store.config(base.name, base.version).lineage, data)):
            found.setdefault(how, []).append(f"{base.name}@{base.version}")
    return [
        f"the base {', '.join(names)} {how}, so accuracy on them flatters: believe a test part that the base has not seen, "
        "and where there are epochs to choose from keep the last (keep=last)"
        for how, names in found.items()
    ]


def _overlap(lineage: dict[str, Any], data: LoadedDataset) -> str | None:
    """How images that are held out here may have trained a backbone of this lineage. A dataset is known again by its hash or its name; a
    val/ or test/ of its own was never trained on."""
    drawn = [name for part, name in (("val", "validation"), ("test", "test")) if data.split.get(f"{part}_fraction")]
    images = f"{' and '.join(drawn)} images"
    for dataset in _trained_on(lineage) if drawn else ():
        same_images, same_split = dataset.get("sha256") == data.sha256, dataset.get("split") == data.split
        if same_images and not same_split:
            return f"was trained on this dataset under another split and has probably seen most of the {images}"
        if dataset.get("name") == data.name and not same_images:
            much, where = ("a few", "") if same_split else ("many", " and under another split")
            return f"was trained on {data.name} when it had other images{where} and has probably seen {much} of the {images}"
    return None


def _trained_on(lineage: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The datasets that the weights of a backbone come from, the latest first; mode head leaves a backbone as it is."""
    if lineage.get("mode") != "head" and isinstance(dataset := lineage.get("dataset"), dict):
        yield dataset
    for ancestor in lineage.get("base_model") or ():
        yield from _trained_on(ancestor["lineage"])


def _package_version() -> str | None:
    try:
        return importlib.metadata.version("imago")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
        return None


def _commit() -> str | None:
    """The commit of the checkout that this file lies in; None where it is installed without one."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
