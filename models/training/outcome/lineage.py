"""The lineage of a version, sufficient to train it again: data, bases, settings, command and code."""

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
    """Returns the lineage of a run. `fresh`: its newly initialised stages. `seconds` do not include those of an interrupted process."""
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
    """Returns the base of a run with its own lineage, and so on to the first ancestor."""
    lineage = job.store.config(base.name, base.version).lineage
    return {"model": base.name, "version": base.version, "backbone_sha256": base.stored.sha256, "lineage": lineage}


# Data leaks through the bases


def seen_before(bases: Sequence[Base], data: LoadedDataset, store: ModelStore) -> list[str]:
    """Returns a warning for bases that were, or may have been, trained on images that are held out here, by their lineage."""
    found: dict[str, list[str]] = {}
    for base in bases:
        if base.ref is not None and (how := _overlap(store.config(base.name, base.version).lineage, data)):
            found.setdefault(how, []).append(f"{base.name}@{base.version}")
    return [
        f"the base {', '.join(names)} {how}, so accuracy on them is too optimistic: trust a test part that the base has not seen, "
        "and where there are several epochs keep the last (keep=last)"
        for how, names in found.items()
    ]


def _overlap(lineage: dict[str, Any], data: LoadedDataset) -> str | None:
    """Describes how images that are held out here may have trained a backbone of this lineage; None where they have not.

    A dataset is recognised by its hash or its name. Its own val/ or test/ was never used for training.
    """
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
    """Yields the datasets on which a backbone was trained, the latest first; mode head does not change the backbone."""
    if lineage.get("mode") != "head" and isinstance(dataset := lineage.get("dataset"), dict):
        yield dataset
    for ancestor in lineage.get("base_model") or ():
        yield from _trained_on(ancestor["lineage"])


def _package_version() -> str | None:
    try:
        return importlib.metadata.version("imago")
    except importlib.metadata.PackageNotFoundError:  # a checkout that is not installed
        return None


def _commit() -> str | None:
    """Returns the commit of the checkout that contains this file; None for an installed package."""
    root = Path(__file__).parents[3]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)  # noqa: S607
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() if answer.returncode == 0 else None
