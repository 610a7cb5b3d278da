"""One training run, from a request to a served version:

base -> dataset -> fit the head on frozen features, or train the whole network -> store the backbone
     -> evaluate what was stored, rounding included -> publish -> activate
"""

import hashlib
import importlib.metadata
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import architectures
from models.classifier import Backbone, BackboneRef, ConvLayer, Head, ModelConfig, Preprocessing
from models.errors import ModelNotFound, TrainingError
from models.runtime import tune_allocator
from models.store import ModelStore
from models.training import head as linear
from models.training import network as whole
from models.training.dataset import Dataset, load
from models.training.evaluate import evaluate, outputs
from models.training.request import Effective, Event, FinetuneRequest, Hyperparameters, command, effective

__all__ = ["Event", "FinetuneRequest", "Hyperparameters", "run"]

Progress = Callable[[Event], None]
MAX_NAMED_BAD_FILES = 100  # in the lineage


@dataclass(frozen=True, eq=False)
class Job:
    """What every step of a run works with."""

    request: FinetuneRequest
    store: ModelStore
    data: Dataset
    settings: Effective
    progress: Progress


@dataclass(frozen=True, eq=False)
class Trained:
    """A backbone in the store, a head for it, and how they came about."""

    backbone: Backbone
    head: Head
    facts: dict[str, Any]


def run(request: FinetuneRequest, store: ModelStore, progress: Progress) -> ModelConfig:
    """Train, publish and activate the next version of `request.name`; blocks until it is done. `progress` is called often.

    A run that was killed goes on from its last epoch when it is asked for again. Raises ModelNotFound or ArchitectureNotFound (base),
    DatasetError, TrainingError.
    """
    started = time.monotonic()
    tune_allocator()  # on two cores, a quarter more images a second
    data = _load(request, store, progress)
    job = Job(request, store, data, effective(request, len(data.rows["train"])), progress)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(job.settings.seed)
        trained = _fit_head(job) if request.mode == "head" else _train_network(job)
    metrics = {**trained.facts, **_evaluate(job, trained)}
    progress(Event("publish", 0.0))
    lineage = _lineage(job, time.monotonic() - started)
    config = store.publish(request.name, [trained.backbone.ref], trained.head, data.classes, metrics, lineage)
    store.activate(config.name, config.version)
    _checkpoint(job).unlink(missing_ok=True)
    progress(Event("publish", 1.0))
    return config


def _load(request: FinetuneRequest, store: ModelStore, progress: Progress) -> Dataset:
    _, preprocessing = _base(request, store)
    data = load(
        request.dataset,
        preprocessing,
        val_fraction=request.val_fraction,
        seed=request.hyperparameters.seed,
        on_bad_file=request.on_bad_file,
        progress=lambda fraction: progress(Event("decode", fraction)),
    )
    for file in data.bad:
        progress(Event("decode", 1.0, message=f"skipped {file.path}: {file.reason}"))
    return data


# The base


def _base(request: FinetuneRequest, store: ModelStore) -> tuple[str, Preprocessing]:
    """The architecture to train and the preprocessing that belongs to it."""
    if request.mode == "scratch":
        return request.base, architectures.preprocessing_of(request.base)
    ref = _base_ref(request, store)
    return ref.architecture, ref.preprocessing


def _base_ref(request: FinetuneRequest, store: ModelStore) -> BackboneRef:
    if request.base not in store.names():
        here = ", ".join(store.names()) or "none"
        raise ModelNotFound(
            f"mode {request.mode} starts from a model of the store, and it has no {request.base!r} (it has: {here}): "
            f"run `imago models pull {request.base}`, name another base, or train with mode scratch"
        )
    backbones = store.config(request.base).backbones
    if len(backbones) != 1:
        raise TrainingError(
            f"{request.base!r} is an ensemble of {len(backbones)} backbones; a base has one: name a member"
        )
    return backbones[0]


# Training


