"""Trains backbones and a head from the bases, in each mode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models import architectures
from models.classifier import Backbone, Head, Layer
from models.errors import TrainingError
from models.training.bases import Base
from models.training.context import TrainingContext
from models.training.evaluation import calibrate as calibration
from models.training.evaluation.calibrate import Calibration
from models.training.evaluation.evaluate import outputs
from models.training.evaluation.layer_activity import TrainedLayer, head_layer, layers_of
from models.training.head.feature_sum import fit_sum
from models.training.head.features import Extractor, Stopped
from models.training.head.mean import fit_mean
from models.training.head.regression import Fit, fit
from models.training.job.hyperparameters import ResolvedHyperparameters
from models.training.job.job_files import StopReason
from models.training.job.request import Event
from models.training.network import checkpoint, distributed
from models.training.network import trainer as whole
from models.training.network.augment import augmented_copy
from models.training.network.auxiliary import auxiliary
from models.training.network.batches import AugmentedImages, first_images, spread
from models.training.network.freezing import fresh_stages, initialise_anew, stages
from models.training.network.trainer import History, TrainingPlan

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """Backbones as stored, their head, and the record of their training."""

    backbones: tuple[Backbone, ...]
    head: Head
    features: Callable[[Tensor], list[Tensor]]  # rows (n,) -> one float32 (n, D) per backbone
    layers: tuple[TrainedLayer, ...]
    sample: AugmentedImages  # of the training images
    fresh: tuple[str, ...] = ()  # stages that were initialised anew
    fit: Fit | None = None
    history: History | None = None
    stop_reason: StopReason | None = None

    @torch.inference_mode()
    def scores(self, rows: Tensor) -> Tensor:
        """Return the scores of the images at `rows` (n,), float32 (n, C), before the temperature."""
        return self.head(*self.features(rows))  # type: ignore[no-any-return]

    @torch.inference_mode()
    def probabilities(self, rows: Tensor) -> Tensor:
        """Return the probabilities as they will be served, (n, C)."""
        return self.head.probabilities(*self.features(rows))


def train(job: TrainingContext) -> TrainingResult:
    return train_head(job) if job.mode == "head" else train_network(job)


def calibrate(job: TrainingContext, trained: TrainingResult) -> Calibration:
    """Fit the temperature on the validation part, and set it in the head."""
    rows = job.data.rows["val"]
    found = calibration.calibrate(trained.scores(rows), job.data.labels[rows])
    trained.head.config = trained.head.config.model_copy(update={"temperature": found.temperature})
    return found


# A head on frozen features


def train_head(job: TrainingContext) -> TrainingResult:
    """Fit a head. The backbones stay in eval mode, so batch norm's statistics are the base's."""
    backbones = tuple(job.store.load_backbone(base.stored) for base in job.bases)
    with job.clock.phase("features"):
        every = [cached_features(job, backbone) for backbone in backbones]
        shown = training_features(job, backbones, every)
    with job.clock.phase("train"):
        fitted = _fit(job, shown)
    ended: StopReason | None = "stopped" if job.stop() else "budget" if job.out_of_time() else None
    layers = [layer for b in backbones for layer in layers_of(b.ref.architecture, b.module, b.ref.preprocessing)]
    return TrainingResult(
        backbones,
        fitted.head,
        lambda rows: [f[rows] for f in every],
        layers=(*layers, head_layer(fitted.head)),
        sample=shown.sample,
        fit=fitted,
        stop_reason=ended,
    )


class HeadTrainingData(NamedTuple):
    """The data that a head is fitted to: the training images, then each of their augmented copies."""

    features: list[Tensor]  # one float32 (n, D) per backbone
    labels: Tensor  # int64 (n,)
    groups: Tensor  # int64 (n,)
    sample: AugmentedImages


def _fit(job: TrainingContext, shown: HeadTrainingData) -> Fit:
    classes, tell = len(job.data.classes), job.tell("train")
    if len(shown.features) > 1:
        fit_all = fit_mean if job.settings.ensemble == "mean" else fit_sum
        return fit_all(shown.features, shown.labels, classes, shown.groups, job.settings, tell, job.is_to_end)
    return fit(shown.features[0], shown.labels, classes, shown.groups, job.settings, tell, job.is_to_end)


def cached_features(job: TrainingContext, backbone: Backbone) -> Tensor:
    """Return the features of all images, float32 (N, D)."""
    return compute_features(job, backbone, *job.pixels(backbone.ref.preprocessing))


def compute_features(job: TrainingContext, backbone: Backbone, pixels: Tensor, digests: Sequence[bytes]) -> Tensor:
    """Return the features of these images, cached ones from disk. Raises TrainingError if the run ends before all are there."""
    try:
        return job.cache.features(
            backbone,
            pixels,
            digests,
            progress=job.tell("features"),
            warn=lambda message: job.progress(Event("features", 0.0, message=message)),
            device=job.device,
            precision=job.precision(backbone),
            stop=job.is_to_end,
        )
    except Stopped:
        why = "was stopped" if job.stop() else "has used up budget.max_seconds"
        raise TrainingError(
            f"the run {why} before all features were computed, so there is no head to keep; what is computed is kept, "
            "and the same request goes on from there"
        ) from None


def training_features(job: TrainingContext, backbones: Sequence[Backbone], every: Sequence[Tensor]) -> HeadTrainingData:
    """Return what the head is fitted to, from the features `every` of all images by each backbone.

    The sample shows the last copy for the last backbone.
    """
    rows, copies = job.data.rows["train"], job.settings.copies
    shown, places = [], spread(rows)
    for backbone, features in zip(backbones, every, strict=True):
        pixels, _ = job.pixels(backbone.ref.preprocessing)
        seen, parts = pixels[rows[places]], [features[rows]]
        for number in range(1, copies + 1):
            changed, digests = augmented_copy(pixels[rows], job.settings, number)
            parts.append(compute_features(job, backbone, changed, digests))
            seen = changed[places]
        shown.append(torch.cat(parts))
    labels, groups = (values[rows].repeat(copies + 1) for values in (job.data.labels, job.data.groups))
    how = f"in an augmented copy: augmentation {job.settings.augmentation}" if copies else "without augmentation"
    said = f"Some training images as the backbone saw them, {how}."
    return HeadTrainingData(shown, labels, groups, AugmentedImages(said, seen, labels[places]))


# The whole network


def train_network(job: TrainingContext) -> TrainingResult:
    """Train the backbone and the last layer. The result has the backbone as it was stored, with its rounding."""
    base = job.bases[0]
    fresh = fresh_of(job.bases[0], job.settings)
    backbone, layer = _parts(job, fresh)
    with job.clock.phase("train"):
        history = fit_network(job, nn.Sequential(backbone, layer).to(job.device), job.folder / CHECKPOINT)
    layers = layers_of(base.architecture, backbone.cpu(), base.preprocessing)
    ref = job.store.put_backbone(base.architecture, backbone, base.preprocessing, half=job.request.half)
    stored, head = job.store.load_backbone(ref), Head.of(layer.cpu())
    return TrainingResult(
        (stored,),
        head,
        _features_of(job, stored),
        layers=(*layers, head_layer(head)),
        sample=first_images(job.data, base.preprocessing, job.settings),
        fresh=fresh,
        history=history,
        stop_reason=history.stop_reason,
    )


def fit_network(job: TrainingContext, network: nn.Sequential, path: Path) -> History:
    """Train a backbone and its last layer in place, resuming from the checkpoint at `path` if there is one."""
    base, settings = job.bases[0], job.settings
    plan = TrainingPlan(
        job.data,
        base.preprocessing,
        settings,
        job.request.early_stopping.for_epochs(settings.epochs),
        job.budget,
        path,
        auxiliary(base.architecture, len(job.data.classes)),
    )
    train_network = distributed.train if settings.devices > 1 else whole.train
    return train_network(network, plan, job.progress, job.stop)


def fresh_of(base: Base, settings: ResolvedHyperparameters) -> tuple[str, ...]:
    """Return the base's stages to initialise anew. Raises TrainingError if `fresh_from` or `freeze_until` do not fit its network."""
    if base.ref is None or (settings.fresh_from is None and settings.freeze_until is None):
        return ()
    outline = architectures.create_backbone(base.architecture, base.preprocessing.channels)
    return fresh_stages(list(stages(outline)), settings.fresh_from, settings.freeze_until)


