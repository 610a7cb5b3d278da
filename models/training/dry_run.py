"""A dry run: what a run would be made of, and about how long it would take."""

from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import architectures
from models.images.cost import DEFAULT_LIMITS, Limits
from models.preprocessing import Preprocessing, normalise
from models.runtime import tune_allocator
from models.runtime.choice import seconds_of
from models.store.store import ModelStore
from models.training.bases import Base
from models.training.context import TrainingContext
from models.training.head.features import Extractor
from models.training.job.request import Event, FinetuneRequest
from models.training.outcome.thumbnails import odd_ones
from models.training.run import prepare
from models.training.selection.architectures import epochs_of

IMAGES = 8  # of the batch that is timed
BACKWARD = 3.0  # a training step over a forward pass
OVERHEAD_S = 3.0  # fitting, evaluating and publishing a head

ForwardPass = Callable[[Tensor], Tensor]


def dry_run(
    request: FinetuneRequest,
    store: ModelStore,
    progress: Callable[[Event], None],
    *,
    cache: Path,
    device: str = "auto",
    limits: Limits = DEFAULT_LIMITS,
    follow_links: bool = False,
) -> dict[str, Any]:
    """The audit with pictures, the split, the hyperparameters and an estimate in seconds, fit for JSON. Nothing is trained and
    nothing is written.

    Raises what `run` would raise up to the training.
    """
    tune_allocator()
    job = prepare(request, store, progress, None, cache, device=device, limits=limits, follow_links=follow_links)
    selects = request.selects_architecture
    return {
        "audit": job.data.audit.model_dump(mode="json"),
        "pictures": {
            path: f"data:image/jpeg;base64,{b64encode(data).decode()}" for path, data in odd_ones(job).items()
        },
        "split": {part: len(rows) for part, rows in job.data.rows.items()},
        "mode": job.mode,
        "bases": [base.name for base in job.bases],
        "effective": job.settings.model_dump(),
        "selection": {"folds": job.request.selection_folds, "epochs": epochs_of(job)} if selects else None,
        "estimate": estimate(job),
    }


def estimate(job: TrainingContext) -> dict[str, float]:
    """Seconds by phase and in all, from one batch through each base; features that are cached already will take less. Of several
    architectures to choose from, the slowest is taken to be the one that is trained in full."""
    audit = job.clock.seconds["audit"]
    each = [seconds_per_image(job, base) for base in job.bases]
    forward = max(each) if job.request.selects_architecture else sum(each)
    shown, held_out = len(job.data.rows["train"]), len(job.data.paths) - len(job.data.rows["train"])
    if job.mode == "head":
        features, train = forward * (len(job.data.paths) + shown * job.settings.copies), OVERHEAD_S
    else:
        features = forward * len(job.data.paths) if job.mode == "head_then_finetune" else 0.0
        train = job.settings.epochs * forward * (BACKWARD * shown / job.settings.devices + held_out)
    phases = {"audit": audit, "features": features, "train": train}
    if job.request.selects_architecture:  # each image trains in all folds but one, in which it is validated
        phases["select"] = epochs_of(job) * sum(each) * shown * (BACKWARD * (job.request.selection_folds - 1) + 1)
    return {name: round(seconds, 1) for name, seconds in {**phases, "total": sum(phases.values())}.items()}


def seconds_per_image(job: TrainingContext, base: Base) -> float:
    """Of a forward pass in the arithmetic of this run: of its features, or of the network that it trains."""
    forward = _extractor(job, base) if job.mode == "head" else _trained(job, base)
    images = _grey(base.preprocessing)
    seconds_of(forward, job.device, images)  # the first pass allocates and plans
    return seconds_of(forward, job.device, images) / IMAGES


def _extractor(job: TrainingContext, base: Base) -> ForwardPass:
    backbone = job.store.load_backbone(base.stored)
    return Extractor(backbone, job.device, job.precision(backbone), IMAGES).engine


def _trained(job: TrainingContext, base: Base) -> ForwardPass:
    module = _network(job, base).eval().to(memory_format=torch.channels_last).to(job.device)
    dtype = getattr(torch, job.settings.precision)

    @torch.inference_mode()
    def forward(pixels: Tensor) -> Tensor:
        images = normalise(pixels.to(job.device), base.preprocessing).contiguous(memory_format=torch.channels_last)
        with torch.autocast(job.device.type, dtype, enabled=dtype is not torch.float32):
            return module(images)  # type: ignore[no-any-return]

    return forward


def _network(job: TrainingContext, base: Base) -> torch.nn.Module:
    if base.ref is None:
        return architectures.create(base.architecture, len(job.data.classes), base.preprocessing.channels).backbone
    return job.store.load_backbone(base.ref).module


def _grey(shape: Preprocessing) -> torch.Tensor:
    return torch.full((IMAGES, shape.channels, shape.height, shape.width), 127, dtype=torch.uint8)