def _fit_head(job: Job) -> Trained:
    """The backbone is in eval mode, and so it stays: batch norm's statistics are the base's."""
    backbone = job.store.load_backbone(_base_ref(job.request, job.store))
    rows = job.data.rows["train"]
    features = _features(job, backbone, rows)
    layer = linear.fit(
        features,
        job.data.labels[rows],
        len(job.data.classes),
        job.settings,
        progress=lambda done: job.progress(Event("train", done)),
    )
    return Trained(backbone, Head.of(layer), {})


def _train_network(job: Job) -> Trained:
    """Train the backbone and a new last layer; what goes on is the backbone as it was stored, rounding included."""
    architecture, preprocessing = _base(job.request, job.store)
    backbone, layer = _parts(job)
    network = nn.Sequential(backbone, layer).to(_device())
    history = whole.train(network, job.data, preprocessing, job.settings, _checkpoint(job), job.progress)
    ref = job.store.put_backbone(architecture, backbone.cpu(), preprocessing, half=job.request.half)
    return Trained(job.store.load_backbone(ref), Head.of(layer.cpu()), history.as_dict())


def _parts(job: Job) -> tuple[nn.Module, nn.Linear | ConvLayer]:
    """Backbone and last layer: both new, or the base's backbone and a new linear layer."""
    num_classes = len(job.data.classes)
    if job.request.mode == "scratch":
        network = architectures.create(job.request.base, num_classes)
        return network.backbone, network.layer
    backbone = job.store.load_backbone(_base_ref(job.request, job.store))
    return backbone.module.requires_grad_(True), nn.Linear(backbone.feature_dim, num_classes)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _checkpoint(job: Job) -> Path:
    """Where this very run, on these very images, keeps its state; in the store, so that it outlives a reboot."""
    request = job.request
    identity = (
        f"{request.base} {request.mode} {request.val_fraction} {job.settings} {job.data.sha256} {torch.__version__}"
    )
    return job.store.root / "training" / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.pt"


# Evaluation and publishing


def _features(job: Job, backbone: Backbone, rows: Tensor) -> Tensor:
    """float32 (n, D) of the given rows, on the CPU."""
    module = backbone.module.to(memory_format=torch.channels_last).to(_device())
    preprocessing = backbone.ref.preprocessing
    return outputs(
        module, job.data.pixels, rows, preprocessing, progress=lambda done: job.progress(Event("features", done))
    )


@torch.inference_mode()
def _evaluate(job: Job, trained: Trained) -> dict[str, Any]:
    """On validation, which chose the epoch and so flatters; and, where there are test images, on those: seen here for the first time."""
    data, found = job.data, {}
    for part in ("val", "test"):
        rows = data.rows[part]
        if len(rows):
            scores = trained.head(_features(job, trained.backbone, rows))
            evaluation = evaluate(scores.argmax(dim=1), data.labels[rows], data.classes)
            job.progress(
                Event("evaluate", 1.0, accuracy=evaluation.accuracy, message=f"{part}: {evaluation.images} images")
            )
            found[part] = evaluation.as_dict()
    return found


def _lineage(job: Job, seconds: float) -> dict[str, Any]:
    """All that it takes to make this version again. `seconds` are of this process alone, when it resumed another's work."""
    request, data = job.request, job.data
    named = [asdict(file) for file in data.bad[:MAX_NAMED_BAD_FILES]]
    images = {part: len(rows) for part, rows in data.rows.items()}
    return {
        "command": command(request),
        "dataset": {
            "name": data.name,
            "sha256": data.sha256,
            "images": images,
            "skipped": len(data.bad),
            "skipped_files": named,
        },
        "base": request.base,
        "base_model": None if request.mode == "scratch" else _ancestry(job.store.config(request.base)),
        "mode": request.mode,
        "hyperparameters": asdict(job.settings),
        "code": {"version": _package_version(), "commit": _commit(), "torch": torch.__version__},
        "seconds": round(seconds, 1),
    }


def _ancestry(base: ModelConfig) -> dict[str, Any]:
    """Which model a run started from, and how that one was made, down to the first of the line."""
    return {"version": base.version, "backbone_sha256": base.backbones[0].sha256, "lineage": base.lineage}


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
