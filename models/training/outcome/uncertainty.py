"""The reference data for uncertainty of a version: made at the end of a run, or later for a version without."""

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from models.classifier import Classifier, ModelConfig
from models.data import dataset
from models.data.dataset import LoadedDataset
from models.data.samples import Reading
from models.decision_rules import PRECISION, Decisions
from models.errors import DatasetError
from models.files.text_encodings import AUTO
from models.images.cost import DEFAULT_LIMITS, Limits
from models.progress import Progress, silent
from models.store.store import ModelStore
from models.training.context import TrainingContext
from models.training.evaluation.evaluate import outputs
from models.training.train import TrainingResult
from models.uncertainty import Conformal, NearestNeighbours, Reference, kth, nearest, sample

Features = Callable[[Tensor], list[Tensor]]  # rows (n,) -> one float32 (n, D) per backbone


def reference_of(job: TrainingContext, trained: TrainingResult) -> Reference:
    """Returns the reference from the training and validation images; the temperature was fitted to the latter too."""
    return _reference(
        job.data,
        job.data.rows["val"],
        trained.features,
        trained.probabilities,
        precision=job.request.accept_precision,
    )


def calibrate(
    store: ModelStore,
    config: ModelConfig,
    path: Path,
    part: Literal["val", "test"] = "test",
    share: float = 1.0,
    most: int | None = None,
    progress: Progress = silent,
    precision: float = PRECISION,
    encoding: str = AUTO,
    limits: Limits = DEFAULT_LIMITS,
) -> Reference:
    """Returns a reference for a stored version, from a dataset with train/ and its own `part`, on which the version was not trained.

    `share` of the held-out images is used, and at most `most` of the training images are kept. `precision`: that of accepted images.
    Raises DatasetError.
    """
    classifier = store.load(config.name, config.version)
    kinds = [backbone.ref.preprocessing for backbone in classifier.backbones]
    reading = Reading(encoding=encoding, follow_links=True)  # called by the command line only
    data = dataset.load(
        path,
        kinds[0],
        val_fraction=0.05,
        seed=0,
        near_duplicates="off",
        reading=reading,
        progress=lambda done: progress(done / 2),
        limits=limits,
    )
    if data.classes != config.classes:
        raise DatasetError(f"{data.name} has other classes than {config.name}@{config.version}")
    if data.split.get(part) != "given":
        raise DatasetError(
            f"{data.name} has no {part}/ of its own: images that a model was trained on would give optimistic results"
        )
    pixels = [
        data.pixels if kind == kinds[0] else dataset.pixels(path, data, kind, reading=reading, limits=limits)[0]
        for kind in kinds
    ]
    features = _features(classifier, pixels)
    reference = _reference(
        data,
        held_out(data, part, share),
        features,
        lambda rows: classifier.head.probabilities(*features(rows)),
        most,
        precision,
    )
    progress(1.0)
    return reference


def held_out(data: LoadedDataset, part: Literal["val", "test"], share: float = 1.0) -> Tensor:
    """Returns `share` of the rows of a part, in the order of the hashes of their files, which is independent of their content."""
    rows = sorted(data.rows[part].tolist(), key=lambda row: data.files[row])
    return torch.tensor(rows[: round(share * len(rows))], dtype=torch.int64)


def _features(classifier: Classifier, pixels: list[Tensor]) -> Features:
    members = list(zip(classifier.backbones, pixels, strict=True))
    return lambda rows: [outputs(b.module, every, rows, b.ref.preprocessing) for b, every in members]


@torch.inference_mode()
def _reference(
    data: LoadedDataset,
    held: Tensor,
    features: Features,
    probabilities: Callable[[Tensor], Tensor],
    most: int | None = None,
    precision: float = PRECISION,
) -> Reference:
    found, labels = probabilities(held).float(), data.labels[held]
    conformal, seen = Conformal.of(found, labels), features(held)
    if len(seen) > 1:
        return Reference(conformal, None, Decisions.of(found, labels, precision=precision))
    train = data.rows["train"]
    kept = train[sample(data.labels[train], seen[0].shape[1], most)]
    names = [data.paths[row] for row in kept.tolist()]
    near = NearestNeighbours.of(features(kept)[0], names, seen[0])
    within = kth(nearest(near.features, seen[0])[0]) <= near.threshold
    return Reference(conformal, near, Decisions.of(found, labels, within, precision))
