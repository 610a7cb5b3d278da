"""Runs a training, from a request to a published version and its report:

audit and split -> cached features of frozen backbones and a head, or the whole network -> temperature -> evaluation
    -> comparison with what is served -> a version in the store -> the report
"""

import hashlib
import os
import shutil
import uuid
from pathlib import Path

import torch

from models.classifier import ModelConfig
from models.data import dataset
from models.data.samples import Reading
from models.images.cost import DEFAULT_LIMITS, Limits
from models.progress import Stop, never
from models.runtime import devices, tune_allocator
from models.runtime.device import gains_from_bfloat16, leave_memory
from models.runtime.options import Precision
from models.store.store import ModelStore
from models.training import train
from models.training.bases import bases_of
from models.training.context import Clock, RunRecord, TrainingContext
from models.training.head.features import FeatureCache
from models.training.job.hyperparameters import Mode
from models.training.job.job_files import JobResult, published
from models.training.job.request import Event, FinetuneRequest, OnEvent, effective
from models.training.outcome import comparison
from models.training.outcome.lineage import seen_before
from models.training.outcome.parity import parity as parity_of
from models.training.outcome.results import make_report, metrics_of, write_report
from models.training.outcome.thumbnails import thumbnails, training_batch
from models.training.outcome.uncertainty import reference_of
from models.training.reports import Report
from models.training.selection.bases import choose_base
from models.training.train import TrainingResult
from models.uncertainty import Reference

__all__ = ["Event", "FinetuneRequest", "folder_of", "prepare", "run"]

ENOUGH = 100  # training images of each class from which mode auto trains the backbone too, on a GPU


def run(
    request: FinetuneRequest,
    store: ModelStore,
    progress: OnEvent,
    *,
    job_dir: Path,
    cache: Path,
    stop: Stop = never,
    device: str = "auto",
    limits: Limits = DEFAULT_LIMITS,
    follow_links: bool = False,
) -> JobResult:
    """Train and publish the next version of `request.name`; block until it is done. The result says whether to serve it.

    A run that was killed resumes when it is called again with the same `job_dir`. When `stop` returns True, the best so far is published.
    `device` is as the setting of that name. `follow_links` also follows links out of the dataset's folder, which the server never does.
    Raises ModelNotFound, ArchitectureNotFound (base), DatasetError, TrainingError, OSError, DeviceUnavailable.
    """
    tune_allocator()  # on two cores, a quarter more images a second
    with torch.random.fork_rng(devices=[]):
        job = prepare(request, store, progress, job_dir, cache, stop, device, limits, follow_links)
        job, choice = choose_base(job)
        torch.manual_seed(job.settings.seed)  # the same weights, whether folds were trained before or by a killed run
        trained = train.train(job)
        with job.clock.phase("calibrate"):
            calibration = train.calibrate(job, trained)
        with job.clock.phase("evaluate"):
            compared = comparison.compare_with_served(job, trained)
            report = make_report(job, trained, calibration, choice, compared)
        with job.clock.phase("publish"):
            config = _publish(job, trained, report, reference_of(job, trained))
            parity = parity_of(job, trained, config)
    deployment, reason = comparison.decide(request, compared, parity)
    progress(Event("publish", 1.0, message=reason))
    report = report.model_copy(update={"version": config.version, "parity": parity, "timings": _rounded(job.clock)})
    batch = training_batch(trained.sample, job.data.classes)
    write_report(report, job.folder, thumbnails(job, report), batch)
    train.forget_checkpoint(job)
    return JobResult(
        status="succeeded",
        model=config.name,
        version=config.version,
        stop_reason=trained.stop_reason,
        verdict=compared.verdict.model_dump(mode="json") if compared.verdict else None,
        deployment=deployment,
        reason=reason,
        effective=job.settings.model_dump(),
    )


