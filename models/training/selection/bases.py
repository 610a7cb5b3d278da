"""Chooses among several bases, by cross-validation.

base auto       heads on every backbone of the store, accuracy against latency here
mode scratch    several architectures, each trained on every fold, see `architectures`
"""

import statistics
from dataclasses import replace
from pathlib import Path

import torch

from models.classifier import Backbone
from models.runtime import Options, compile_backbone
from models.runtime.choice import seconds_of
from models.training.candidates import BaseCandidate, BaseChoice, choose
from models.training.context import TrainingContext
from models.training.job.request import Event
from models.training.selection.architectures import choose_architecture, discard
from models.training.train import cached_features

SHOTS = 9  # single images; their median counts


def choose_base(job: TrainingContext) -> tuple[TrainingContext, BaseChoice | None]:
    """Return the job with the chosen base, and the table of all; the job unchanged and None if the base was named."""
    if job.request.base != "auto" and not job.request.selects_architecture:
        return job, None
    choice = job.run.choice or (_choose(job) if job.request.base == "auto" else choose_architecture(job))
    run = job.run.model_copy(update={"choice": choice})
    if job.folder != Path():
        run.write(job.folder)
        discard(job.folder)
    best = next(base for base in job.bases if base.name == choice.best)
    pixels, digests = job.pixels(best.preprocessing)
    data = replace(job.data, pixels=pixels, digests=digests)
    return replace(job, bases=(best,), data=data, run=run, _pixels={}), choice


def _choose(job: TrainingContext) -> BaseChoice:
    rows = job.data.rows["train"]
    with job.clock.phase("features"):
        backbones = {base.name: job.store.load_backbone(base.stored) for base in job.bases}
        candidates = [
            BaseCandidate(name, cached_features(job, backbone)[rows], latency_ms(backbone, job.device))
            for name, backbone in backbones.items()
        ]
        choice = choose(
            candidates,
            job.data.labels[rows],
            job.data.groups[rows],
            len(job.data.classes),
            job.settings,
            job.request.budget.max_latency_ms,
            job.tell("features"),
            job.is_to_end,
        )
    job.progress(Event("features", 1.0, message=f"of {len(candidates)} bases, {choice.best} is taken"))
    return choice


def latency_ms(backbone: Backbone, device: torch.device) -> float:
    """Return the milliseconds for one image by the engine that would serve it, without decoding."""
    runtime, shape = compile_backbone(backbone, device, Options()), backbone.ref.preprocessing
    pixels = torch.full((1, shape.channels, shape.height, shape.width), 127, dtype=torch.uint8)
    return 1000 * statistics.median(seconds_of(runtime, device, pixels) for _ in range(SHOTS))
