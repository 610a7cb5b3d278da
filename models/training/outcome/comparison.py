"""The comparison of a new version with the served one, and the decision to deploy it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.classifier import Backbone, ModelConfig
from models.errors import ModelError
from models.runtime.options import Precision
from models.training.context import TrainingContext
from models.training.evaluation.gate import GateVerdict, compare
from models.training.job.job_files import Deployment
from models.training.job.request import FinetuneRequest
from models.training.reports import Parity
from models.training.train import TrainingResult


@dataclass(frozen=True)
class Comparison:
    """The served version, and the verdict; None with the reason where the two cannot be compared.

    `fair`: the served version was trained under the same split, so that none of these images can be in its training part.
    """

    served: int | None
    verdict: GateVerdict | None
    reason: str
    fair: bool = True


def compare_with_served(job: TrainingContext, trained: TrainingResult) -> Comparison:
    """Compares the trained version with the served one of the same name, on the held-out images."""
    name = job.request.name
    version = job.store.serving().models.get(name)
    if version is None:
        return Comparison(None, None, f"no version of {name} is served yet")
    try:
        config = job.store.config(name, version)
        if config.classes != job.data.classes:
            return Comparison(version, None, f"its classes are not those of {name}@{version}, which is served")
        served, new = (_correct(job, probabilities) for probabilities in _probabilities(job, config, trained))
    except ModelError as error:
        return Comparison(version, None, f"{name}@{version}, which is served, cannot be compared with: {error}")
    verdict = compare(served, new)
    if config.lineage.get("dataset", {}).get("split") == job.data.split:
        return Comparison(version, verdict, verdict.reason)
    reason = f"{verdict.reason} But {name}@{version} was trained under another split: these images may have been among its training images."
    return Comparison(version, verdict.model_copy(update={"reason": reason}), reason, fair=False)


def _correct(job: TrainingContext, probabilities: Tensor) -> Tensor:
    return probabilities.argmax(dim=1) == job.data.labels[job.held_out]


@torch.inference_mode()
def _probabilities(job: TrainingContext, config: ModelConfig, trained: TrainingResult) -> tuple[Tensor, Tensor]:
    """Returns the probabilities (n, C) of the held-out images by the served and the new version.

    The features of both have one precision, float32 where their backbones differ in it. A shared backbone is not loaded again.
    """
    shared = {backbone.ref: backbone for backbone in trained.backbones}
    backbones = [shared.get(ref) or job.store.load_backbone(ref) for ref in config.backbones]
    precisions = {job.precision(backbone) for backbone in (*trained.backbones, *backbones)}
    alike: Precision = "float32" if len(precisions) > 1 else precisions.pop()
    served = job.store.load_head(config).probabilities(*(_features(job, backbone, alike) for backbone in backbones))
    if all(job.precision(backbone) == alike for backbone in trained.backbones):
        return served, trained.probabilities(job.held_out)
    return served, trained.head.probabilities(*(_features(job, backbone, alike) for backbone in trained.backbones))


def _features(job: TrainingContext, backbone: Backbone, precision: Precision) -> Tensor:
    """Returns the features (n, D) of the held-out images."""
    pixels, digests = job.pixels(backbone.ref.preprocessing)
    own = [digests[row] for row in job.held_out.tolist()]
    return job.cache.features(
        backbone,
        pixels[job.held_out],
        own,
        progress=job.tell("evaluate"),
        device=job.device,
        precision=precision,
    )


def decide(request: FinetuneRequest, compared: Comparison, parity: Parity) -> tuple[Deployment, str]:
    """Returns the decision about the new version, and the reason."""
    if not parity.images:
        return (
            "manual",
            "none of the held-out images could be read again, so the server could not be compared with the trainer",
        )
    if not parity.agrees:
        return "rejected", f"read back from the store, {parity.reason}"
    if request.deploy in ("never", "manual"):
        return request.deploy, f"deploy is {request.deploy}: {compared.reason}"
    if request.deploy == "always" or compared.served is None:
        return "activate", compared.reason
    if compared.verdict is None or compared.verdict.verdict == "not enough images to decide":
        return "manual", compared.reason
    if compared.verdict.verdict == "worse":
        return ("rejected" if compared.fair else "manual"), compared.reason
    return "activate", compared.reason  # not worse, even if the served version had an advantage