def prepare(
    request: FinetuneRequest,
    store: ModelStore,
    progress: OnEvent,
    folder: Path | None,
    cache: Path,
    stop: Stop = never,
    device: str = "auto",
    limits: Limits = DEFAULT_LIMITS,
    follow_links: bool = False,
) -> TrainingContext:
    """Do everything up to training: bases, audit, split, hyperparameters. Without a folder nothing is written."""
    begun = RunRecord.read(folder) if folder else None
    limits = begun.limits if begun else limits  # other limits may accept other images
    # A run that began on a GPU fails without one, because it could take days on a CPU.
    there = devices("cuda" if device == "auto" and begun is not None and begun.on_gpu else device)
    if there[0].type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # makes cuBLAS deterministic
        torch.cuda.set_device(there[0])
    leave_memory(there[0])
    clock, reading = Clock(), Reading(request.layout, request.encoding, follow_links)
    with clock.phase("audit"):
        bases = begun.bases if begun else bases_of(request, store)
        data = dataset.load(
            request.dataset,
            bases[0].preprocessing,
            val_fraction=request.val_fraction,
            test_fraction=request.test_fraction,
            seed=request.hyperparameters.seed,
            on_bad_file=request.on_bad_file,
            near_duplicates=request.near_duplicates,
            min_per_class=request.min_per_class,
            reading=reading,
            progress=lambda done: progress(Event("audit", done)),
            limits=limits,
        )
        data = data.warned(seen_before(bases, data, store))
    for file in data.audit.bad:
        progress(Event("audit", 1.0, message=f"skipped {file.path}: {file.reason}"))
    for warning in data.audit.warnings:
        progress(Event("audit", 1.0, message=warning))
    mode = _mode(request, data, there[0])
    settings = effective(request, mode, len(data.rows["train"]), _precision(mode, there[0]), len(there))
    if len(bases) == 1 and mode != "head":
        train.fresh_of(bases[0], settings)  # raises for a stage that the network does not have
    on_gpu = there[0].type == "cuda"
    run = begun or RunRecord(
        run=uuid.uuid4().hex, dataset_sha256=data.sha256, bases=bases, on_gpu=on_gpu, limits=limits
    )
    run.check(data)
    if folder:
        run.write(folder)
    kept, features = folder or Path(), FeatureCache(cache)
    device_used = there[0]
    return TrainingContext(
        request, store, progress, stop, kept, features, data, bases, mode, settings, clock, run, device_used, reading
    )


def _mode(request: FinetuneRequest, data: dataset.LoadedDataset, device: torch.device) -> Mode:
    """Return the mode; for `auto`, the backbone trains too if there is a GPU and every class has enough images."""
    if request.mode != "auto":
        return request.mode
    fewest = min(data.audit.class_counts["train"].values())
    one = not isinstance(request.base, tuple)
    return "head_then_finetune" if device.type == "cuda" and fewest >= ENOUGH and one else "head"


def _precision(mode: Mode, device: torch.device) -> Precision:
    gains = mode != "head" and device.type == "cuda" and gains_from_bfloat16(device)
    return "bfloat16" if gains else "float32"


def _publish(job: TrainingContext, trained: TrainingResult, report: Report, reference: Reference) -> ModelConfig:
    """Publish the next version, or return the one that this run published before it was killed."""
    job.progress(Event("publish", 0.0))
    name, refs = job.request.name, [backbone.ref for backbone in trained.backbones]
    return published(job.store, name, job.run.run) or job.store.publish(
        name, refs, trained.head, job.data.classes, metrics_of(report), report.lineage, reference
    )


def folder_of(request: FinetuneRequest, root: Path, fresh: bool) -> Path:
    """Return the folder where the run of this request keeps its state, so that the same command resumes it; emptied if `fresh`."""
    folder = root / f"{request.name}-{hashlib.sha256(request.model_dump_json().encode()).hexdigest()[:12]}"
    if fresh and folder.exists():
        shutil.rmtree(folder)
    return folder


def _rounded(clock: Clock) -> dict[str, float]:
    return {phase: round(seconds, 2) for phase, seconds in clock.seconds.items()}