def _parts(job: TrainingContext, fresh: Sequence[str]) -> tuple[nn.Module, Layer]:
    """Return the backbone and the last layer to train: both new, or the base's backbone with new stages `fresh` and a new linear layer,
    which mode head_then_finetune fits first."""
    classes, base = len(job.data.classes), job.bases[0]
    if job.mode == "scratch":
        network = architectures.create(base.architecture, classes, base.preprocessing.channels)
        return network.backbone, network.layer
    backbone = job.store.load_backbone(base.stored)
    if fresh:
        new = architectures.create(base.architecture, classes, base.preprocessing.channels).backbone
        initialise_anew(backbone.module, new, fresh)
    head_first, changed = job.mode == "head_then_finetune", backbone if fresh else None
    layer = _head_first(job, changed) if head_first else nn.Linear(backbone.feature_dim, classes)
    return backbone.module.requires_grad_(True), layer


def _head_first(job: TrainingContext, changed: Backbone | None) -> nn.Linear:
    """Return the layer that mode head fits, on the base's features or on those of the `changed` backbone."""
    job = replace(job, settings=job.settings.model_copy(update={"epochs": 200, "weight_decay": None, "copies": 0}))
    if changed is None:
        head = train_head(job).head
    else:
        rows, shape = job.data.rows["train"], changed.ref.preprocessing
        with job.clock.phase("features"):
            module = changed.module.to(job.device)
            features = outputs(module, job.data.pixels, rows, shape, progress=job.tell("features"))
        labels, groups, classes = job.data.labels[rows], job.data.groups[rows], len(job.data.classes)
        head = fit(features, labels, classes, groups, job.settings, job.tell("train"), job.is_to_end).head
    layer = head.layers[0]
    if not isinstance(layer, nn.Linear):
        raise TypeError("a fitted head's layer is linear")
    return layer


def _features_of(job: TrainingContext, backbone: Backbone) -> Callable[[Tensor], list[Tensor]]:
    """Return a function that computes the features of rows, once for each set of rows."""
    extract = Extractor(backbone, job.device, job.precision(backbone))
    known: dict[bytes, Tensor] = {}

    def features(rows: Tensor) -> list[Tensor]:
        key = rows.numpy().tobytes()
        if key not in known:
            known[key] = extract.rows(job.data.pixels, rows, job.tell("evaluate"))
        return [known[key]]

    return features


def forget_checkpoint(job: TrainingContext) -> None:
    checkpoint.remove(job.folder / CHECKPOINT)
